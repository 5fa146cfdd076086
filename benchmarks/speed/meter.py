"""Measurement of a worker's steps: processor time and peak memory.

Both workers use this module, which imports neither Trivium nor TRL.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from limit import rates

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def begin() -> tuple[dict[str, Any], Path, Path]:
    """Return the task, the directory of models and data, and the output directory.

    All come from the command line. The worker uses one thread; its parent process chose the core.
    """
    torch.set_num_threads(1)
    task, world, output = sys.argv[1:]
    return json.loads(task), Path(world), Path(output)


class Meter:
    """Meter of this process's processor time per step, or of its peak memory over all steps.

    The speed of the core changes with the load on its neighbors, so it is measured after each step.
    Only when memory is measured is freed memory returned to the system at once, because that takes
    time.
    """

    def __init__(self, output: Path, *, memory: bool) -> None:
        self._output = output
        self._memory = memory
        self._began = 0.0
        self._seconds: list[float] = []
        self._rates: list[dict[str, float]] = []
        self._base = self._before = self._peak = 0
        self._numbers: dict[str, Any] = {}
        if memory:
            library = ctypes.CDLL(None)
            library.mallopt(M_MMAP_THRESHOLD, 1 << 17)
            library.mallopt(M_TRIM_THRESHOLD, 1 << 22)
            self._trim = library.malloc_trim
            self._before = _status("VmRSS")

    def loaded(self) -> None:
        """Start the measurement, after all models are loaded."""
        if self._memory:
            self._trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._base = _status("VmRSS")
        self._began = time.process_time()

    def step(self) -> None:
        """Record the end of a step."""
        self._seconds.append(time.process_time() - self._began)
        if self._memory:
            self._peak = _status("VmHWM")
        else:
            self._rates.append(rates())
        self._began = time.process_time()

    def note(self, **numbers: Any) -> None:
        """Add further numbers to the report."""
        self._numbers |= numbers

    def report(self) -> None:
        """Write the measurements for the parent process, and exit."""
        measurements = {
            "seconds": self._seconds,
            "rates": self._rates,
            "peak_bytes": self._peak - self._base,
            "base_bytes": self._base - self._before,
            **self._numbers,
        }
        (self._output / "report.json").write_text(json.dumps(measurements))
        # Skip the interpreter's shutdown, whose errors must not count.
        sys.stdout.flush()
        os._exit(0)


def _status(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
