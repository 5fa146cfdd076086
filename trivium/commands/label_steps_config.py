"""Configuration of ``trivium label-steps``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.commands.sample_config import OutputConfig
from trivium.config.base import Conflict
from trivium.data.prompts import PromptsConfig
from trivium.hf.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs, scores_steps
from trivium.rollout.sampling import Sampling


class LabelStepsConfig(OutputConfig):
    """Configuration of ``trivium label-steps``."""

    model: ModelConfig
    """The model that completes the solutions."""
    data: PromptsConfig
    """Prompts, with their solutions in the column `completion` (a text or a list of texts)."""
    solutions: int | None = Field(default=None, ge=1)
    """Solutions to sample from the model per prompt; null: read them from the data."""
    rewards: RewardConfigs = Field(min_length=1)
    """Rewards that decide whether a completed solution is right."""
    pass_threshold: float | None = None
    """Minimum reward of a right solution; null: every reward must be 0 or 1."""
    completions: int = Field(default=8, ge=1)
    """Completions to sample from the end of each step."""
    labels: Literal["hard", "soft"] = "hard"
    """Label of a step: hard: whether any of its completions is right; soft: the share of them."""
    separator: str = Field(default="\n", min_length=1)
    """Text between two steps of a solution."""
    sampling: Sampling = Sampling()
    """How solutions and completions are sampled."""

    def conflicts(self) -> Iterator[Conflict]:
        several = {"completions": self.completions, "solutions": self.solutions or 1}
        for name in [name for name, count in several.items() if count > 1]:
            if self.sampling.greedy:
                yield (
                    name,
                    f"sampling.temperature is 0, so all {name} would be the same: raise it, 1 is "
                    f"usual, or set {name} to 1",
                )
        for reward in self.rewards:
            if scores_steps(reward):
                yield (
                    "rewards",
                    f"{reward.function} scores steps, and the labels come from whole solutions: "
                    "name a reward of the final answer, such as gsm8k or math",
                )
