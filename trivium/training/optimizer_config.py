"""Configuration of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Configuration):
    """AdamW (Loshchilov & Hutter 2019), its schedule and gradient clipping."""

    learning_rate: float = Field(default=1e-5, gt=0, le=1000)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate decays after warm-up, down to min_lr_ratio of the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises linearly to its peak."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final rate of linear and cosine, as a share of the peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's ε."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, on matrices only (not on biases and norms)."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient; larger gradients are scaled down to it."""
    half_precision: Literal["master_weights", "stochastic_rounding"] = "master_weights"
    """How weights of model.dtype bfloat16 are updated: on float32 copies, or rounded
    stochastically, which needs 6 bytes per weight less and is noisier (docs/memory.md)."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.min_lr_ratio and self.schedule == "constant":
            yield "min_lr_ratio", "a constant rate does not decay: set schedule to linear or cosine"
