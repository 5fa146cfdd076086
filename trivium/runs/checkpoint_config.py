"""When a run saves its state, and what it keeps of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trivium.config.base import Configuration


class CheckpointsConfig(Configuration):
    """Saved states that a stopped run goes on from, as if it had never been stopped."""

    seconds: float = Field(default=60.0, gt=0)
    """Save when so many seconds have gone since the last time; later where a save takes so long
    that more than a twenty-fifth of the time would go into saving."""
    steps: int | None = Field(default=None, ge=1)
    """Save after every so many steps instead, whatever it costs."""
    keep: int = Field(default=2, ge=1)
    """How many of the last checkpoints stay."""
    best: str | None = None
    """An evaluation's number, such as sampled: the checkpoint with the best value stays too, and
    its model is in best/."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of it is the best."""
