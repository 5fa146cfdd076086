"""What ``trivium sample`` depends on, and what every command that writes rows does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, field_validator

from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.models.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling
from trivium.runs.budget import BudgetConfig


class OutputConfig(Configuration):
    """A file of rows that a command writes."""

    output: Path
    """The .jsonl file to write; it appears when it is complete."""
    overwrite: bool = False
    """Replace the file if it is there, instead of refusing to start."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides every random choice."""
    budget: BudgetConfig | None = None
    """Stop sampling when so much is spent, even with prompts left."""

    @field_validator("output")
    @classmethod
    def _jsonl(cls, output: Path) -> Path:
        if output.suffix != ".jsonl":
            raise ValueError(f"write a name that ends in .jsonl, such as {output.stem}.jsonl")
        return output


class SampleConfig(OutputConfig):
    """Everything a file of responses depends on."""

    model: ModelConfig
    """The model to sample from."""
    data: PromptsConfig
    """Prompts."""
    rewards: RewardConfigs = ()
    """Score each response."""
    sampling: Sampling = Sampling()
    """How responses are drawn."""
    samples: int = Field(default=1, ge=1)
    """Responses per prompt."""
    minimum_reward: float | None = None
    """Write only responses with at least this reward, as for fine-tuning on one's best samples."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.sampling.greedy and self.samples > 1:
            yield (
                "samples",
                "sampling.temperature is 0, so all samples of a prompt would be the same: set "
                "samples to 1 or raise the temperature",
            )
        if self.minimum_reward is not None and not self.rewards:
            yield "minimum_reward", "it needs rewards: name what scores the responses"
