"""The configuration of a model: which checkpoint to load, and how (``hf.loading``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.config.paths import looked_up

FastPath = Literal["auto", "off"]
LayerName = Annotated[str, Field(min_length=1)]


class LoraConfig(Configuration):
    """Train low-rank adapters instead of all weights (Hu et al. 2022), through ``peft``."""

    rank: int = Field(default=16, ge=1)
    """Width of the adapters."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale of the adapters: their update is multiplied by alpha / rank."""
    targets: LayerName | Annotated[list[LayerName], Field(min_length=1)] = "all-linear"
    """Names of the linear layers that get adapters, or all-linear."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the adapters' initial values."""


class ModelConfig(Configuration):
    """Which checkpoint to load, and how."""

    path: str = Field(min_length=1)
    """A local directory or a hub name."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Data type of the weights that compute: auto is bfloat16 on a GPU that has it, else float32.
    bfloat16 weights are trained in mixed precision (optimizer.half_precision)."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:[0-9]+)?$")
    """Device of the model: auto (the first GPU, else the CPU), cpu, cuda, cuda:1, mps …"""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    fast_path: FastPath = "auto"
    """Faster implementations of the model's layers, equal up to rounding: auto (on a CPU), or off.
    With off, and on other devices, the layers are those of transformers."""
    cuda_graphs: bool = False
    """Sample with CUDA graphs: fewer kernel launches per token; off if a first check fails."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint; only for sources that you trust."""

    def inputs(self) -> Iterator[Path]:
        """Yield the checkpoint's directory, unless it is a hub name."""
        path = looked_up(self.path)
        if path.is_dir():
            yield path

    def conflicts(self) -> Iterator[Conflict]:
        if self.revision is not None and looked_up(self.path).is_dir():
            yield "revision", "the path is a local directory, which has none: leave revision out"
        if self.cuda_graphs and self.device.partition(":")[0] not in ("auto", "cuda"):
            yield "cuda_graphs", f"device {self.device} has no CUDA graphs: leave cuda_graphs out"


def scoring_model_conflicts(field: str, model: ModelConfig | None) -> Iterator[Conflict]:
    """Yield settings for sampling of a model that never samples."""
    if model is not None and model.cuda_graphs:
        yield f"{field}.cuda_graphs", "this model does not sample: leave it out"
