"""Configuration of ``trivium chat``."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from trivium.config.base import Configuration
from trivium.config.paths import looked_up
from trivium.hf.model_config import ModelConfig
from trivium.rollout.sampling import Sampling

LINE = "{line}"


class ChatConfig(Configuration):
    """Configuration of ``trivium chat``."""

    model: ModelConfig
    """The model. For a run's directory, its final model."""
    sampling: Sampling = Sampling(temperature=0.7)
    """How responses are sampled."""
    system: str | None = None
    """The system message of the conversation."""
    template_arguments: dict[str, Any] | None = None
    """Variables for the chat template, as in {enable_thinking: false}."""
    template: str | None = None
    """Prompt made from each input line, for models without a chat template, as in
    "Question: {line}\\nAnswer:"."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the sampled responses."""

    @field_validator("template")
    @classmethod
    def _holds_line(cls, template: str | None) -> str | None:
        if template is not None and LINE not in template:
            raise ValueError("write {line} where the input line belongs")
        return template

    def checkpoint(self) -> ModelConfig:
        """Return the model. For a run's directory, return its final model."""
        path = looked_up(self.model.path)
        if (path / "run.json").is_file() and (path / "final").is_dir():
            return self.model.model_copy(update={"path": str(path / "final")})
        return self.model
