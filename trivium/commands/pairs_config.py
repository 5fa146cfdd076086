"""Configuration of ``trivium pairs``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from trivium.commands.sample_config import OutputConfig
from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import ASSISTANT_MARK, PromptsConfig
from trivium.hf.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling


class CandidateConfig(Configuration):
    """Columns of a row that hold a response and its score, or a list of each."""

    response: str = Field(min_length=1)
    """Column of the response's text, or a field in a column, as in `first_model.solution`."""
    score: str = Field(min_length=1)
    """Column or field of the response's score: true, false or a number; higher is better."""


class PairsConfig(OutputConfig):
    """Configuration of ``trivium pairs``."""

    data: PromptsConfig
    """Prompts to sample responses for, or the rows that hold the candidates."""
    model: ModelConfig | None = None
    """The model to sample from."""
    rewards: RewardConfigs = ()
    """Rewards that rank the sampled responses."""
    sampling: Sampling = Sampling()
    """How responses are sampled."""
    samples: int = Field(default=8, ge=2)
    """Responses per prompt."""
    keep_truncated: bool = False
    """Also use truncated responses. In the written pairs they look complete."""
    candidates: tuple[CandidateConfig, ...] = ()
    """Columns of the responses and scores in each row, instead of a model."""

    pairing: Literal["largest_gap", "best_random"] = "largest_gap"
    """Order of a prompt's pairs: largest_gap: by decreasing reward gap, so the first is the best
    against the worst response; best_random: the best against the others in random order."""
    pairs_per_prompt: int | None = Field(default=1, ge=1)
    """Maximum number of pairs per prompt, the first in this order; null: no limit."""
    minimum_gap: float = Field(default=0.0, ge=0)
    """Minimum reward gap between chosen and rejected; at 0 any difference is enough."""

    def conflicts(self) -> Iterator[Conflict]:
        if (self.model is None) == (not self.candidates):
            yield (
                "",
                "give either model (to sample the responses) or candidates (to read the responses "
                "from the rows)",
            )
        if self.model is not None and not self.rewards:
            yield "rewards", "it is empty: name the rewards that rank the sampled responses"
        if self.model is not None and self.sampling.greedy:
            yield "sampling.temperature", "identical responses make no pairs: raise it, 1 is usual"
        for name in self._sampling_settings() if self.candidates else []:
            yield name, "with candidates nothing is sampled, so it has no effect: leave it out"

    def _sampling_settings(self) -> list[str]:
        """Return the settings that differ from their default and apply only to sampling."""
        names = [
            name
            for name in ("rewards", "sampling", "samples", "keep_truncated", "budget")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.data.max_prompt_tokens is not None:
            names.append("data.max_prompt_tokens")
        if self.data.assistant_mark != ASSISTANT_MARK:
            names.append("data.assistant_mark")
        return names
