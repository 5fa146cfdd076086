"""Configuration of the pretraining mix of PPO-ptx, which ``pretraining`` applies."""

from __future__ import annotations

from pydantic import Field

from trivium.config.base import Configuration
from trivium.data.demonstrations import DemonstrationsConfig


class PretrainingMixConfig(Configuration):
    """Demonstrations or plain text whose likelihood is maintained while PPO runs."""

    data: DemonstrationsConfig
    """The texts."""
    coefficient: float = Field(default=1.0, gt=0)
    """Weight of the language-modeling loss, a mean over tokens."""
    examples_per_step: int = Field(default=16, ge=1)
    """Texts per optimizer step."""
