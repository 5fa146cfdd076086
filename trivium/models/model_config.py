"""Which checkpoint is loaded, and how; loading it is for ``loading``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from trivium.config import Configuration
from trivium.paths import looked_up


class LoraConfig(Configuration):
    """Train low-rank adapters instead of all weights (Hu et al. 2022), through ``peft``."""

    rank: int = 16
    """Width of the adapters."""
    alpha: float = 32.0
    """Their scale: the update is multiplied by alpha / rank."""
    targets: str | list[str] = "all-linear"
    """Names of the linear layers that get adapters, or all-linear."""
    seed: int = 0
    """Decides the adapters' initial values."""


class ModelConfig(Configuration):
    """Which checkpoint to load, and how."""

    path: str
    """A local directory or a hub name."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights and of the arithmetic."""
    device: str = "auto"
    """Where the model lives: auto (the first GPU, else the CPU), cpu, cuda, cuda:1, mps …"""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for sources you trust."""

    def inputs(self) -> Iterator[Path]:
        """The checkpoint's directory; of a hub name there is none."""
        path = looked_up(self.path)
        if path.is_dir():
            yield path
