"""What a PPO run depends on; the loop is ``ppo``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.algorithms.asynchronous import async_conflicts
from trivium.algorithms.critic_config import CriticConfig
from trivium.algorithms.pretraining_config import PretrainingMixConfig
from trivium.algorithms.reward_update_config import RewardUpdateConfig, learned_reward_conflicts
from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.maths.options import Aggregation
from trivium.models.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig


class AdaptiveKLConfig(Configuration):
    """Steers β so that the KL per response stays near a target (Ziegler et al. 2019)."""

    target: float = Field(gt=0)
    """KL per response, in nats."""
    horizon: int = Field(default=10000, gt=0)
    """Responses over which β adapts."""


class PPOConfig(Configuration):
    """Everything a PPO run depends on."""

    model: ModelConfig
    """The actor; the reference is a frozen copy of it."""
    data: PromptsConfig
    """Prompts to sample from."""
    rewards: RewardConfigs = Field(min_length=1)
    """What is rewarded: a weighted sum."""
    critic: CriticConfig = CriticConfig()
    """The critic."""
    run: RunConfig = RunConfig()
    """Where the run is written, and its seed."""
    sampling: Sampling = Sampling()
    """How responses are drawn."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    """The actor's optimizer."""
    evaluation: EvaluationConfig | None = None
    """Held-out evaluation."""

    steps: int = Field(default=100, ge=1)
    """Rollout batches."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts per rollout batch."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses per prompt."""
    epochs: int = Field(default=2, ge=1)
    """How often a rollout batch is reused."""
    minibatches: int = Field(default=2, ge=1)
    """Optimizer steps per epoch."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""
    sampler_tolerance: float = Field(default=1e-4, ge=0)
    """How far the sampler's log-prob of a token may be from the actor's, in nats, to be π_old's for
    the minibatches after the first, which saves a pass. Measured on one micro-batch; with 0,
    asynchronous or a KL term, the actor scores them all, as it does beside a critic on its own
    trunk."""

    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL term in the reward."""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL term in the reward."""
    adaptive_kl: AdaptiveKLConfig | None = None
    """Adapt β while training."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount γ."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of GAE: 1 is Monte Carlo, 0 one step."""
    bootstrap_truncated: bool = False
    """Let cut-off responses continue with the critic's value instead of 0."""
    whiten_advantages: bool = True
    """Bring advantages to mean 0 and variance 1 over the rollout batch."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """ε below 1."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε above 1."""
    aggregation: Aggregation = "sequence_mean"
    """How tokens are averaged."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy in the objective."""
    target_kl: float | None = Field(default=None, gt=0)
    """End a batch's updates when KL(π_old‖π) per token exceeds this."""
    importance_sampling_cap: float | None = Field(default=None, gt=0)
    """Truncated importance sampling between sampler and trainer: the largest weight."""
    asynchronous: bool = False
    """Sample a step's responses while the step before is trained on, from the policy as it was
    before that: one step off-policy, which importance_sampling_cap corrects (docs/asynchronous.md)."""
    pretraining: PretrainingMixConfig | None = None
    """Add a language-modeling loss on demonstrations (PPO-ptx)."""
    reward_update: RewardUpdateConfig | None = None
    """Train the learned reward further on the policy's own responses while PPO runs."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.sampling.greedy:
            yield (
                "sampling.temperature",
                "PPO learns from what it explores, and this explores nothing: raise it, 1 is usual",
            )
        if self.minibatches > self.prompts_per_step:
            yield (
                "minibatches",
                f"more than the {self.prompts_per_step} prompts of a step: lower it or raise "
                "prompts_per_step",
            )
        yield from async_conflicts(self.asynchronous, self.importance_sampling_cap, self.steps)
        if self.adaptive_kl is not None and self.beta == 0:
            yield "beta", "adaptive_kl scales it and would keep it 0: start it above 0"
        if self.critic.warmup_steps > self.steps:
            yield (
                "critic.warmup_steps",
                f"there are only {self.steps} steps, so it would not end: lower it or raise steps",
            )
        if self.reward_update is not None:
            yield from learned_reward_conflicts(self.rewards)
