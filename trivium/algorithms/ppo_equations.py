"""Functions and constants of PPO's equations, read from a configuration: returns and objective."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.sampler_correction import SamplerCorrection
from trivium.maths.advantages import gae
from trivium.maths.aggregation import Aggregation
from trivium.maths.kl import KLEstimator, kl_shaped_rewards
from trivium.rollout.rollouts import Rollouts
from trivium.training.options import AGGREGATION, KL_ESTIMATOR, load_option


@dataclass(frozen=True)
class Returns:
    """How rewards become advantages and return targets: γ, λ, and the KL in the reward."""

    gamma: float
    gae_lambda: float
    kl: KLEstimator
    bootstrap_truncated: bool
    whiten_advantages: bool

    @classmethod
    def of(cls, config: PPOConfig) -> Returns:
        """Return the settings of a configuration; a user's own KL estimator is checked here."""
        return cls(
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            kl=load_option(KL_ESTIMATOR, config.kl),
            bootstrap_truncated=config.bootstrap_truncated,
            whiten_advantages=config.whiten_advantages,
        )

    def advantages(
        self,
        rollouts: Rollouts,
        tokenizer: PreTrainedTokenizerBase,
        kl_T: Tensor,
        values_T: Tensor,
        beta: float,
        bootstrap_N: Tensor | None,
    ) -> Tensor:
        """Return GAE advantages of rewards with the KL in them, ``[T]``."""
        lengths_N = rollouts.lengths_N.to(kl_T.device)
        step_rewards_T = rollouts.step_rewards(tokenizer, kl_T)
        rewards_T = kl_shaped_rewards(
            rollouts.outcomes_N.to(kl_T), kl_T, lengths_N, beta, step_rewards_T
        )
        return gae(
            rewards_T,
            values_T,
            lengths_N,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            bootstrap_N=bootstrap_N,
        )


@dataclass(frozen=True)
class Objective:
    """Functions and constants of the actor's J(θ) and of the critic's loss."""

    clip_low: float
    clip_high: float
    entropy_coef: float
    correction: SamplerCorrection | None
    value_coef: float
    value_clip: float | None
    aggregation: Aggregation
    max_length: int

    @classmethod
    def of(cls, config: PPOConfig) -> Objective:
        cap = config.importance_sampling_cap
        return cls(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            entropy_coef=config.entropy_coef,
            correction=SamplerCorrection.of(config.importance_sampling, cap),
            value_coef=config.critic.coefficient,
            value_clip=config.critic.clip,
            aggregation=load_option(AGGREGATION, config.aggregation),
            max_length=config.sampling.max_tokens,
        )
