"""What ``trivium pairs`` depends on."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from trivium.commands.sample_config import OutputConfig
from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import ASSISTANT_MARK, PromptsConfig
from trivium.models.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling


class CandidateConfig(Configuration):
    """Where a row holds a response, or a list of them, and how good it is."""

    response: str = Field(min_length=1)
    """The column of the response's text, or a field in a column, as in `first_model.solution`."""
    score: str = Field(min_length=1)
    """The column or field of its score: true, false or a number; the higher the better."""


class PairsConfig(OutputConfig):
    """Everything a file of preference pairs depends on."""

    data: PromptsConfig
    """Prompts to sample from, or the rows that hold the candidates."""
    model: ModelConfig | None = None
    """The model to sample from."""
    rewards: RewardConfigs = ()
    """What ranks the sampled responses."""
    sampling: Sampling = Sampling()
    """How responses are drawn."""
    samples: int = Field(default=8, ge=2)
    """Responses per prompt."""
    keep_truncated: bool = False
    """Use responses that the length limit cut off too; read back, they will seem complete."""
    candidates: tuple[CandidateConfig, ...] = ()
    """Instead of a model: where each row holds its responses and their scores."""

    pairs_per_prompt: int | None = Field(default=1, ge=1)
    """At most so many pairs per prompt, those with the widest gap first; null: all there are."""
    minimum_gap: float = Field(default=0.0, ge=0)
    """How much better the chosen response must be; at 0 any difference will do."""

    def conflicts(self) -> Iterator[Conflict]:
        if (self.model is None) == (not self.candidates):
            yield (
                "",
                "give either model (to sample the responses) or candidates (the responses that the "
                "rows hold)",
            )
        if self.model is not None and not self.rewards:
            yield "rewards", "it is empty: name what ranks the sampled responses"
        if self.model is not None and self.sampling.greedy:
            yield "sampling.temperature", "equal responses make no pairs: raise it, 1 is usual"
        for name in self._without_effect() if self.candidates else []:
            yield name, "with candidates nothing is sampled, so it has no effect: leave it out"

    def _without_effect(self) -> list[str]:
        """What is set but needs the model that candidates do without."""
        mine = [
            name
            for name in ("rewards", "sampling", "samples", "keep_truncated", "budget")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if self.data.max_prompt_tokens is not None:
            mine.append("data.max_prompt_tokens")
        if self.data.assistant_mark != ASSISTANT_MARK:
            mine.append("data.assistant_mark")
        return mine
