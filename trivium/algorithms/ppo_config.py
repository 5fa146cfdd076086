"""Configuration of a PPO run; the loop is ``ppo``."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from trivium.algorithms.asynchronous import async_conflicts, importance_conflicts
from trivium.algorithms.critic_config import CriticConfig
from trivium.algorithms.pretraining_config import PretrainingMixConfig
from trivium.algorithms.reward_update_config import RewardUpdateConfig, learned_reward_conflicts
from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.hf.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig
from trivium.training.options import AggregationName, ImportanceWeightName, KLEstimatorName


class AdaptiveKLConfig(Configuration):
    """Adapts β so that the KL per response stays near a target (Ziegler et al. 2019)."""

    target: float = Field(gt=0)
    """KL per response, in nats."""
    horizon: int = Field(default=10000, gt=0)
    """Number of responses over which β adapts."""


class PPOConfig(Configuration):
    """Everything a PPO run depends on."""

    model: ModelConfig
    """The actor; the reference is a frozen copy of it."""
    data: PromptsConfig
    """Prompts to sample from."""
    rewards: RewardConfigs = Field(min_length=1)
    """Rewards; a response's score is their weighted sum."""
    critic: CriticConfig = CriticConfig()
    """The critic."""
    run: RunConfig = RunConfig()
    """The run's directory, seed, checkpoints and budget."""
    sampling: Sampling = Sampling()
    """How responses are sampled."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    """The actor's optimizer."""
    evaluation: EvaluationConfig | None = None
    """Held-out evaluation."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay, per optimizer step, of an exponential moving average of the actor's weights, which is
    evaluated beside them and saved in ema/; null: none."""

    steps: int = Field(default=100, ge=1)
    """Rollout batches."""
    prompts_per_step: int = Field(default=64, ge=1)
    """Prompts per rollout batch."""
    responses_per_prompt: int = Field(default=1, ge=1)
    """Responses per prompt."""
    epochs: int = Field(default=2, ge=1)
    """Passes over a rollout batch."""
    minibatches: int = Field(default=2, ge=1)
    """Optimizer steps per epoch."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""
    sampler_tolerance: float = Field(default=1e-4, ge=0)
    """Largest difference, in nats, at which the sampler's log-probs serve as π_old's for the
    minibatches after the first, which saves a forward pass. It is measured on one micro-batch. With
    0, asynchronous sampling, a KL term or a shared critic, the actor scores all tokens."""

    beta: float = Field(default=0.05, ge=0)
    """Weight of the KL term in the reward."""
    kl: KLEstimatorName = "k1"
    """Estimator of the KL term in the reward, or your own."""
    adaptive_kl: AdaptiveKLConfig | None = None
    """Adapt β while training; null keeps it fixed."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount γ."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of GAE: 1 is Monte Carlo, 0 is one step."""
    bootstrap_truncated: bool = False
    """Bootstrap truncated responses from the critic's value instead of 0."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout batch."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """ε below 1."""
    clip_high: float = Field(default=0.2, gt=0)
    """ε above 1."""
    aggregation: AggregationName = "sequence_mean"
    """How tokens are averaged: per response, over all tokens, or by fixed length."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the policy's entropy in the objective."""
    target_kl: float | None = Field(default=None, gt=0)
    """KL(π_old‖π) per token above which a batch's updates end; null: never."""
    importance_sampling_cap: float | None = Field(default=None, gt=0)
    """Largest weight of importance sampling between sampler and trainer; null: no weights."""
    importance_sampling: ImportanceWeightName = "token_truncate"
    """Weight of each token or of the whole response (sequence), which is truncated at the cap or,
    above it, masked: 0 (docs/asynchronous.md)."""
    asynchronous: bool = False
    """Sample the next step's responses while the current step trains. They are one step off-policy,
    which importance_sampling_cap corrects (docs/asynchronous.md)."""
    pretraining: PretrainingMixConfig | None = None
    """Add a language-modeling loss on demonstrations (PPO-ptx)."""
    reward_update: RewardUpdateConfig | None = None
    """Train the learned reward further on the policy's own responses while PPO runs."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.sampling.greedy:
            yield (
                "sampling.temperature",
                "greedy sampling explores nothing that PPO could learn from: raise it, 1 is usual",
            )
        if self.minibatches > self.prompts_per_step:
            yield (
                "minibatches",
                f"more than the {self.prompts_per_step} prompts of a step: lower it or raise "
                "prompts_per_step",
            )
        yield from async_conflicts(self.asynchronous, self.importance_sampling_cap, self.steps)
        yield from importance_conflicts(self.importance_sampling, self.importance_sampling_cap)
        if self.adaptive_kl is not None and self.beta == 0:
            yield "beta", "adaptive_kl scales it and would keep it 0: start it above 0"
        if self.critic.warmup_steps > self.steps:
            yield (
                "critic.warmup_steps",
                f"there are only {self.steps} steps, so warm-up never ends: lower it "
                "or raise steps",
            )
        if self.reward_update is not None:
            yield from learned_reward_conflicts(self.rewards)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.epochs * self.minibatches
