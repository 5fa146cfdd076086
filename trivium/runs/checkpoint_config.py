"""Configuration of checkpoints: when a run saves its state, and which checkpoints it keeps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trivium.config.base import Configuration


class CheckpointsConfig(Configuration):
    """Checkpoints from which a stopped run resumes with bit-identical results."""

    seconds: float = Field(default=60.0, gt=0)
    """Seconds between two checkpoints. The interval grows where saving is slow, so that saving
    takes at most 1/25 of the time."""
    steps: int | None = Field(default=None, ge=1)
    """Number of training steps between two checkpoints. Replaces seconds, however slow saving
    is."""
    keep: int = Field(default=2, ge=1)
    """Number of most recent checkpoints to keep while the run lasts."""
    keep_finished: int = Field(default=1, ge=0)
    """Number of most recent checkpoints to keep after the run has finished, to continue its
    training with more steps. 0 keeps none, not even the best: the models in final/ and best/
    remain."""
    best: str | None = None
    """Evaluation metric, such as sampled, whose best value decides the best checkpoint. That
    checkpoint is kept too, and its model is saved in best/: the moving average of its weights if
    the metric is the average's, such as ema/sampled."""
    best_is: Literal["highest", "lowest"] = "highest"
    """Whether the highest or the lowest value of that metric is the best."""
