"""How a run is evaluated on held-out prompts; measuring is for ``evaluate``."""

from __future__ import annotations

from pydantic import Field

from trivium.config.base import Configuration
from trivium.data.prompts import PromptsConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling, StopTexts, StopTokens

MAX_TOKENS = 256


class EvaluationConfig(Configuration):
    """Held-out evaluation while training and at its end."""

    data: PromptsConfig
    """Held-out prompts."""
    rewards: RewardConfigs = ()
    """What quality is; the training rewards if empty."""
    every: int = Field(default=0, ge=0)
    """Evaluate after every so many training steps; 0: only at the start and at the end."""
    at_start: bool = True
    """Evaluate before the first step too: what win rates compare with."""
    prompts: int | None = Field(default=None, ge=1)
    """How many of the prompts are used; all by default."""
    samples: int = Field(default=1, ge=1)
    """Sampled responses per prompt, besides the greedy one."""
    pass_threshold: float | None = None
    """A response passes, for pass@k, with at least this reward; by default pass@k is measured
    where every reward is 0 or 1."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Length limit of the responses; that of the run's sampling by default, or 256."""
    stop: StopTexts | None = None
    """Texts that end a response; those of the run's sampling by default."""
    stop_tokens: StopTokens | None = None
    """Token ids that end a response; those of the run's sampling by default."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Seed of the sampled responses; the same at every evaluation."""

    def sampling(self, training: Sampling | None) -> Sampling:
        """How responses end: as in training, but for what is set here; the policy as it is."""
        training = Sampling(max_tokens=MAX_TOKENS) if training is None else training
        return Sampling(
            max_tokens=training.max_tokens if self.max_tokens is None else self.max_tokens,
            stop=training.stop if self.stop is None else self.stop,
            stop_tokens=training.stop_tokens if self.stop_tokens is None else self.stop_tokens,
        )
