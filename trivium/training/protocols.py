"""Types shared by the run loop and the algorithms: evaluators, stage timing, optimizer steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

from trivium.runs.checkpointing import Stateful

T = TypeVar("T")


class Evaluation(Protocol):
    """Result of a held-out evaluation."""

    def record(self) -> dict[str, Any]:
        """Return the metrics, as a flat mapping."""
        ...

    def samples(self, prompts: int) -> list[dict[str, Any]]:
        """Return the responses to the first ``prompts`` prompts."""
        ...

    def outcomes(self) -> dict[str, Any]:
        """Return the reward of every response by prompt, for paired comparisons of runs."""
        ...


class Evaluator(Stateful, Protocol):
    """Repeated evaluation of the model on held-out data."""

    def due(self, step: int) -> bool:
        """Return whether to evaluate after training step ``step``; 0 is before the first step."""
        ...

    def evaluate(self) -> Evaluation:
        """Evaluate the model."""
        ...


class Stopwatch:
    """Durations of the stages of one step in seconds, by metric name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage_start = time.perf_counter()

    def begin(self) -> None:
        """Start the next stage."""
        self._stage_start = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End the current stage, and start the next one."""
        now = time.perf_counter()
        self.seconds[f"time/{stage}"] = now - self._stage_start
        self._stage_start = now

    def exclude(self, seconds: float) -> None:
        """Exclude a duration from the current stage."""
        self._stage_start += seconds


class Updates(Generic[T]):
    """The optimizer steps of a training step, and their results.

    Iteration yields the remaining optimizer steps.

    Attributes:
        planned: all optimizer steps, including those done before the run resumed.
        results: results of the optimizer steps done so far. The algorithm appends to them.
    """

    def __init__(
        self,
        planned: Sequence[T],
        results: list[Any] | None = None,
        remaining: Iterator[T] | None = None,
    ) -> None:
        self.planned = planned
        self.results: list[Any] = [] if results is None else results
        self._remaining = iter(planned) if remaining is None else remaining

    def __iter__(self) -> Iterator[T]:
        return self._remaining
