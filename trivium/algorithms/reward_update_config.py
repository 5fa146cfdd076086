"""How ``reward_update`` trains the learned reward further."""

from __future__ import annotations

from pydantic import Field, model_validator

from trivium.algorithms.optimizer_config import OptimizerConfig
from trivium.config import Configuration
from trivium.rewards.reward import RewardConfig


class RewardUpdateConfig(Configuration):
    """How the learned reward is trained further."""

    judge: RewardConfig
    """What labels responses: an outcome for a reward model, steps for a process reward model."""
    every: int = Field(default=10, ge=1)
    """PPO: rollout batches between updates. (GRPO updates once per iteration.)"""
    examples: int = Field(default=512, ge=1)
    """Fresh pairs (or step-labelled responses) used per update, at most."""
    replay: float = Field(default=0.1, ge=0)
    """Earlier examples that are added, as a share of the fresh ones."""
    examples_per_step: int = Field(default=64, ge=1)
    """Examples per optimiser step."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each update's examples."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """The reward model's optimiser."""
    centre: float = Field(default=0.01, ge=0)
    """Weight of (s_w + s_l)², which keeps outcome scores around 0."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass."""

    @model_validator(mode="after")
    def _constant_rate(self) -> RewardUpdateConfig:
        if self.optimizer.schedule != "constant":
            raise ValueError(
                f"optimizer.schedule is {self.optimizer.schedule}, but how many updates there will "
                "be is not known beforehand: use constant"
            )
        return self
