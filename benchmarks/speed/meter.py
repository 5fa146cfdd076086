"""What both workers measure themselves with: processor time of steps, and their peak memory.

Imports nothing of Trivium or TRL.
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
    """The worker's task, its world and a directory of its own, from the command line.

    One thread: the core was chosen by who started this process.
    """
    torch.set_num_threads(1)
    task, world, place = sys.argv[1:]
    return json.loads(task), Path(world), Path(place)


class Meter:
    """Processor time of this process from step to step, or its peak memory over all steps.

    How fast the core is changes with what its neighbors do, so it is measured after each step.

    Memory that is freed goes back to the system at once while memory is measured, and only then:
    it costs time.
    """

    def __init__(self, place: Path, *, memory: bool) -> None:
        self._place = place
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
        """All models are loaded: time and memory count from here."""
        if self._memory:
            self._trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self._base = _status("VmRSS")
        self._began = time.process_time()

    def step(self) -> None:
        """A step ends here."""
        self._seconds.append(time.process_time() - self._began)
        if self._memory:
            self._peak = _status("VmHWM")
        else:
            self._rates.append(rates())
        self._began = time.process_time()

    def note(self, **numbers: Any) -> None:
        """Something else for the report."""
        self._numbers |= numbers

    def report(self) -> None:
        """Write what was measured, for who started this process."""
        found = {
            "seconds": self._seconds,
            "rates": self._rates,
            "peak_bytes": self._peak - self._base,
            "base_bytes": self._base - self._before,
            **self._numbers,
        }
        (self._place / "report.json").write_text(json.dumps(found))
        # Nothing that happens while the interpreter ends may matter.
        sys.stdout.flush()
        os._exit(0)


def _status(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
