"""Configuration of the evaluation on held-out prompts. ``evaluator`` runs it."""

from __future__ import annotations

from pydantic import Field

from trivium.config.base import Configuration
from trivium.data.prompts import PromptsConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling, StopTexts, StopTokens

MAX_TOKENS = 256


class EvaluationConfig(Configuration):
    """Held-out evaluation during training and at the end."""

    data: PromptsConfig
    """Held-out prompts."""
    rewards: RewardConfigs = ()
    """Rewards that measure quality; the training rewards if empty."""
    every: int = Field(default=0, ge=0)
    """Number of training steps between evaluations; 0: only at the start and at the end."""
    at_start: bool = True
    """Also evaluate before the first step. Win rates compare with this evaluation."""
    prompts: int | None = Field(default=None, ge=1)
    """Number of prompts to use; all by default."""
    samples: int = Field(default=1, ge=1)
    """Number of sampled responses per prompt, in addition to the greedy response."""
    pass_threshold: float | None = None
    """Smallest reward of a response that passes, for pass@k. By default pass@k is measured only if
    every reward is 0 or 1."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Length limit of the responses; by default the limit of the run's sampling, or 256."""
    stop: StopTexts | None = None
    """Texts that end a response; by default those of the run's sampling."""
    stop_tokens: StopTokens | None = None
    """Token ids that end a response; by default those of the run's sampling."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Seed of the sampled responses, the same at every evaluation."""

    def sampling(self, training: Sampling | None) -> Sampling:
        """Return how responses end: as in training, unless these fields override it.

        Temperature and filters are not taken from training, so the unmodified policy is measured.
        """
        training = Sampling(max_tokens=MAX_TOKENS) if training is None else training
        return Sampling(
            max_tokens=training.max_tokens if self.max_tokens is None else self.max_tokens,
            stop=training.stop if self.stop is None else self.stop,
            stop_tokens=training.stop_tokens if self.stop_tokens is None else self.stop_tokens,
        )
