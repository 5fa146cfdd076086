"""Waiting for other threads and processes, however busy the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable

_GUARD_SECONDS = 300
"""Only ends a test that would hang: no test is about how long something takes."""


def eventually(condition: Callable[[], object]) -> bool:
    """Wait until a condition holds, and return whether it does."""
    end = time.monotonic() + _GUARD_SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
