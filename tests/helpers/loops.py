"""Stages of the on-policy loops, bound to a configuration and loaded components."""

from __future__ import annotations

from trivium.algorithms import grpo, ppo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.ppo_equations import Objective, Returns
from trivium.algorithms.rollout_step import RolloutBatches
from trivium.algorithms.supervision import Supervision
from trivium.models.critic import Critic
from trivium.training.setup import OnPolicyComponents


def grpo_learner(config: GRPOConfig, components: OnPolicyComponents) -> grpo.Learner:
    """Return GRPO's stages, as ``grpo.train`` builds them."""
    objective, supervision = grpo.Objective.of(config), Supervision.of(config)
    return grpo.Learner.of(config, objective, supervision, components)


def ppo_learner(config: PPOConfig, components: OnPolicyComponents, critic: Critic) -> ppo.Learner:
    """Return PPO's stages, as ``ppo.train`` builds them."""
    objective, returns = Objective.of(config), Returns.of(config)
    return ppo.Learner.of(config, objective, returns, components, critic)


def rollout_batches(
    config: GRPOConfig | PPOConfig, components: OnPolicyComponents
) -> RolloutBatches:
    """Return the rollout batches of a configuration."""
    return RolloutBatches(
        components,
        config.prompts_per_step,
        config.responses_per_prompt,
        config.sampling,
        config.run.seed,
    )
