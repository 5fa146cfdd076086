"""Configuration of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trivium.config.base import Configuration, Conflict

Decay = Annotated[float, Field(ge=0, lt=1)]
_BETAS = (0.9, 0.999)
_ALPHA = 0.99
"""PyTorch's default, and the reference DPO code's."""


class OptimizerConfig(Configuration):
    """The optimizer, its schedule and gradient clipping."""

    kind: Literal["adamw", "adam", "rmsprop"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019), Adam (Kingma & Ba 2015) or RMSprop (Tieleman & Hinton
    2012)."""
    learning_rate: float = Field(default=1e-5, gt=0, le=1000)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate decays after warm-up, down to min_lr_ratio of the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the rate rises linearly to its peak."""
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """The same as a share of the run's optimizer steps, rounded up."""
    warmup_start_ratio: float | None = Field(default=None, ge=0, le=1)
    """Rate of the first step of the warm-up, as a share of the peak; null: one part of as many as
    the warm-up has steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final rate of linear and cosine, as a share of the peak."""
    betas: tuple[Decay, Decay] = _BETAS
    """Decay rates of the two moments of adamw and adam."""
    alpha: Decay = _ALPHA
    """Decay rate of the mean square of gradients in rmsprop."""
    epsilon: float = Field(default=1e-8, gt=0)
    """ε, which is added to the root that divides an update."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, on matrices only (not on biases and norms): decoupled in adamw, added to the
    gradient in adam and rmsprop."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest global norm of the gradient; larger gradients are scaled down to it."""
    half_precision: Literal["master_weights", "stochastic_rounding"] = "master_weights"
    """How weights of model.dtype bfloat16 are updated: on float32 copies, or rounded
    stochastically, which needs 6 bytes per weight less and is noisier (docs/memory.md)."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.min_lr_ratio and self.schedule == "constant":
            yield "min_lr_ratio", "a constant rate does not decay: set schedule to linear or cosine"
        if self.warmup_steps and self.warmup_ratio:
            yield (
                "warmup_ratio",
                f"warmup_steps = {self.warmup_steps} gives the length of the warm-up too: keep one "
                "of them",
            )
        if self.warmup_start_ratio is not None and not (self.warmup_steps or self.warmup_ratio):
            yield (
                "warmup_start_ratio",
                "there is no warm-up to start: set warmup_steps or warmup_ratio, or leave it out",
            )
        if self.kind == "rmsprop" and self.betas != _BETAS:
            yield "betas", "rmsprop has one decay rate, alpha: set that instead"
        if self.kind != "rmsprop" and self.alpha != _ALPHA:
            yield "alpha", f"it goes with kind: rmsprop, and {self.kind} has betas: set these"

    def warmup_length(self, total_steps: int) -> int:
        """Return the number of steps of the warm-up in a run of ``total_steps``."""
        share = round(self.warmup_ratio * total_steps, 9)  # 0.07 · 100 is above 7 in binary.
        return self.warmup_steps or math.ceil(share)
