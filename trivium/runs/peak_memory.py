"""Peak memory of a run, measured in its own process.

On a GPU the peak is the most memory that PyTorch's allocator handed out. On the CPU it is the peak
resident memory of the process above a baseline taken before the models are loaded. Linux can reset
its high-water mark when the baseline is taken. Other systems report the peak since the process
started, so a second run in the same process is measured only if it needs more than the first.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MMAP_THRESHOLD, TRIM_THRESHOLD = 1 << 17, 1 << 22
"""glibc maps blocks of 128 KiB and more separately, and keeps at most 4 MiB free at the heap's
end."""


class PeakMemory:
    """Measures peak memory from its construction on.

    Args:
        device: device that holds the models.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        return_freed_memory()
        _reset_high_water_mark()
        self.baseline = _resident_bytes()

    def bytes(self) -> int:
        """Return the peak so far, in bytes above the baseline."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return max(0, _peak_resident_bytes() - self.baseline)


def return_freed_memory() -> None:
    """Return the memory of large tensors to the system as soon as they are freed (glibc only).

    By default glibc serves ever larger blocks from its heap. Tensors of changing sizes leave holes
    there, and the same run then needs up to 50 % more memory.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        library.malloc_trim(0)


def _reset_high_water_mark() -> None:
    """Reset the high-water mark to the resident memory of now, where the system allows it."""
    try:
        CLEAR.write_text("5")
    except OSError:  # Not Linux, or not permitted: the mark stays as it is.
        return


def _resident_bytes() -> int:
    """Return the resident memory of now; the peak where the system does not report it."""
    return _status_bytes("VmRSS") or _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows reports no peak.
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _status_bytes(name: str) -> int | None:
    """Return one field of /proc/self/status in bytes; None if there is no such field."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(values[0]) * 1024 if values else None
