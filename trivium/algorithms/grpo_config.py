"""Configuration of a GRPO run; the loop is ``grpo``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.algorithms.asynchronous import async_conflicts, importance_conflicts
from trivium.algorithms.reward_update_config import RewardUpdateConfig, learned_reward_conflicts
from trivium.config.base import Configuration, Conflict
from trivium.config.option import DefaultByChoice
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.hf.model_config import ModelConfig
from trivium.maths.options import RewardAggregation, Scale
from trivium.rewards.reward_config import RewardConfigs, none_scores_steps
from trivium.rollout.sampling import Sampling
from trivium.runs.store import RunConfig
from trivium.training.optimizer_config import OptimizerConfig
from trivium.training.options import (
    AdvantageName,
    AggregationName,
    ImportanceWeightName,
    KLEstimatorName,
    SurrogateName,
)

# Zheng et al. 2025, section 5.1, and MiniMax 2025, section 3.1, which sets no lower bound.
_CLIP_LOW = DefaultByChoice("surrogate", {"gspo": 3e-4, "cispo": 1.0}, 0.2)
_CLIP_HIGH = DefaultByChoice("surrogate", {"gspo": 4e-4}, 0.2)


class GRPOConfig(Configuration):
    """Everything a GRPO run depends on."""

    model: ModelConfig
    """The policy; the reference starts as a copy of it."""
    data: PromptsConfig
    """Prompts to sample from."""
    rewards: RewardConfigs = Field(min_length=1)
    """Rewards; a response's reward is their weighted sum."""
    run: RunConfig = RunConfig()
    """The run's directory, seed, checkpoints and budget."""
    sampling: Sampling = Sampling()
    """How responses are sampled."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)
    """The policy's optimizer."""
    evaluation: EvaluationConfig | None = None
    """Held-out evaluation."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay, per optimizer step, of an exponential moving average of the policy's weights, which is
    evaluated beside them and saved in ema/; null: none."""

    supervision: Literal["outcome", "process"] = "outcome"
    """Compare whole responses (outcome), or their steps (process; needs a reward that scores
    steps)."""
    iterations: int = Field(default=1, ge=1)
    """Outer loop: the reference is refreshed at the start of every iteration after the first."""
    steps_per_iteration: int = Field(default=100, ge=1)
    """Middle loop: rollout batches per iteration."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per rollout batch."""
    responses_per_prompt: int = Field(default=8, ge=2)
    """Group size G: each response is compared with the others of its group."""
    epochs: int = Field(default=1, ge=1)
    """Inner loop: passes over a rollout batch (μ in the paper)."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per epoch."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass. Does not change the gradient."""
    sampler_tolerance: float = Field(default=1e-4, ge=0)
    """Largest difference, in nats, at which the sampler's log-probs serve as π_old's for the
    minibatches after the first, which saves a forward pass. It is measured on one micro-batch. With
    0, asynchronous sampling or a KL term, the trainer scores all tokens."""

    beta: float = Field(default=0.04, ge=0)
    """Weight of the KL term in the loss; 0 leaves the reference out."""
    kl: KLEstimatorName = "k3"
    """Estimator of the KL term, or your own."""
    kl_correction: bool = False
    """Multiply the KL term by the ratio: its gradient is then that of KL(π‖π_ref) (docs/kl.md)."""
    surrogate: SurrogateName = "clipped"
    """Policy loss: clip each token's ratio, the sequence's ratio (GSPO), or only the token's weight
    (CISPO); or your own."""
    clip_low: float = Field(default_factory=_CLIP_LOW, gt=0, le=1)
    """ε below 1. The default for gspo is 3e-4, and for cispo 1: no lower bound."""
    clip_high: float = Field(default_factory=_CLIP_HIGH, gt=0)
    """ε above 1 (DAPO: 0.28). The default for gspo is 4e-4."""
    aggregation: AggregationName = "sequence_mean"
    """How tokens are averaged: per response, over all tokens (DAPO), by fixed length (Dr. GRPO)."""
    advantage: AdvantageName = "group_mean"
    """Baseline of a reward: the group's mean, or the mean of the others (RLOO); or your own
    advantage estimator."""
    scale: Scale = "sample_std"
    """Deviation that divides the centered reward (Dr. GRPO: none)."""
    reward_aggregation: RewardAggregation = "sum_then_normalize"
    """Compare the weighted sums of several rewards in a group, or normalize each reward in the
    group, add them up with their weights and divide by the deviation over the batch (GDPO)."""
    dynamic_sampling: int = Field(default=0, ge=0)
    """Extra rollout batches, at most, that replace groups of equal rewards (DAPO)."""
    mask_truncated: bool = False
    """Leave truncated responses out of the loss (DAPO)."""
    importance_sampling_cap: float | None = Field(default=None, gt=0)
    """Largest weight of importance sampling between sampler and trainer; null: no weights."""
    importance_sampling: ImportanceWeightName = "token_truncate"
    """Weight of each token or of the whole response (sequence), which is truncated at the cap or,
    above it, masked: 0 (docs/asynchronous.md)."""
    asynchronous: bool = False
    """Sample the next step's responses while the current step trains. They are one step off-policy,
    which importance_sampling_cap corrects (docs/asynchronous.md)."""
    reward_update: RewardUpdateConfig | None = None
    """Train the learned reward further after each iteration, on fresh and replayed rollouts."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.sampling.greedy:
            yield (
                "sampling.temperature",
                "all responses of a group would be equal, with advantage 0: raise it, 1 is usual",
            )
        if self.minibatches > self.prompts_per_step:
            yield (
                "minibatches",
                f"more than the {self.prompts_per_step} groups of a step: lower it or raise "
                "prompts_per_step",
            )
        yield from async_conflicts(
            self.asynchronous, self.importance_sampling_cap, self.steps_per_iteration
        )
        yield from importance_conflicts(self.importance_sampling, self.importance_sampling_cap)
        if self.kl_correction and self.beta == 0:
            yield "kl_correction", "it needs a KL term: set beta above 0 or leave it out"
        if self.beta > 0 and (self.kl, self.kl_correction) in (("k1", False), ("k2", True)):
            yield (
                "kl",
                f"with kl_correction: {str(self.kl_correction).lower()} it does not pull towards "
                "the reference (docs/kl.md): use k3, k2 without the correction or k1 with it",
            )
        if self.surrogate == "gspo" and self.aggregation != "sequence_mean":
            yield (
                "aggregation",
                "gspo's loss is a mean over sequences: use sequence_mean, or surrogate: clipped",
            )
        if self.supervision == "process":
            yield from self._process_reward_conflicts()
        if self.reward_aggregation == "normalize_then_sum":
            yield from self._decoupling_conflicts()
        if self.reward_update is not None:
            yield from learned_reward_conflicts(self.rewards)
            if self.iterations == 1:
                yield (
                    "reward_update",
                    "it trains the reward model between iterations, but iterations is 1: raise "
                    "that or leave reward_update out",
                )

    def _process_reward_conflicts(self) -> Iterator[Conflict]:
        """Yield settings that do not fit process supervision."""
        if self.dynamic_sampling:
            yield (
                "dynamic_sampling",
                "it compares outcomes: use supervision: outcome, or leave it out",
            )
        if self.advantage != "group_mean":
            yield "advantage", "it compares outcomes: use supervision: outcome, or group_mean"
        if none_scores_steps(self.rewards):
            yield (
                "supervision",
                "every reward scores whole responses: name one that scores steps, or use outcome",
            )

    def _decoupling_conflicts(self) -> Iterator[Conflict]:
        """Yield settings that do not fit rewards that are normalized one by one."""
        if self.supervision == "process":
            yield (
                "reward_aggregation",
                "it normalizes the rewards of whole responses: use supervision: outcome, or "
                "sum_then_normalize",
            )
        if self.scale == "none":
            yield (
                "scale",
                "normalize_then_sum divides each reward by its deviation: use sample_std, or "
                "reward_aggregation: sum_then_normalize",
            )
        if sum(reward.weight != 0 for reward in self.rewards) < 2:
            yield (
                "reward_aggregation",
                "there is one reward with a weight, so there is no sum: add another, or use "
                "sum_then_normalize",
            )

    @property
    def total_steps(self) -> int:
        """Rollout batches of the whole run."""
        return self.iterations * self.steps_per_iteration

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.total_steps * self.epochs * self.minibatches
