"""Configuration of PPO's critic, which ``actor_critic`` builds and ``ppo`` trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.hf.model_config import ModelConfig, scoring_model_conflicts
from trivium.training.optimizer_config import OptimizerConfig


class CriticConfig(Configuration):
    """The critic and its training."""

    kind: Literal["separate", "shared"] = "separate"
    """A model of its own, or a head on the actor's hidden states."""
    model: ModelConfig | None = None
    """Checkpoint of a separate critic, such as a reward model; by default the actor's."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """The critic's optimizer."""
    coefficient: float = Field(default=0.5, gt=0)
    """Weight of the value loss relative to the actor's loss."""
    clip: float | None = Field(default=None, gt=0)
    """Largest change of a value from V_old that the loss counts; null: no clipping."""
    warmup_steps: int = Field(default=0, ge=0)
    """Rollout batches at the start that train only the critic."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.kind == "shared" and self.model is not None:
            yield "model", "a shared critic is a head on the actor: leave critic.model out"
        if self.kind == "shared" and self.warmup_steps:
            yield "warmup_steps", "they would train the actor's trunk too: use kind: separate"
        yield from scoring_model_conflicts("model", self.model)
