"""What a run asks of whatever measures its model, and what a step is made of: updates, stages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from trivium.runs.checkpointing import Stateful

T = TypeVar("T")


class Evaluation(Protocol):
    """What a held-out evaluation found."""

    def record(self) -> dict[str, Any]:
        """Flat numbers."""
        ...

    def samples(self, prompts: int) -> list[dict[str, Any]]:
        """Responses to the first so many prompts."""
        ...

    def outcomes(self) -> dict[str, Any]:
        """The reward of every response, by prompt; what paired comparisons rest on."""
        ...


class Evaluator(Stateful, Protocol):
    """Something that measures the model on held-out data, again and again."""

    def due(self, step: int) -> bool:
        """Whether to measure after training step ``step``; 0 is before the first."""
        ...

    def evaluate(self) -> Evaluation:
        """Measure."""
        ...


class Stopwatch:
    """Seconds of the stages of one step, under the metrics' names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The stage ends here; it began when the one before ended."""
        now = time.perf_counter()
        self.seconds[f"time/{stage}"] = now - self._since
        self._since = now

    def leave_out(self, seconds: float) -> None:
        """Let so many of the last seconds count as none of a stage's."""
        self._since += seconds

    def begin(self) -> None:
        """The next stage begins now."""
        self._since = time.perf_counter()


class Updates(Generic[T]):
    """Optimizer steps one after the other, and what those that were taken gave.

    Attributes:
        planned: all of them, also those that were taken before a run went on.
        results: whoever takes a step appends its result.
    """

    def __init__(
        self,
        planned: Sequence[T],
        results: list[Any] | None = None,
        left: Iterator[T] | None = None,
    ) -> None:
        self.planned = planned
        self.results: list[Any] = [] if results is None else results
        self._left = iter(planned) if left is None else left

    def __iter__(self) -> Iterator[T]:
        return self._left
