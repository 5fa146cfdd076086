"""Configuration of ``reward_update``, which trains the learned reward further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.rewards.reward_config import LEARNED, RewardConfig
from trivium.training.optimizer_config import OptimizerConfig


class RewardUpdateConfig(Configuration):
    """Further training of the learned reward."""

    labeler: RewardConfig
    """Reward that labels responses, or their steps for a process reward model."""
    every: int = Field(default=10, ge=1)
    """Rollout batches between updates in PPO; GRPO updates once per iteration."""
    examples: int = Field(default=512, ge=1)
    """Fresh pairs (or step-labeled responses) used per update, at most."""
    replay: float = Field(default=0.1, ge=0)
    """Number of replayed earlier examples, as a share of the fresh ones."""
    examples_per_step: int = Field(default=64, ge=1)
    """Examples per optimizer step."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each update's examples."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """The reward model's optimizer."""
    center: float = Field(default=0.01, ge=0)
    """Weight of (s_w + s_l)², which keeps outcome scores near 0."""
    tokens_per_micro_batch: int = Field(default=16384, ge=1)
    """Memory bound: tokens per forward and backward pass."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.optimizer.schedule != "constant":
            yield (
                "optimizer.schedule",
                "the number of updates is not known in advance: use constant",
            )
        if self.optimizer.warmup_ratio:
            yield (
                "optimizer.warmup_ratio",
                "the number of updates is not known in advance: set optimizer.warmup_steps",
            )
        if self.labeler.function in LEARNED:
            yield (
                "labeler.function",
                "a learned reward cannot label for itself: name a verifier or your own function",
            )


def learned_reward_conflicts(rewards: Sequence[RewardConfig]) -> Iterator[Conflict]:
    """Yield a conflict unless the rewards hold exactly one learned reward, which is trained."""
    learned = [reward for reward in rewards if reward.function in LEARNED]
    if len(learned) != 1:
        yield (
            "reward_update",
            f"it trains the learned reward, but rewards names {len(learned)} of them: name exactly "
            f"one with function: {' or '.join(LEARNED)}",
        )
