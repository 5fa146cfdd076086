"""The configuration of a model: which checkpoint to load, and how (``hf.loading``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.config.paths import looked_up
from trivium.hf.checkpoint_files import adapter_at, holds_only_adapters

FastPath = Literal["auto", "off"]
LayerName = Annotated[str, Field(min_length=1)]


class LoraConfig(Configuration):
    """Train low-rank adapters instead of all weights (Hu et al. 2022), through ``peft``."""

    rank: int = Field(default=16, ge=1)
    """Width of the adapters."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the adapters: their update is multiplied by alpha / rank. The default is twice the
    rank; with rslora it is 8."""
    rslora: bool = False
    """Multiply the update by alpha / sqrt(rank) instead, which keeps its size at any rank
    (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each column of the weights apart from its direction (Liu et al. 2024)."""
    targets: LayerName | Annotated[list[LayerName], Field(min_length=1)] = "all-linear"
    """Names of the linear layers that get adapters, or all-linear."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the adapters' initial values."""
    initial: Literal["new", "loaded"] = "new"
    """With an adapter directory as model.path: add new adapters to its base, into which its own are
    merged first (new), or train its own further, with their rank, alpha and targets (loaded)."""
    save: Literal["adapter", "merged", "both"] | None = None
    """Form of a saved model: the adapters alone (adapter), weights with the adapters merged into
    them (merged), or these and the adapters, in adapter/ (both). The default is both, or merged if
    the adapters belong to a base with merged adapters, which is not on the disk."""
    merged_dtype: Literal["auto", "base", "float32"] = "auto"
    """Data type of merged weights: that of the base (base), float32, or the base's only if
    rounding to it leaves the log-probs of a probe as trained, else float32 (auto)."""

    @property
    def scale_numerator(self) -> float:
        """The value of alpha: at rank 16 both defaults multiply the update by 2."""
        if self.alpha is not None:
            return self.alpha
        return 8.0 if self.rslora else 2.0 * self.rank

    def conflicts(self) -> Iterator[Conflict]:
        if self.initial == "loaded":
            for name in ("rank", "alpha", "rslora", "dora", "targets", "seed"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    yield name, "initial: loaded takes it from the adapters: leave it out"
        if self.save == "adapter" and self.merged_dtype != "auto":
            yield "merged_dtype", "save: adapter merges nothing: leave merged_dtype out"


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
        """Yield the checkpoint's directory, unless it is a hub name, and that of its base."""
        path = looked_up(self.path)
        if path.is_dir():
            yield path
            adapter = adapter_at(self.path)
            if adapter is not None and looked_up(adapter.base).is_dir():
                yield looked_up(adapter.base)

    def conflicts(self) -> Iterator[Conflict]:
        if self.revision is not None and looked_up(self.path).is_dir():
            yield "revision", "the path is a local directory, which has none: leave revision out"
        if self.lora is not None:
            adapted = holds_only_adapters(looked_up(self.path))
            if self.lora.initial == "loaded" and not adapted:
                yield "lora.initial", f"{self.path} is no directory of adapters: leave initial out"
            if self.lora.initial == "new" and adapted and self.lora.save in ("adapter", "both"):
                yield (
                    "lora.save",
                    "the adapters' base would be the base of model.path with its adapters merged, "
                    "which is not on the disk: write save: merged, or name a merged checkpoint as "
                    "the path",
                )
        if self.cuda_graphs and self.device.partition(":")[0] not in ("auto", "cuda"):
            yield "cuda_graphs", f"device {self.device} has no CUDA graphs: leave cuda_graphs out"


def scoring_model_conflicts(field: str, model: ModelConfig | None) -> Iterator[Conflict]:
    """Yield settings for sampling of a model that never samples."""
    if model is not None and model.cuda_graphs:
        yield f"{field}.cuda_graphs", "this model does not sample: leave it out"
