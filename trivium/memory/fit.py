"""Which micro-batches fit the memory that there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from trivium.config import Configuration
from trivium.memory.report import Lengths, Memory
from trivium.memory.roads import predict

SHARE = 0.9
"""How much of the free memory a prediction may fill, as it may be a tenth too low."""
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that a run could have on ``device`` now; a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = (_limit("memory.max", "memory.current"), psutil.virtual_memory().available)
    return min(limit for limit in limits if limit is not None)


def _limit(most: str, used: str) -> int | None:
    """What is left of the control group's memory; None where there is no limit."""
    try:
        found = [int((CONTROL_GROUP / name).read_text()) for name in (most, used)]
    except (OSError, ValueError):  # No such file, or "max".
        return None
    return max(0, found[0] - found[1])


def bounds(largest: int, lengths: Lengths) -> Iterator[int]:
    """Bounds of a micro-batch in tokens: ``largest`` and its halves, down to one prompt with its
    responses."""
    least = max(lengths.prompts) + 2 * max(lengths.responses)
    yield largest
    while largest // 2 >= least:
        largest //= 2
        yield largest


def fitting(
    kind: str, config: Configuration, lengths: Lengths, room: int
) -> tuple[int, Memory] | None:
    """The largest of ``bounds`` with which a run needs no more than ``room`` bytes, and what it
    needs then; None where none does."""
    settings: Any = config
    for bound in bounds(settings.tokens_per_micro_batch, lengths):
        tried = settings.model_copy(update={"tokens_per_micro_batch": bound})
        memory = predict(kind, tried, lengths)
        if memory.bytes <= room:
            return bound, memory
    return None
