"""Run loop: everything around the steps of a training run, shared by all algorithms.

An algorithm iterates over the steps and passes the metrics of each step to the loop. The loop
completes and logs the metrics, sends them to trackers and monitors, shows progress, and runs
held-out evaluations. It ends the run early if the budget is spent or a monitor asks for it. It
saves the run's state, so that a stopped run resumes with bit-identical results.

    prepared = prepare_run("ppo", config)
    with Training(prepared, config.steps, evaluator=evaluator, shared_objects=prompts) as training:
        training.track_state(policy=policy, optimizer=optimizer)
        for step in training.steps():
            rollouts = training.rollouts(partial(sample, step))
            updates = training.updates(plan(rollouts))
            for micro_batches in updates:
                updates.results.append(optimizer.step(micro_batches))
            training.log(metrics)
        training.save(final=policy)

The content of a step belongs to the algorithm. The format of the files is in ``runs.store``, and
the schedule of checkpoints in ``runs.checkpointing``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch

from trivium import distributed
from trivium.errors import NonFiniteError, TriviumError
from trivium.evaluation.samples import Rows
from trivium.models import flops
from trivium.monitoring.metrics import metric
from trivium.monitoring.monitors import Alarm, Monitors
from trivium.monitoring.progress import Progress, printable
from trivium.numerics import numerics_state
from trivium.runs import checkpointing, rng
from trivium.runs.budget import BudgetTracker
from trivium.runs.checkpoint import SavePoint
from trivium.runs.checkpointing import CheckpointManager, Saveable, Stateful
from trivium.runs.hub import push
from trivium.runs.model_card import write_card
from trivium.runs.nonfinite import save_nonfinite_batch
from trivium.runs.signals import Interrupted, SamplingAborted, SignalHandler, signal_name
from trivium.runs.startup import PreparedRun, log_resumption, open_run
from trivium.runs.trackers import open_trackers
from trivium.training import rank_states
from trivium.training.protocols import Evaluator, Stopwatch, Updates

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Training:
    """Context manager for a training run. Its exit runs the last evaluation.

    Args:
        prepared: the return value of ``prepare_run``.
        total: number of training steps.
        evaluator: evaluates the model on held-out data.
        shared_objects: objects that a saved state refers to by index, such as the prompts.

    Attributes:
        step: number of the current or last step, from 1.
        done: number of completed steps.
        stop_early: whether the run ends before its last step.
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
        self.stop_early = False
        self.budget = BudgetTracker(config.budget)
        self.stages = Stopwatch()
        self._results: list[Any] = []
        self._monitors = Monitors(config.monitors, half_precision=prepared.half_precision)
        self._config, self._resolved = config, resolved
        self._evaluator = evaluator
        self._peak_memory = prepared.peak_memory
        self._evaluated_step: int | None = None
        self._step_start = (0.0, 0.0)
        self._memo: dict[str, Any] = {}
        self._num_updates = self._save_point_index = 0
        self._signals = SignalHandler()
        self._rng_state = rng.state()
        checkpointing.require_evaluation(config.checkpoints, evaluator)
        self.run, self._lock = open_run(prepared)
        self._checkpoints = CheckpointManager(
            self.run, config.checkpoints, shared_objects, prepared.checkpoint, numerics_state
        )
        if prepared.checkpoint is not None:
            self._load_loop_state(prepared)
        self._trackers = open_trackers(config.trackers, self.run, resolved, self.done)
        self._progress = Progress(prepared.claim.kind, total, done=self.done)

    @property
    def path(self) -> Path:
        return self.run.path

    def track_state(self, **objects: Stateful | None) -> None:
        """Add objects to the saved state, the trained model first.

        If the run resumes, the saved states are loaded into them at once.
        """
        self._checkpoints.track(
            {name: tracked for name, tracked in objects.items() if tracked is not None}
        )

    # --- Steps ------------------------------------------------------------------------------------

    def __enter__(self) -> Training:
        self._signals.__enter__()
        self._progress.__enter__()
        if not self._memo:
            self._start_step_clock()
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
                    save_nonfinite_batch(error, self.path, tokenizer)
                self.run.event("failed", printable(str(error)), step=self.step)
        finally:
            self._progress.__exit__(kind, error, trace)
            self._signals.__exit__(kind, error, trace)
            for tracker in self._trackers:
                tracker.close()
            if self._lock is not None:
                self._lock.release()

    def steps(self, until: int | None = None) -> Iterator[int]:
        """Yield the numbers of the remaining steps, from 1 up to ``until`` (default: all steps).

        The iteration ends early if the budget is spent or a monitor stops the run.
        """
        last = self.total if until is None else min(until, self.total)
        if not self._memo:
            self._between_steps()
        while self.done < last and not self.stop_early:
            self.step = self.done + 1
            yield self.step
            self.done = self.step
            self.stages = Stopwatch()
            self._memo, self._num_updates, self._save_point_index = {}, 0, 0
            self._results = []
            self._between_steps()

    def iterations(self, steps: int) -> Iterator[int]:
        """Yield the remaining iterations of ``steps`` steps each, numbered from 0.

        The iteration ends early if the budget is spent or a monitor stops the run.
        """
        for number in range(self.done // steps, -(-self.total // steps)):
            if self.stop_early:
                return
            yield number

    def rollouts(self, sample: Callable[[], T]) -> T:
        """Return the rollouts of the step, sampled once even if the run is stopped and resumed.

        ``sample`` must not change the run's state, because a signal aborts it.
        """
        if "rollouts" not in self._memo:
            try:
                with self._signals.abortable():
                    rollouts = sample()
            except SamplingAborted:
                self._save_or_stop(SavePoint(self.done, self._save_point_index), due=False)
                raise
            self._store("rollouts", rollouts)
        return self._memo["rollouts"]

    def memoize(self, name: str, compute: Callable[[], T]) -> T:
        """Return a result that is computed once per step, even if the run resumes inside it."""
        if name not in self._memo:
            self._store(name, compute())
        return self._memo[name]

    def updates(self, steps: Sequence[T]) -> Updates[T]:
        """Return the optimizer steps of a training step; iteration yields those not done yet."""
        return Updates(steps, self._results, self._remaining_updates(steps))

    def _remaining_updates(self, steps: Sequence[T]) -> Iterator[T]:
        for number in range(self._num_updates, len(steps)):
            yield steps[number]
            self._num_updates = number + 1
            self._save_inside_step()

    # --- Metrics ----------------------------------------------------------------------------------

    def budget_spent(self) -> float:
        """Return the fraction of the run's budget that is spent; 0 without a budget."""
        return self.budget.fraction_spent()

    def log(self, metrics: Mapping[str, float], rows: Callable[[], Rows] | None = None) -> None:
        """Log the metrics of the step that ends now; ``rows`` returns responses to keep.

        Its time and FLOPs count from the end of the previous step, without evaluation and saving.
        """
        complete = self.stages.seconds | dict(metrics)
        start_time, start_flops = self._step_start
        complete["time/total"] = time.perf_counter() - start_time
        complete = rank_states.shared_metrics(complete, flops.total() - start_flops)
        unknown = [name for name in complete if metric(name) is None]
        assert not unknown, f"not in monitoring.metrics: {unknown}"
        self.run.log(self.step, complete)
        for tracker in self._trackers:
            tracker.log(self.step, complete)
        every = self._config.samples_every
        if rows is not None and every > 0 and (self.step - 1) % every == 0:
            self.run.samples(self.step, rows())
        self._progress.advance(complete)
        self._handle_alarms(self._monitors.observe(self.step, complete))
        self.budget.add(complete)
        if self.budget.exhausted and not self.stop_early:
            self._stop_early(f"the budget is spent: {self.budget}")
        self._start_step_clock()

    def event(self, kind: str, **fields: Any) -> None:
        """Log an event of the current step, which monitors may judge."""
        self.run.event(kind, step=self.step, **fields)
        self._handle_alarms(self._monitors.event(kind, self.step, fields))

    def save(self, **models: Saveable | None) -> None:
        """Write models by name, those that are not None (see ``CheckpointManager.save_model``)."""
        for name, model in models.items():
            self._checkpoints.save_model(name, model)

    def _save_best(self) -> None:
        model = self._checkpoints.best_model
        assert isinstance(model, Saveable), "the first tracked object is the trained model"
        self.save(best=model)

    def _start_step_clock(self) -> None:
        """Start to count the time and FLOPs of the next step."""
        self._step_start = (time.perf_counter(), flops.total())

    def _handle_alarms(self, alarms: list[Alarm]) -> None:
        """Show and log alarms, and stop the run early if one of them asks for it."""
        for alarm in alarms:
            logger.warning("%s", printable(alarm.message))
            self.run.event("alarm", printable(alarm.message), **alarm.fields())
            if alarm.stops and not self.stop_early:
                self._stop_early(f"the monitor {alarm.monitor} stops the run")

    def _stop_early(self, reason: str) -> None:
        self.stop_early = True
        self.run.event("stopped", reason, step=self.step)
        logger.info("stopped after step %d of %d: %s", self.step, self.total, reason)

    def _evaluate(self, *, last: bool = False) -> bool:
        """Evaluate if an evaluation is due or is the last. Return whether it is the best so far."""
        evaluator = self._evaluator
        if evaluator is None or self.done == self._evaluated_step:
            return False
        if not (last or evaluator.due(self.done)):
            return False
        evaluation = evaluator.evaluate()
        record = evaluation.record()
        self._evaluated_step = self.done
        self.run.evaluation(self.done, record)
        self.run.samples(self.done, evaluation.samples(self._config.samples))
        self.run.outcomes(self.done, outcomes := evaluation.outcomes())
        self._handle_alarms(self._monitors.evaluated(self.done, record, outcomes))
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        for tracker in self._trackers:
            tracker.log(self.done, {f"evaluation/{k}": float(v) for k, v in numbers.items()})
        self._start_step_clock()
        return self._checkpoints.is_best(SavePoint(self.done), record)

    def _finish(self) -> None:
        evaluated_step = self._evaluated_step
        if self._evaluate(last=True):
            self._save_best()
        self._rng_state = rng.state()
        end = SavePoint(self.done)
        if self._evaluated_step != evaluated_step or not self._checkpoints.is_saved(end):
            self._checkpoints.try_to_save(end, self._loop_state())
        if self._peak_memory is not None:
            self.run.event("memory", measured_bytes=rank_states.largest_peak(self._peak_memory))
        distributed.from_rank_0("the end of the run", self._conclude)

    def _conclude(self) -> None:
        write_card(self.path, self._resolved)
        self._checkpoints.finish(self.step)
        if self._config.push is not None:
            logger.info("uploaded to %s", push(self.path, self._config.push))

    # --- State ------------------------------------------------------------------------------------

    def _between_steps(self) -> None:
        """Evaluate between two steps, and save if a save is due or a signal asks for it."""
        self._rng_state = rng.state()
        self._save_or_stop(SavePoint(self.done), due=False)
        best = self._evaluate()
        self._rng_state = rng.state()
        if best:
            self._save_best()
        self._save_or_stop(SavePoint(self.done), due=best or None)

    def _store(self, name: str, result: Any) -> None:
        self._memo[name] = result
        self._save_inside_step()

    def _save_inside_step(self) -> None:
        """Save inside a step if a save is due or a signal asks for it."""
        self._save_point_index += 1
        self._rng_state = rng.state()
        self._save_or_stop(SavePoint(self.done, self._save_point_index))

    def _save_or_stop(self, save_point: SavePoint, *, due: bool | None = None) -> None:
        """Save if a save is due (None: by steps or the clock), or if a signal ends the run."""
        if due is None:
            due = self._checkpoints.due(save_point)
        signal, due = rank_states.decide(save_point, self._signals.received, due)
        if signal is not None:
            self._save_and_interrupt(signal)
        if due:
            before = self._checkpoints.save_seconds
            self._checkpoints.try_to_save(save_point, self._loop_state())
            self._exclude_time(self._checkpoints.save_seconds - before)

    def _exclude_time(self, seconds: float) -> None:
        """Exclude a duration from the time of the step, which a budget may limit."""
        self._step_start = (self._step_start[0] + seconds, self._step_start[1])
        self.stages.exclude(seconds)

    def _save_and_interrupt(self, number: int) -> NoReturn:
        """Save the state, and end the run with a signal that was received."""
        save_point = SavePoint(self.done, self._save_point_index)
        if self._checkpoints.try_to_save(save_point, self._loop_state()):
            outcome = f", saved at {self._checkpoints.last_saved}"
        else:
            outcome = f"; the last checkpoint is {self._checkpoints.last_saved}"
        message = f"stopped by {signal_name(number)}{outcome}"
        self.run.event("interrupted", message, step=self.done)
        raise Interrupted(f"{message}; to resume: trivium resume {self.path}", number)

    def _loop_state(self) -> dict[str, Any]:
        """Return the loop state: all that later steps depend on besides the tracked objects."""
        return {
            "done": self.done,
            "stop_early": self.stop_early,
            "memo": self._memo,
            "num_updates": self._num_updates,
            "save_point_index": self._save_point_index,
            "results": self._results,
            "stages": self.stages.seconds,
            "seconds": time.perf_counter() - self._step_start[0],
            "spent": self.budget.spent,
            "monitors": self._monitors.state_dict(),
            "evaluated_step": self._evaluated_step,
            "evaluator": None if self._evaluator is None else self._evaluator.state_dict(),
            "best": self._checkpoints.best,
            "threads": torch.get_num_threads(),
            **rank_states.gather(self._rng_state, self._step_start[1]),
        }

    def _load_loop_state(self, prepared: PreparedRun) -> None:
        """Load the loop state of the checkpoint from which the run resumes."""
        state = self._checkpoints.loop_state()
        self.step = self.done = state["done"]
        self.stop_early = state["stop_early"]
        self._memo, self._num_updates = state["memo"], state["num_updates"]
        self._save_point_index, self._results = state["save_point_index"], state["results"]
        self.stages.seconds = state["stages"]
        self._rng_state, flops_before_step = rank_states.load(state, self._config.seed)
        self._step_start = (time.perf_counter() - state["seconds"], flops_before_step)
        self.budget.spent = state["spent"]
        self._monitors.load_state_dict(state["monitors"])
        self._evaluated_step = state["evaluated_step"]
        if self._evaluator is not None:
            self._evaluator.load_state_dict(state["evaluator"])
        self._checkpoints.best = state["best"]
        log_resumption(prepared, self.run, self.done, state["threads"], len(state["rng"]))
