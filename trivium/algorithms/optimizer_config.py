"""The optimiser's settings, which ``update`` follows."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from trivium.config import Configuration


class OptimizerConfig(Configuration):
    """AdamW (Loshchilov & Hutter 2019), its schedule and gradient clipping."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after warm-up, down to final_share of the peak."""
    warmup_steps: int = 0
    """Optimiser steps over which the rate rises linearly from 0."""
    final_share: float = 0.0
    """Share of the peak rate that linear and cosine end at."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    epsilon: float = 1e-8
    """AdamW's ε."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (not on biases and norms)."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""

    @model_validator(mode="after")
    def _in_range(self) -> OptimizerConfig:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: it must be positive")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}: it must be positive")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not 0 <= self.final_share <= 1:
            raise ValueError(
                "warmup_steps and weight_decay must be ≥ 0 and final_share in [0, 1], got "
                f"{self.warmup_steps}, {self.weight_decay} and {self.final_share}"
            )
        return self
