"""Which micro-batches fit the memory that there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from trivium.config.base import Configuration
from trivium.memory.report import Lengths, Memory
from trivium.memory.stages import predict

SHARE = 0.9
"""How much of the free memory a prediction may fill, as it may be a tenth too low."""
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that a run could have on ``device`` now; a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available, left = psutil.virtual_memory().available, _left_in_container()
    return available if left is None else min(available, left)


def _left_in_container() -> int | None:
    """What is left of the control group's memory; None where there is no limit.

    Pages of files that were read count as used there, but are given up when memory is asked for.
    """
    try:
        most, used = (int((CONTROL_GROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        files = int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, ValueError, KeyError):  # No such file, or "max".
        return None
    return max(0, most - (used - files))


def smaller_bounds(bound: int, lengths: Lengths) -> Iterator[int]:
    """The halves of a micro-batch's bound in tokens, down to one prompt with its responses."""
    least = max(lengths.prompts) + 2 * max(lengths.responses)
    while bound // 2 >= least:
        bound //= 2
        yield bound


def fitting(
    kind: str, config: Configuration, lengths: Lengths, room: int
) -> tuple[int, Memory] | None:
    """The largest of ``smaller_bounds`` with which a run needs ``room`` bytes at most, and what it
    needs then; None where none does."""
    settings: Any = config
    for bound in smaller_bounds(settings.tokens_per_micro_batch, lengths):
        tried = settings.model_copy(update={"tokens_per_micro_batch": bound})
        memory = predict(kind, tried, lengths)
        if memory.bytes <= room:
            return bound, memory
    return None
