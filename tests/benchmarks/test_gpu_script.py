"""The script for a first hour on a GPU (``benchmarks/gpu.sh``) runs on a CPU with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"


def test_every_check_and_measurement_runs_on_a_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [SCRIPT, "--tiny", output],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{output}: 9 of 9 paths agree"
    result = json.loads(output.read_text())
    assert all(check["passed"] and not check["error"] for check in result["parity"])
    speed = result["speed"]
    assert [(r["tokens"], r["stage"]) for r in speed] == [
        (64, "train"), (64, "sample"), (128, "train"), (128, "sample")
    ]  # fmt: skip
    assert all(r["tokens_per_second"] > 0 and r["flops_share"] > 0 for r in speed)
    (grpo,) = result["grpo"]
    assert grpo["side"] == "trivium" and {"rollout", "update"} <= grpo["stages"].keys()


def test_without_a_gpu_the_script_says_how_to_try_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, tmp_path / "gpu.json"],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "--tiny tries the script on the CPU" in done.stdout
    assert not (tmp_path / "gpu.json").exists()
