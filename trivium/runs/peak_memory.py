"""The most memory that a run has held, measured where it runs.

On a GPU it is what PyTorch's allocator gave out. On the CPU it is the resident memory of the whole
process above a baseline that is taken before the models are loaded: on Linux its high-water mark,
which is set back when the baseline is taken; elsewhere the largest since the process began, so that
a second run in one process is measured only where it needs more than the first.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from trivium.models.cpu.linear import MIN_ROWS, use_fast_linears

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK, KEPT_ON_TOP = 1 << 17, 1 << 22
"""Blocks of 128 KiB and more are mapped on their own; 4 MiB may stay free at the heap's end."""


class PeakMemory:
    """Measures from the moment it is made.

    Args:
        device: where the models live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        return_freed_memory()
        _set_mark_back()
        self.baseline = _resident()

    def bytes(self) -> int:
        """The peak since then, in bytes above the baseline."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return max(0, _largest() - self.baseline)


def load_libraries() -> None:
    """Train a tiny model for a step, so that library code is in memory before a baseline is taken.

    Otherwise some 30 MiB that belong to no model count as a run's.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    use_fast_linears(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.zeros(2, MIN_ROWS, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def return_freed_memory() -> None:
    """Let large tensors' memory go back to the system as soon as they are freed (glibc only).

    Left alone, glibc serves ever larger blocks from its heap, where tensors of changing sizes leave
    holes: the same run then needs up to half as much memory again.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_ON_TOP)
        library.malloc_trim(0)


def _set_mark_back() -> None:
    """Set the high-water mark to what is resident now, where that is possible."""
    try:
        CLEAR.write_text("5")
    except OSError:  # Not Linux, or not permitted: the mark stays where it was.
        return


def _resident() -> int:
    """Resident memory now, in bytes; where the system does not say, the largest so far."""
    return _status("VmRSS") or _largest()


def _largest() -> int:
    """The largest resident memory, in bytes."""
    largest = _status("VmHWM")
    if largest is not None:
        return largest
    try:
        import resource
    except ImportError:  # Windows measures none.
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _status(name: str) -> int | None:
    """A line of the process's status in bytes, None where there is none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
