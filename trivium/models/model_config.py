"""Which checkpoint is loaded, and how; loading it is for ``loading``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.config.paths import looked_up

LayerName = Annotated[str, Field(min_length=1)]


class LoraConfig(Configuration):
    """Train low-rank adapters instead of all weights (Hu et al. 2022), through ``peft``."""

    rank: int = Field(default=16, ge=1)
    """Width of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Their scale: the update is multiplied by alpha / rank."""
    targets: LayerName | Annotated[list[LayerName], Field(min_length=1)] = "all-linear"
    """Names of the linear layers that get adapters, or all-linear."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the adapters' initial values."""


class ModelConfig(Configuration):
    """Which checkpoint to load, and how."""

    path: str = Field(min_length=1)
    """A local directory or a hub name."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of the weights and of the arithmetic."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:[0-9]+)?$")
    """Where the model lives: auto (the first GPU, else the CPU), cpu, cuda, cuda:1, mps …"""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    cuda_graphs: bool = False
    """Sample by CUDA graphs: fewer calls per token. Checked first, and left where they fail."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Only for sources you trust."""

    def inputs(self) -> Iterator[Path]:
        """The checkpoint's directory; of a hub name there is none."""
        path = looked_up(self.path)
        if path.is_dir():
            yield path

    def conflicts(self) -> Iterator[Conflict]:
        if self.revision is not None and looked_up(self.path).is_dir():
            yield "revision", "the path is a local directory, which has none: leave revision out"
        if self.cuda_graphs and self.device.partition(":")[0] not in ("auto", "cuda"):
            yield "cuda_graphs", f"device {self.device} has no CUDA graphs: leave cuda_graphs out"


def only_scores(field: str, model: ModelConfig | None) -> Iterator[Conflict]:
    """What a model in this field is asked for, though it never samples."""
    if model is not None and model.cuda_graphs:
        yield f"{field}.cuda_graphs", "this model does not sample: leave it out"
