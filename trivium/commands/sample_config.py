"""Configuration of ``trivium sample``, and the settings of all commands that write rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, field_validator

from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.hf.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling
from trivium.runs.budget import BudgetConfig


class OutputConfig(Configuration):
    """Settings of a command that writes a file of rows."""

    output: Path
    """The .jsonl file to write. It appears only when it is complete."""
    overwrite: bool = False
    """Replace the output file if it exists; false: an existing file is an error."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every random choice."""
    budget: BudgetConfig | None = None
    """Budget after which sampling stops, even if prompts are left."""

    @field_validator("output")
    @classmethod
    def _jsonl(cls, output: Path) -> Path:
        if output.suffix != ".jsonl":
            raise ValueError(f"write a name that ends in .jsonl, such as {output.stem}.jsonl")
        return output


class SampleConfig(OutputConfig):
    """Configuration of ``trivium sample``."""

    model: ModelConfig
    """The model to sample from."""
    data: PromptsConfig
    """Prompts to sample responses for."""
    rewards: RewardConfigs = ()
    """Rewards that score each response."""
    sampling: Sampling = Sampling()
    """How responses are sampled."""
    samples: int = Field(default=1, ge=1)
    """Responses per prompt."""
    minimum_reward: float | None = None
    """Write only responses with at least this reward, as for rejection-sampling fine-tuning."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.sampling.greedy and self.samples > 1:
            yield (
                "samples",
                "sampling.temperature is 0, so all samples of a prompt would be the same: set "
                "samples to 1 or raise the temperature",
            )
        if self.minimum_reward is not None and not self.rewards:
            yield "minimum_reward", "it needs rewards: name what scores the responses"
