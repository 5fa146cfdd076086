"""One optimizer step: micro-batches, accumulated gradients, clipping, schedule.

The loss of a micro-batch is a sum with the step-wide token weights of ``maths.aggregation``, so the
micro-batches' gradients add up to the gradient of the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from trivium.data.oom import is_out_of_memory
from trivium.errors import ConfigurationError, NonFiniteError, TrainingError
from trivium.runs.nonfinite import (
    MicroBatchRecord,
    NonFiniteReport,
    describe_first_nonfinite,
)
from trivium.serialization import serializable
from trivium.training.ema import WeightAverage
from trivium.training.master_weights import MasterWeights, StochasticRounding, is_half
from trivium.training.micro_batch import (
    MicroBatch,
    MicroBatchResult,
    accumulate_on_all_ranks,
)
from trivium.training.optimizer_config import OptimizerConfig
from trivium.training.weight_sample import WeightSample


@serializable
@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step.

    Attributes:
        loss: the loss.
        gradient_norm: the gradient's norm before clipping, of the first set of parameters.
        learning_rate: the rate of the first set of parameters.
        observed: observations of all micro-batches, concatenated.
        splits: micro-batches that were split because they did not fit in memory.
        weights: how far the first set moved, by metric (``training.weight_sample``).
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    observed: dict[str, Tensor]
    splits: int = 0
    weights: dict[str, float] = field(default_factory=dict)


def lr_multiplier(
    config: OptimizerConfig, step: int, total_steps: int, budget_spent: float = 0.0
) -> float:
    """Return the learning rate at optimizer step ``step`` (from 0), as a share of its peak.

    ``budget_spent`` is the spent share of the run's budget, which may end the run before
    ``total_steps``.
    """
    warmup = config.warmup_length(total_steps)
    if step < warmup:
        start = config.warmup_start_ratio
        start = 1 / warmup if start is None else start
        return start + (1 - start) * step / max(1, warmup - 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total_steps - warmup)
    progress = min(max(progress, budget_spent), 1.0)
    linear = config.schedule == "linear"
    decay = 1 - progress if linear else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay


ParameterSet = tuple[OptimizerConfig, Sequence[nn.Parameter]]
"""Parameters with their own configuration and gradient clipping."""


class Optimizer:
    """Sets of parameters, each with its own configuration and gradient clipping.

    The moments are float32 or wider. Half-precision weights have float32 copies, which are updated
    and rounded into the weights, or are rounded stochastically (``training.master_weights``). After
    each step the weights enter ``average``, if there is one.

    Raises:
        ConfigurationError: stochastic rounding is asked for, and no weight has half precision.
    """

    def __init__(
        self,
        sets: Sequence[ParameterSet],
        total_steps: int,
        budget_spent: Callable[[], float] = lambda: 0.0,
        average: WeightAverage | None = None,
    ) -> None:
        stochastic = _rounds_stochastically(sets)
        trained = [p for _, parameters in sets for p in parameters]
        self.masters = MasterWeights([] if stochastic else trained)
        self.sets = [
            (config, [self.masters.of.get(p, p) for p in parameters]) for config, parameters in sets
        ]
        self.total_steps = total_steps
        self.budget_spent = budget_spent
        self.average = average
        self.steps = 0
        self.by_kind = {
            kind: _torch_optimizer(kind, self.sets, stochastic=stochastic)
            for kind in dict.fromkeys(config.kind for config, _ in sets)
        }

    def step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """Accumulate the gradients of all micro-batches, clip them, and update the parameters once.

        Raises:
            NonFiniteError: the loss or a gradient norm is not finite; no weight was changed.
            TrainingError: there is no micro-batch, or memory is too small for a single response.
        """
        if not micro_batches:
            raise TrainingError("an optimizer step got no micro-batch: there is nothing to learn")
        trained = [p for _, parameters in self.sets for p in parameters]
        done, splits = accumulate_on_all_ranks(micro_batches, self.zero_grad, trained)
        total = sum(result.loss for result in done)
        norms = [self._clip(config, parameters) for config, parameters in self.sets]
        if not all(map(math.isfinite, (total, *norms))):
            raise self._not_finite(total, norms, done)
        rate, sample = self._set_rates(), WeightSample(self.sets[0][1])
        self._update_weights()
        if self.average is not None:
            self.average.update(self.masters.of)
        self.steps += 1
        parts = [result.observed for result in done]
        names = dict.fromkeys(name for observed in parts for name in observed)
        joined = {name: torch.cat([o[name] for o in parts if name in o]) for name in names}
        moved = sample.metrics()
        if any(isinstance(x, StochasticRounding) for x in self.by_kind.values()):
            # Few weights change in each step, and the right number on average.
            moved.pop("weights/changed_share", None)
        return StepResult(total, norms[0], rate, joined, splits, moved)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.masters.zero_grad()
        for optimizer in self.by_kind.values():
            optimizer.zero_grad(set_to_none=True)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the moments of a parameter, or of its float32 copy; {} before its first step."""
        master = self.masters.of.get(parameter, parameter)
        states = (optimizer.state for optimizer in self.by_kind.values())
        return next((state[master] for state in states if master in state), {})

    def _update_weights(self) -> None:
        try:
            for optimizer in self.by_kind.values():
                optimizer.step()
            self.masters.round_()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"memory ran out while the optimizer changed the weights at its step {self.steps} "
                f"({str(error).strip().splitlines()[0]:.200}), so some of them may have changed: "
                "resume from the last checkpoint with less memory in use (model.lora, a shared "
                "critic, or bfloat16 with optimizer.half_precision: stochastic_rounding)"
            ) from None

    def _not_finite(
        self, total: float, norms: list[float], done: Sequence[MicroBatchResult]
    ) -> NonFiniteError:
        records = [MicroBatchRecord.of(x.micro_batch.data, x.observed, x.loss) for x in done]
        report = NonFiniteReport(self.steps, norms, records)
        shown = " and ".join(map(str, norms))
        return NonFiniteError(
            f"at optimizer step {self.steps} the loss is {total} and the gradient norm {shown}; "
            f"no weight was changed. {describe_first_nonfinite(report)}",
            report,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the moments, the float32 copies of weights and the number of steps."""
        return {
            "steps": self.steps,
            "moments": {kind: x.state_dict()["state"] for kind, x in self.by_kind.items()},
            "masters": self.masters.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.steps = state["steps"]
        self.masters.load_state_dict(state["masters"])
        for kind, optimizer in self.by_kind.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["moments"][kind]})

    def _clip(self, config: OptimizerConfig, parameters: list[nn.Parameter]) -> float:
        return float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))

    def _set_rates(self) -> float:
        spent = self.budget_spent()
        rates = [
            config.learning_rate * lr_multiplier(config, self.steps, self.total_steps, spent)
            for config, _ in self.sets
        ]
        for group in chain.from_iterable(x.param_groups for x in self.by_kind.values()):
            group["lr"] = rates[group["set"]]
        return rates[0]


def _rounds_stochastically(sets: Sequence[ParameterSet]) -> bool:
    """Return whether half-precision weights are rounded stochastically."""
    asked = [config.half_precision == "stochastic_rounding" for config, _ in sets]
    if not any(asked):
        return False
    half = [any(map(is_half, parameters)) for _, parameters in sets]
    if asked != half and not (all(asked) and any(half)):
        raise ConfigurationError(
            "optimizer.half_precision is stochastic_rounding, and "
            + ("no trained weight is bfloat16" if not any(half) else "not for every optimizer")
            + ": set model.dtype: bfloat16 (and the same for every optimizer of the run), or leave "
            "half_precision out"
        )
    return True


def _torch_optimizer(
    kind: str, sets: Sequence[ParameterSet], *, stochastic: bool
) -> torch.optim.Optimizer:
    """Return PyTorch's optimizer of one kind, over the sets of parameters that name it."""
    groups = [
        group
        for index, (config, parameters) in enumerate(sets)
        if config.kind == kind
        for group in _groups(config, parameters, index)
    ]
    if stochastic:
        return StochasticRounding(groups, kind)
    if kind == "rmsprop":
        return torch.optim.RMSprop(groups)
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind](groups, fused=True)


def _groups(
    config: OptimizerConfig, parameters: Sequence[nn.Parameter], index: int
) -> list[dict[str, Any]]:
    """Return parameter groups of a set: matrices with weight decay, vectors without."""
    rmsprop = config.kind == "rmsprop"
    shared = {
        "lr": config.learning_rate,
        **({"alpha": config.alpha} if rmsprop else {"betas": config.betas}),
        "eps": config.epsilon,
        "set": index,
    }
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, **shared},
        {"params": vectors, "weight_decay": 0.0, **shared},
    ]
    return [group for group in groups if group["params"]]
