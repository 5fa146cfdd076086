"""Configuration of several processes; ``trivium.distributed`` connects them."""

from __future__ import annotations

from typing import Literal

from trivium.config.base import Configuration


class ParallelConfig(Configuration):
    """How processes that a launcher such as torchrun starts divide a run (docs/scale.md)."""

    kind: Literal["replicated"] = "replicated"
    """Kind of division: replicated processes each hold the whole model and its optimizer."""
