"""How PPO's critic is configured and made."""

from __future__ import annotations

from trivium.algorithms.critic_config import CriticConfig
from trivium.errors import ConfigurationError
from trivium.models.critic import Critic, SeparateCritic, SharedCritic
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel


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
