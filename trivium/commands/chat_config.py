"""What ``trivium chat`` depends on."""

from __future__ import annotations

from pydantic import Field, field_validator

from trivium.config.base import Configuration
from trivium.config.paths import looked_up
from trivium.models.model_config import ModelConfig
from trivium.rollout.sampling import Sampling

LINE = "{line}"


class ChatConfig(Configuration):
    """Whom to talk to, and how it answers."""

    model: ModelConfig
    """The model; of a run's directory, its final one."""
    sampling: Sampling = Sampling(temperature=0.7)
    """How responses are drawn."""
    system: str | None = None
    """The system message of the conversation."""
    template: str | None = None
    """Without a chat template: the prompt made of a line, as in "Question: {line}\\nAnswer:"."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides what is drawn."""

    @field_validator("template")
    @classmethod
    def _holds_line(cls, template: str | None) -> str | None:
        if template is not None and LINE not in template:
            raise ValueError("write {line} where the line that you type belongs")
        return template

    def checkpoint(self) -> ModelConfig:
        """The model; of a run's directory, its final one."""
        path = looked_up(self.model.path)
        if (path / "run.json").is_file() and (path / "final").is_dir():
            return self.model.model_copy(update={"path": str(path / "final")})
        return self.model
