"""What goes on around the steps of a training run: the same for every algorithm.

A loop asks for its steps and hands over each step's numbers; here they are completed, logged,
mirrored to trackers, watched by monitors, and shown; held-out evaluation is made when it is due,
and the run ends early when its budget is spent or a monitor says so.

    begun = begin(config.run, config.model.device)
    with Training(begun, "ppo", config, config.steps, evaluator=parts.evaluator) as training:
        for step in training.steps():
            ...
            training.log(metrics)
        ...
    training.save("final", policy)

Left out: what a step does, and the form of the files (``runs.store``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from trivium.config import Configuration
from trivium.models import flops
from trivium.models.loading import resolve_device
from trivium.runs.budget import Spending
from trivium.runs.metrics import derived, metric
from trivium.runs.monitors import Alarm, Monitors
from trivium.runs.peak import PeakMemory, load_libraries
from trivium.runs.progress import Progress, printable
from trivium.runs.samples import Rows
from trivium.runs.store import Run, RunConfig, require_free
from trivium.runs.trackers import open_trackers

logger = logging.getLogger(__name__)


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


class Evaluator(Protocol):
    """Something that measures the model on held-out data, again and again."""

    def due(self, step: int) -> bool:
        """Whether to measure after training step ``step``; 0 is before the first."""
        ...

    def evaluate(self) -> Evaluation:
        """Measure."""
        ...


class Saves(Protocol):
    """A model that can write itself."""

    def save(self, directory: Path) -> None: ...


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

    def begin(self) -> None:
        """The next stage begins now."""
        self._since = time.perf_counter()


@dataclass(frozen=True)
class Begun:
    """A run that may be written, and the measurement of its memory if it was asked for."""

    config: RunConfig
    peak: PeakMemory | None = None


def begin(config: RunConfig, device: str) -> Begun:
    """Before anything slow: raise where the run cannot be written; measure memory from here on.

    Raises:
        ConfigurationError: the directory is taken, or a tracker is not installed.
    """
    require_free(config)
    if not config.measure_memory:
        return Begun(config)
    with torch.random.fork_rng(devices=[]):
        load_libraries()
    return Begun(config, PeakMemory(resolve_device(device)))


class Training:
    """A run that is being trained; a context manager whose end is the last evaluation."""

    def __init__(
        self,
        begun: Begun,
        kind: str,
        resolved: Configuration,
        total: int,
        *,
        evaluator: Evaluator | None = None,
    ) -> None:
        config = begun.config
        self.total = total
        self.step = 0
        self.over = False
        self.spending = Spending(config.budget)
        self.stages = Stopwatch()
        self._monitors = Monitors(config.monitors)
        self._config = config
        self._evaluator = evaluator
        self._peak = begun.peak
        self._evaluated: int | None = None
        self._since = (0.0, 0.0)
        self.run = Run.create(config, kind, resolved)
        self._trackers = open_trackers(config.trackers, self.run.path, resolved)
        self._progress = Progress(kind, total)

    @property
    def path(self) -> Path:
        return self.run.path

    def __enter__(self) -> Training:
        self._progress.__enter__()
        self._mark()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._evaluate(last=True)
                if self._peak is not None:
                    self.run.event("memory", measured_bytes=self._peak.bytes())
                self.run.event("finished", step=self.step)
        finally:
            self._progress.__exit__(kind, error, trace)
            for tracker in self._trackers:
                tracker.close()

    def steps(self, count: int | None = None) -> Iterator[int]:
        """The next ``count`` steps (by default all), numbered from 1 over the whole run.

        Ends early once the budget is spent or a monitor has stopped the run.
        """
        if self.step == 0:
            self._evaluate()
        last = min(self.total, self.step + (self.total if count is None else count))
        while self.step < last and not self.over:
            self.step += 1
            self.stages = Stopwatch()
            yield self.step
            self._evaluate()

    def budget_spent(self) -> float:
        """The share of the run's budget that is spent; 0 without one."""
        return self.spending.share()

    def log(self, metrics: Mapping[str, float], rows: Callable[[], Rows] | None = None) -> None:
        """Take the numbers of the step that is ending; ``rows`` gives responses to keep of it.

        Its time and cost are all since the step before, evaluation left out.
        """
        complete = self.stages.seconds | dict(metrics)
        began, flops_before = self._since
        complete["time/total"] = time.perf_counter() - began
        complete["flops"] = flops.total() - flops_before
        complete |= derived(complete)
        unknown = [name for name in complete if metric(name) is None]
        assert not unknown, f"not in runs.metrics: {unknown}"
        self.run.log(self.step, complete)
        for tracker in self._trackers:
            tracker.log(self.step, complete)
        if rows is not None and self._keeps(self.step):
            self.run.samples(self.step, rows())
        self._progress.advance(complete)
        self._tell(self._monitors.observe(self.step, complete))
        self.spending.add(complete)
        if self.spending.over and not self.over:
            self._stop(f"the budget is spent: {self.spending}")
        self._mark()

    def event(self, kind: str, **fields: Any) -> None:
        """Note something that happened."""
        self.run.event(kind, step=self.step, **fields)

    def save(self, name: str, model: Saves) -> None:
        """Write a model under the run's directory, whole or not at all."""
        with self.run.saving(name) as directory:
            model.save(directory)

    def _mark(self) -> None:
        """Time and cost count from here."""
        self._since = (time.perf_counter(), flops.total())

    def _keeps(self, step: int) -> bool:
        every = self._config.samples_every
        return every > 0 and (step - 1) % every == 0

    def _tell(self, alarms: list[Alarm]) -> None:
        """Show alarms, keep them, and obey those that stop the run."""
        for alarm in alarms:
            logger.warning("%s", printable(alarm.message))
            self.run.event("alarm", printable(alarm.message), **alarm.fields())
            if alarm.stops and not self.over:
                self._stop(f"the monitor {alarm.monitor} says so")

    def _stop(self, reason: str) -> None:
        self.over = True
        self.run.event("stopped", reason, step=self.step)
        logger.info("stopped after step %d of %d: %s", self.step, self.total, reason)

    def _evaluate(self, *, last: bool = False) -> None:
        """Evaluate if it is due or the last, and not done after this step already."""
        evaluator = self._evaluator
        if evaluator is None or self.step == self._evaluated:
            return
        if not (last or evaluator.due(self.step)):
            return
        found = evaluator.evaluate()
        self._evaluated = self.step
        self.run.evaluation(self.step, found.record())
        self.run.samples(self.step, found.samples(self._config.samples))
        self.run.outcomes(self.step, found.outcomes())
        self._tell(self._monitors.evaluated(self.step, found.record()))
        numbers = {k: v for k, v in found.record().items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(self.step, {f"evaluation/{k}": float(v) for k, v in numbers.items()})
        self._mark()
