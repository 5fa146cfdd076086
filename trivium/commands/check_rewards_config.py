"""Configuration of ``trivium check-rewards``: the parts of another command's that it reads."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ConfigDict

from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.hf.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs


class ScoredConfig(Configuration):
    """Prompts and the rewards of their responses; other keys are left to their own command."""

    model_config = ConfigDict(extra="ignore")

    data: PromptsConfig | None = None
    """Prompts whose responses are scored."""
    rewards: RewardConfigs = ()
    """Rewards to check."""


class CheckRewardsConfig(ScoredConfig):
    """Configuration of ``trivium check-rewards``."""

    model: ModelConfig | None = None
    """The policy, whose tokenizer rewards with tokens and learned rewards need."""
    online: ScoredConfig | None = None
    """Prompts and rewards of online DPO."""

    @property
    def scored(self) -> tuple[PromptsConfig | None, RewardConfigs]:
        """Prompts and rewards, those of `online` if it has any."""
        section = self.online if self.online is not None else self
        return section.data, section.rewards

    def conflicts(self) -> Iterator[Conflict]:
        data, rewards = self.scored
        if not rewards:
            yield "rewards", "there is no reward to check: give at least one under `rewards`"
        if data is None:
            yield "data", "there are no prompts: give their file under `data`"
