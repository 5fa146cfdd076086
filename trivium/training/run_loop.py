"""What goes on around the steps of a training run: the same for every algorithm.

A loop asks for its steps and hands over each step's numbers; here they are completed, logged,
mirrored to trackers, watched by monitors, and shown; held-out evaluation is made when it is due;
the run ends early when its budget is spent or a monitor says so; and its state is saved, so that
one that was stopped goes on as if it had not been.

    prepared = prepare_run("ppo", config)
    with Training(prepared, config.steps, evaluator=parts.evaluator, shared_objects=parts.prompts) as training:
        training.track_state(policy=policy, optimizer=optimizer)
        for step in training.steps():
            rollouts = training.rollouts(partial(sample, step))
            updates = training.updates(plan(rollouts))
            for micro_batches in updates:
                updates.results.append(optimizer.step(micro_batches))
            training.log(metrics)
        training.save("final", policy)

Left out: what a step does, the form of the files (``runs.store``), when and what to save
(``runs.checkpointing``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError

from trivium.errors import ConfigurationError, NonFiniteError, TrainingError, TriviumError
from trivium.evaluation.samples import Rows
from trivium.models import flops
from trivium.monitoring.metrics import derived, metric
from trivium.monitoring.monitors import Alarm, Monitors
from trivium.monitoring.progress import Progress, printable
from trivium.runs import rng
from trivium.runs.budget import Spending
from trivium.runs.checkpoint import Place
from trivium.runs.checkpointing import CheckpointManager, Saveable, Stateful
from trivium.runs.nonfinite import save_for_study
from trivium.runs.signals import GivenUp, Interrupted, Stopping, name_of
from trivium.runs.startup import PreparedRun, open_run, tell_of_resuming
from trivium.runs.trackers import open_trackers
from trivium.training.protocols import Evaluator, Stopwatch, Updates

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Training:
    """A run that is being trained; a context manager whose end is the last evaluation.

    Args:
        prepared: what ``begin`` returned.
        total: how many steps there are.
        evaluator: what measures the model on held-out data.
        shared_objects: objects that a saved state names by their places, such as the prompts.

    Attributes:
        step: the number of the step that goes on, or was the last.
        done: how many steps are done.
        over: whether the run is to end before its steps do.
    """

    def __init__(
        self,
        prepared: PreparedRun,
        total: int,
        *,
        evaluator: Evaluator | None = None,
        shared_objects: Sequence[object] = (),
    ) -> None:
        config, resolved = prepared.claim.config, prepared.claim.resolved
        self.total = total
        self.step = self.done = 0
        self.over = False
        self.spending = Spending(config.budget)
        self.stages = Stopwatch()
        self._results: list[Any] = []
        self._monitors = Monitors(config.monitors)
        self._config = config
        self._evaluator = evaluator
        self._peak = prepared.peak
        self._evaluated: int | None = None
        self._since = (0.0, 0.0)
        self._inside: dict[str, Any] = {}
        self._position = self._pauses = 0
        self._stopping = Stopping()
        self._random = rng.state()
        if config.checkpoints.best is not None and evaluator is None:
            raise ConfigurationError(
                f"run.checkpoints.best = {config.checkpoints.best}: this run evaluates nothing; "
                "leave it out, or give held-out data"
            )
        self.run, self._lock = open_run(prepared)
        self._checkpoints = CheckpointManager(
            self.run, config.checkpoints, shared_objects, prepared.checkpoint
        )
        self._restore(prepared)
        self._trackers = open_trackers(config.trackers, self.run, resolved, self.done)
        self._progress = Progress(prepared.claim.kind, total, done=self.done)

    @property
    def path(self) -> Path:
        return self.run.path

    def track_state(self, **objects: Stateful | None) -> None:
        """Make these part of the run's state, the model that is trained first.

        Where the run goes on they are, from here on, as they were when it was stopped.
        """
        self._checkpoints.track(
            {name: thing for name, thing in objects.items() if thing is not None}
        )

    # --- Steps ------------------------------------------------------------------------------------

    def __enter__(self) -> Training:
        self._stopping.__enter__()
        self._progress.__enter__()
        if not self._inside:
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
                self._finish()
            elif isinstance(error, TriviumError):
                if isinstance(error, NonFiniteError):
                    tokenizer = getattr(self._checkpoints.model, "tokenizer", None)
                    save_for_study(error, self.path, tokenizer)
                self.run.event("failed", printable(str(error)), step=self.step)
        finally:
            self._progress.__exit__(kind, error, trace)
            self._stopping.__exit__(kind, error, trace)
            for tracker in self._trackers:
                tracker.close()
            self._lock.release()

    def steps(self, until: int | None = None) -> Iterator[int]:
        """The steps that are left, up to number ``until`` (by default all), numbered from 1.

        Ends early once the budget is spent or a monitor has stopped the run.
        """
        last = self.total if until is None else min(until, self.total)
        if not self._inside:
            self._between()
        while self.done < last and not self.over:
            self.step = self.done + 1
            yield self.step
            self.done = self.step
            self.stages = Stopwatch()
            self._inside, self._position, self._pauses = {}, 0, 0
            self._results = []
            self._between()

    def iterations(self, steps: int) -> Iterator[int]:
        """The rounds of so many steps that are left, numbered from 0; none once the run is over."""
        for number in range(self.done // steps, -(-self.total // steps)):
            if self.over:
                return
            yield number

    def rollouts(self, make: Callable[[], T]) -> T:
        """What the step samples; made once, however often the run is stopped.

        Nothing of the run's state may change in ``make``: it is given up where the run is to stop.
        """
        if "rollouts" not in self._inside:
            try:
                with self._stopping.can_give_up():
                    made = make()
            except GivenUp:
                self._stop_here()
            self._pass("rollouts", made)
        return self._inside["rollouts"]

    def memoize(self, name: str, make: Callable[[], T]) -> T:
        """Something else that is made, or done, once in a step or before it, and stays."""
        if name not in self._inside:
            self._pass(name, make())
        return self._inside[name]

    def updates(self, steps: Sequence[T]) -> Updates[T]:
        """The optimizer steps that are left of a training step's."""
        return Updates(steps, self._results, self._left(steps))

    def _left(self, steps: Sequence[T]) -> Iterator[T]:
        for position in range(self._position, len(steps)):
            yield steps[position]
            self._position = position + 1
            self._pause()

    # --- Numbers ----------------------------------------------------------------------------------

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
            self._end_early(f"the budget is spent: {self.spending}")
        self._mark()

    def event(self, kind: str, **fields: Any) -> None:
        """Note something that happened."""
        self.run.event(kind, step=self.step, **fields)

    def save(self, name: str, model: Saveable) -> None:
        """Write a model under the run's directory, whole or not at all.

        Raises:
            TrainingError: it cannot be written; the run can go on once it can.
        """
        try:
            with self.run.saving(name) as directory:
                model.save(directory)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TrainingError(
                f"{self.path / name}: cannot be written: {reason}; make room, and go on from "
                f"{self._checkpoints.saved}: trivium resume {self.path}"
            ) from error

    def _save_best(self) -> None:
        model = self._checkpoints.model
        assert isinstance(model, Saveable), "the first object that a loop keeps is its model"
        self.save("best", model)

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
                self._end_early(f"the monitor {alarm.monitor} says so")

    def _end_early(self, reason: str) -> None:
        self.over = True
        self.run.event("stopped", reason, step=self.step)
        logger.info("stopped after step %d of %d: %s", self.step, self.total, reason)

    def _evaluate(self, *, last: bool = False) -> bool:
        """Evaluate if it is due or the last, and not done yet; whether it is the best so far."""
        evaluator = self._evaluator
        if evaluator is None or self.done == self._evaluated:
            return False
        if not (last or evaluator.due(self.done)):
            return False
        found = evaluator.evaluate()
        record = found.record()
        self._evaluated = self.done
        self.run.evaluation(self.done, record)
        self.run.samples(self.done, found.samples(self._config.samples))
        self.run.outcomes(self.done, found.outcomes())
        self._tell(self._monitors.evaluated(self.done, record))
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(self.done, {f"evaluation/{k}": float(v) for k, v in numbers.items()})
        self._mark()
        return self._checkpoints.is_best(Place(self.done), record)

    def _finish(self) -> None:
        evaluated = self._evaluated
        if self._evaluate(last=True):
            self._save_best()
        self._random = rng.state()
        if self._evaluated != evaluated or not self._checkpoints.has(Place(self.done)):
            self._checkpoints.try_to_save(Place(self.done), self._loop_state())
        if self._peak is not None:
            self.run.event("memory", measured_bytes=self._peak.bytes())
        spent = {
            "saves": self._checkpoints.saves,
            "saving_seconds": round(self._checkpoints.seconds, 3),
        }
        self.run.event("finished", step=self.step, **spent)

    # --- State ------------------------------------------------------------------------------------

    def _between(self) -> None:
        """Between two steps: evaluate, and save if it is due or the run is to stop."""
        self._random = rng.state()
        if self._stopping.asked is not None:
            self._stop_here()
        best = self._evaluate()
        self._random = rng.state()
        if best:
            self._save_best()
        self._pause_at(Place(self.done), due=best)

    def _pass(self, name: str, made: Any) -> None:
        self._inside[name] = made
        self._pause()

    def _pause(self) -> None:
        """Inside a step: save if it is due or the run is to stop."""
        self._pauses += 1
        self._random = rng.state()
        self._pause_at(Place(self.done, self._pauses))

    def _pause_at(self, place: Place, *, due: bool = False) -> None:
        if self._stopping.asked is not None:
            self._stop_here()
        if due or self._checkpoints.due(place):
            before = self._checkpoints.seconds
            self._checkpoints.try_to_save(place, self._loop_state())
            self._leave_out(self._checkpoints.seconds - before)

    def _leave_out(self, seconds: float) -> None:
        """Let a time not count as the step's, which a budget may limit."""
        self._since = (self._since[0] + seconds, self._since[1])
        self.stages.leave_out(seconds)

    def _stop_here(self) -> NoReturn:
        """Save, and end the run with the signal that asked for it."""
        asked = self._stopping.asked
        assert asked is not None, "a run stops here because a signal asked it to"
        saved = self._checkpoints.try_to_save(Place(self.done, self._pauses), self._loop_state())
        if saved:
            message = f"stopped by {name_of(asked)}, saved at {self._checkpoints.saved}"
        else:
            message = (
                f"stopped by {name_of(asked)}; the last saved state is {self._checkpoints.saved}"
            )
        self.run.event("interrupted", message, step=self.done)
        raise Interrupted(f"{message}; to go on: trivium resume {self.path}", asked)

    def _loop_state(self) -> dict[str, Any]:
        """What the run's future depends on, besides the objects that the loop keeps."""
        return {
            "done": self.done,
            "over": self.over,
            "inside": self._inside,
            "position": self._position,
            "pauses": self._pauses,
            "results": self._results,
            "stages": self.stages.seconds,
            "seconds": time.perf_counter() - self._since[0],
            "flops": (flops.total(), self._since[1]),
            "spent": self.spending.spent,
            "monitors": self._monitors.state_dict(),
            "evaluated": self._evaluated,
            "evaluator": None if self._evaluator is None else self._evaluator.state_dict(),
            "best": self._checkpoints.best,
            "random": self._random,
            "threads": torch.get_num_threads(),
        }

    def _restore(self, prepared: PreparedRun) -> None:
        """Be as the run was when it was saved, if it goes on."""
        if prepared.checkpoint is None:
            return
        loop_state = self._checkpoints.loop_state()
        self.step = self.done = loop_state["done"]
        self.over = loop_state["over"]
        self._inside, self._position = loop_state["inside"], loop_state["position"]
        self._pauses, self._results = loop_state["pauses"], loop_state["results"]
        self.stages.seconds = loop_state["stages"]
        flops.go_on_from(loop_state["flops"][0])
        self._since = (time.perf_counter() - loop_state["seconds"], loop_state["flops"][1])
        self.spending.spent = loop_state["spent"]
        self._monitors.load_state_dict(loop_state["monitors"])
        self._evaluated = loop_state["evaluated"]
        if self._evaluator is not None:
            self._evaluator.load_state_dict(loop_state["evaluator"])
        self._checkpoints.best = loop_state["best"]
        self._random = loop_state["random"]
        rng.restore(self._random)
        tell_of_resuming(prepared, self.run, self.done, loop_state["threads"])
