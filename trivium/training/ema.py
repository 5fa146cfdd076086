"""Exponential moving average of the policy's weights, evaluated and saved beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trivium.hf.loading import trained_parameters
from trivium.hf.saving import SaveCheck
from trivium.models.group_model import GroupModel
from trivium.monitoring.evaluation_table import AVERAGED
from trivium.training.protocols import Evaluation, Evaluator


class WeightAverage:
    """``θ̄ ← d θ̄ + (1 − d) θ`` after every optimizer step; it starts as the initial weights.

    The average is float32 or wider, and in mixed precision it is that of the optimizer's float32
    copies. Adapters are averaged by themselves.

    Args:
        model: the model whose trained weights are averaged.
        decay: d, in (0, 1).

    Attributes:
        average: θ̄, one tensor for each trained parameter.
        updates: number of optimizer steps so far.
    """

    def __init__(self, model: GroupModel, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self._trained = trained_parameters(model.model)
        self.average = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self._trained
        ]

    @classmethod
    def of(cls, model: GroupModel, decay: float | None) -> WeightAverage | None:
        """Return the average of a configuration; None without a decay."""
        return None if decay is None else cls(model, decay)

    @torch.no_grad()
    def update(self, masters: Mapping[nn.Parameter, nn.Parameter]) -> None:
        """Take in the weights of an optimizer step; ``masters`` has their float32 copies."""
        for average, parameter in zip(self.average, self._trained, strict=True):
            average.lerp_(masters.get(parameter, parameter).to(average.dtype), 1 - self.decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and its own again afterwards."""
        own = [p.detach().clone() for p in self._trained]
        try:
            self._write(self.average)
            yield
        finally:
            self._write(own)

    def save(self, directory: Path) -> SaveCheck:
        """Write the model with the averaged weights, as ``GroupModel.save`` does."""
        with self.applied():
            return self.model.save(directory)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of optimizer steps."""
        return {"average": self.average, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for average, value in zip(self.average, state["average"], strict=True):
            average.copy_(value)
        self.updates = state["updates"]

    @torch.no_grad()
    def _write(self, weights: list[Tensor]) -> None:
        """Write weights into the model in place, where a recorded computation reads them."""
        for parameter, value in zip(self._trained, weights, strict=True):
            parameter.copy_(value)


@dataclass(frozen=True)
class EvaluatedTwice:
    """An evaluation of the weights, and one of their average, whose metrics begin with ``ema/``."""

    weights: Evaluation
    average: Evaluation

    def record(self) -> dict[str, Any]:
        """Return the metrics of both."""
        averaged = self.average.record()
        names = [name + end for name in AVERAGED for end in ("", "_low", "_high")]
        return self.weights.record() | {f"ema/{n}": averaged[n] for n in names if n in averaged}

    def samples(self, prompts: int) -> list[dict[str, Any]]:
        """Return responses of the weights."""
        return self.weights.samples(prompts)

    def outcomes(self) -> dict[str, Any]:
        """Return the rewards of the weights' responses, by prompt."""
        return self.weights.outcomes()


class AveragedEvaluator:
    """Evaluates a model with its weights, and again with their average."""

    def __init__(self, evaluator: Evaluator, average: WeightAverage) -> None:
        self.evaluator, self.average = evaluator, average

    def due(self, step: int) -> bool:
        """Return whether to evaluate after training step ``step``."""
        return self.evaluator.due(step)

    def evaluate(self) -> EvaluatedTwice:
        """Evaluate both; before the first optimizer step they are the same."""
        weights = self.evaluator.evaluate()
        if self.average.updates == 0:
            return EvaluatedTwice(weights, weights)
        with self.average.applied():
            return EvaluatedTwice(weights, self.evaluator.evaluate())

    def state_dict(self) -> Any:
        """Return the evaluator's state."""
        return self.evaluator.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Restore the evaluator's state."""
        self.evaluator.load_state_dict(state)


def evaluated_with(evaluator: Evaluator | None, average: WeightAverage | None) -> Evaluator | None:
    """Return an evaluator that also measures the average, if there are both."""
    if evaluator is None or average is None:
        return evaluator
    return AveragedEvaluator(evaluator, average)
