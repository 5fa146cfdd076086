"""What ``trivium evaluate`` depends on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, field_validator

from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import MAX_TOKENS
from trivium.models.model_config import ModelConfig, only_scores
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import StopTexts, StopTokens


class EvaluateConfig(Configuration):
    """Everything an evaluation depends on."""

    model: ModelConfig
    """The model to evaluate."""
    reference: ModelConfig | None = None
    """Where the KL divergence is measured from; without it none is measured."""
    data: PromptsConfig
    """Held-out prompts."""
    rewards: RewardConfigs = Field(min_length=1)
    """What quality is: a weighted sum."""
    samples: int = Field(default=1, ge=1)
    """Sampled responses per prompt, besides the greedy one."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of the sampled responses, and of both models in the KL divergence."""
    max_tokens: int = Field(default=MAX_TOKENS, ge=1)
    """Length limit of the responses."""
    stop: StopTexts = ()
    """Texts that end a response."""
    stop_tokens: StopTokens = ()
    """Token ids that end a response, besides the model's own EOS."""
    pass_threshold: float | None = None
    """A response passes, for pass@k, with at least this reward; by default pass@k is measured
    where every reward is 0 or 1."""
    seed: int = Field(default=1, ge=0, lt=2**63)
    """Seed of the sampled responses."""
    output: Path | None = None
    """A .json file to write the numbers to."""
    overwrite: bool = False
    """Replace the file if it is there, instead of refusing to start."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from only_scores("reference", self.reference)

    @field_validator("output")
    @classmethod
    def _json(cls, output: Path | None) -> Path | None:
        if output is not None and output.suffix != ".json":
            raise ValueError(f"write a name that ends in .json, such as {output.stem}.json")
        return output
