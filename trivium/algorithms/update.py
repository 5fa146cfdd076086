"""One optimiser step: micro-batches, accumulated gradients, clipping, schedule.

The loss of a micro-batch is a plain sum, weighted by the step-wide weights of ``maths.weights``,
so adding up the micro-batches' gradients gives the gradient of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from trivium.algorithms.micro_batch import Learned, MicroBatch, accumulate
from trivium.config import Configuration
from trivium.errors import NonFiniteError, TrainingError
from trivium.models.scoring import out_of_memory
from trivium.runs.study import Evidence, Seen, first_fault


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


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step saw: loss, gradient norm before clipping, learning rate, and the
    per-token or per-response observations of all micro-batches, concatenated; and how many
    micro-batches were halved because they did not fit the memory."""

    loss: float
    gradient_norm: float
    learning_rate: float
    observed: dict[str, Tensor]
    splits: int = 0


def rate_share(
    config: OptimizerConfig, step: int, total_steps: int, budget_spent: float = 0.0
) -> float:
    """Share of the peak learning rate at optimiser step ``step`` (from 0) of ``total_steps``.

    ``budget_spent`` is the share of the run's budget that is: it may end the run before its steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    done = min(max(done, budget_spent), 1.0)
    fall = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final_share + (1 - config.final_share) * fall


class Optimizer:
    """AdamW over named sets of parameters, each with a configuration and clipping of its own."""

    def __init__(
        self,
        sets: Sequence[tuple[OptimizerConfig, Sequence[nn.Parameter]]],
        total_steps: int,
        budget_spent: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.sets = [(config, list(parameters)) for config, parameters in sets]
        self.total_steps = total_steps
        self.budget_spent = budget_spent
        self.steps = 0
        groups = [
            group for config, parameters in self.sets for group in _groups(config, parameters)
        ]
        self.adamw = torch.optim.AdamW(groups)

    def step(self, work: Sequence[MicroBatch]) -> StepResult:
        """Accumulate the gradients of all micro-batches, clip, and move the parameters once.

        Raises:
            NonFiniteError: the loss or a gradient norm is not finite; nothing was moved.
            TrainingError: there is no micro-batch, or memory is too small for a single response.
        """
        if not work:
            raise TrainingError("an optimiser step got no micro-batch: there is nothing to learn")
        done, splits = accumulate(work, lambda: self.adamw.zero_grad(set_to_none=True))
        total = sum(learned.loss for learned in done)
        norms = [self._clip(config, parameters) for config, parameters in self.sets]
        if not all(map(math.isfinite, (total, *norms))):
            raise self._not_finite(total, norms, done)
        rate = self._set_rates()
        self._move()
        self.steps += 1
        seen = [learned.observed for learned in done]
        names = dict.fromkeys(name for observed in seen for name in observed)
        joined = {name: torch.cat([o[name] for o in seen if name in o]) for name in names}
        return StepResult(total, norms[0], rate, joined, splits)

    def _move(self) -> None:
        try:
            self.adamw.step()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(
                f"memory ran out while the optimiser moved the weights at its step {self.steps} "
                f"({str(error).strip().splitlines()[0]:.200}), so some of them may have moved: go "
                "on from the last checkpoint with less memory in use (model.lora, "
                "model.dtype: bfloat16, a separate critic left out)"
            ) from None

    def _not_finite(
        self, total: float, norms: list[float], done: Sequence[Learned]
    ) -> NonFiniteError:
        seen = [Seen.of(x.micro_batch.part, x.observed, x.loss) for x in done]
        evidence = Evidence(self.steps, norms, seen)
        of_sets = " and ".join(map(str, norms))
        return NonFiniteError(
            f"at optimiser step {self.steps} the loss is {total} and the gradient norm {of_sets}; "
            f"no weight was moved. {first_fault(evidence)}",
            evidence,
        )

    def _clip(self, config: OptimizerConfig, parameters: list[nn.Parameter]) -> float:
        return float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))

    def _set_rates(self) -> float:
        done = self.budget_spent()
        for group in self.adamw.param_groups:
            config = group["config"]
            share = rate_share(config, self.steps, self.total_steps, done)
            group["lr"] = config.learning_rate * share
        return float(self.adamw.param_groups[0]["lr"])


def _groups(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    shared = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "eps": config.epsilon,
        "config": config,
    }
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, **shared},
        {"params": vectors, "weight_decay": 0.0, **shared},
    ]
    return [group for group in groups if group["params"]]
