"""Search for the micro-batch size that fits the free memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from trivium.config.base import Configuration
from trivium.memory.report import Lengths, Memory
from trivium.memory.stages import predict

FREE_SHARE = 0.9
"""Largest share of the free memory for a prediction, which can be 10 % too low."""
CONTROL_GROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Return the free memory on ``device`` in bytes, within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    system, container = psutil.virtual_memory().available, _container_available()
    return system if container is None else min(system, container)


def _container_available() -> int | None:
    """Return the free memory of the control group in bytes; None if it has no limit.

    The control group counts cached file pages as used, but the kernel frees them on demand.
    """
    try:
        limit, used = (int((CONTROL_GROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        lines = (CONTROL_GROUP / "memory.stat").read_text().splitlines()
        cached = int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, ValueError, KeyError):  # No such file, or "max".
        return None
    return max(0, limit - (used - cached))


def smaller_limits(limit: int, lengths: Lengths) -> Iterator[int]:
    """Halve the token limit repeatedly, down to one prompt with two responses."""
    minimum = max(lengths.prompts) + 2 * max(lengths.responses)
    while limit // 2 >= minimum:
        limit //= 2
        yield limit


def largest_fitting_limit(
    kind: str, config: Configuration, lengths: Lengths, available: int
) -> tuple[int, Memory] | None:
    """Return the largest of ``smaller_limits`` whose run needs at most ``available`` bytes.

    Also return the memory of that run. None if no limit fits.
    """
    settings: Any = config
    for limit in smaller_limits(settings.tokens_per_micro_batch, lengths):
        candidate = settings.model_copy(update={"tokens_per_micro_batch": limit})
        memory = predict(kind, candidate, lengths)
        if memory.bytes <= available:
            return limit, memory
    return None
