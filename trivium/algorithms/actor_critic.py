"""How PPO's critic is configured and made."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trivium.algorithms.update import OptimizerConfig
from trivium.config import Configuration
from trivium.errors import ConfigurationError
from trivium.models.critic import Critic, SeparateCritic, SharedCritic
from trivium.models.loading import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel


class CriticConfig(Configuration):
    """The critic and its training."""

    kind: Literal["separate", "shared"] = "separate"
    """A model of its own, or a head on the actor's hidden states."""
    model: ModelConfig | None = None
    """Where a separate critic starts: a reward model or any checkpoint; by default the actor's."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """The critic's optimiser."""
    coefficient: float = Field(default=0.5, gt=0)
    """Weight of the value loss beside the actor's."""
    clip: float | None = Field(default=None, gt=0)
    """Clip the values around V_old by this much."""
    warmup_steps: int = Field(default=0, ge=0)
    """Rollout batches at the start that train the critic alone."""

    @model_validator(mode="after")
    def _consistent(self) -> CriticConfig:
        if self.kind == "shared" and self.model is not None:
            raise ValueError("a shared critic is a head on the actor: leave critic.model out")
        if self.kind == "shared" and self.warmup_steps:
            raise ValueError("critic.warmup_steps would train the actor's trunk too: use separate")
        return self


def make_critic(config: CriticConfig, actor: ModelConfig, policy: Policy) -> Critic:
    """A separate critic from its own checkpoint (by default the actor's), or a shared head."""
    if config.kind == "shared":
        return SharedCritic(policy)
    model = RewardModel.load(config.model or actor)
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigurationError(
            f"critic.model.path is {model.model.name_or_path}, whose vocabulary is not that of the "
            "actor, and the critic reads the actor's tokens: train it from the actor's base model"
        )
    return SeparateCritic(model)
