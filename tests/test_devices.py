"""Every method runs on a device that is not the CPU, where mixing devices is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def test_every_method_runs_on_a_device_that_refuses_to_mix(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
         f"--basetemp={tmp_path / 'tests'}", TESTS / "helpers" / "device_tests.py"],
        cwd=TESTS.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.splitlines()[-1].startswith("20 passed"), done.stdout[-300:]
