"""Checkpoint manager: decides when to save a run's state, assembles it, and loads it on resume.

    state = log positions + numerics state
          + loop state (``training.run_loop``: step, budget, monitors, results inside a step)
          + the state of every tracked object (weights, optimizer, reference, …)

The files of a checkpoint are written by ``runs.checkpoint``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError

from trivium import distributed
from trivium.config.renamed import RENAMED_METRICS
from trivium.errors import ConfigurationError, TrainingError
from trivium.hf.saving import SaveCheck
from trivium.runs.checkpoint import Checkpoint, Checkpoints, SavePoint
from trivium.runs.checkpoint_config import CheckpointsConfig
from trivium.runs.store import Run

logger = logging.getLogger(__name__)

LOOP_STATE, LOGS, NUMERICS = "loop_state", "logs", "numerics"
AVERAGE, AVERAGE_PREFIX = "ema", "ema/"
"""Name of the tracked average of the weights, and how the names of its metrics begin."""
MIN_INTERVAL_PER_SAVE = 25
"""The interval between two saves is at least this many times the duration of the last save."""


class Stateful(Protocol):
    """An object whose state is part of a checkpoint."""

    def state_dict(self) -> Any:
        """Return the state, as values that ``trivium.serialization`` accepts."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Load a state that ``state_dict`` returned."""
        ...


@runtime_checkable
class Saveable(Protocol):
    """A model that can be saved to a directory."""

    def save(self, directory: Path) -> SaveCheck | None:
        """Save the model; return how it was compared with the trained one, if it was."""
        ...


class CheckpointManager:
    """Saves the state of one run, and loads it when the run resumes.

    Args:
        run: the run.
        config: when to save, and which checkpoints to keep.
        shared_objects: objects that a state refers to by index, such as the run's prompts.
        checkpoint: checkpoint from which the run resumes; None for a new run.
        numerics_state: returns the settings that decide how the process rounds. They are saved
            under ``NUMERICS``, and must be loaded before the models are.

    Attributes:
        best: value, step and checkpoint name of the best evaluation so far.
        last_saved: save point of the last checkpoint.
        num_saves, save_seconds: number and total duration of the saves of this process.
    """

    def __init__(
        self,
        run: Run,
        config: CheckpointsConfig,
        shared_objects: Sequence[object],
        checkpoint: Checkpoint | None,
        numerics_state: Callable[[], Any],
    ) -> None:
        self.config = config
        self._run = run
        self._shared_objects = shared_objects
        self._checkpoint = checkpoint
        self._numerics_state = numerics_state
        self._checkpoints = Checkpoints(run.path, run.run_id)
        self._tracked: dict[str, Stateful] = {}
        self.last_saved = checkpoint.save_point if checkpoint else SavePoint(0)
        self._last_save_time = time.monotonic()
        self._last_save_seconds = 0.0
        self.num_saves, self.save_seconds = 0, 0.0
        self.best: dict[str, Any] | None = None

    @property
    def model(self) -> Stateful | None:
        """The model that is trained: the first tracked object."""
        return next(iter(self._tracked.values()), None)

    @property
    def best_model(self) -> Stateful | None:
        """The model that the metric of the configuration measures: the average for ``ema/…``."""
        measures_average = (self.config.best or "").startswith(AVERAGE_PREFIX)
        return self._tracked[AVERAGE] if measures_average else self.model

    def loop_state(self) -> Any:
        """Return the saved loop state; None for a new run."""
        return (
            None
            if self._checkpoint is None
            else self._checkpoint.load(LOOP_STATE, self._shared_objects)
        )

    def track(self, objects: Mapping[str, Stateful]) -> None:
        """Add objects to the saved state. On resume, load their saved states at once."""
        self._tracked |= objects
        if self._checkpoint is None:
            return
        for name, tracked in objects.items():
            if name in self._checkpoint:
                tracked.load_state_dict(self._checkpoint.load(name, self._shared_objects))

    def is_saved(self, save_point: SavePoint) -> bool:
        """Return whether the last checkpoint is of this save point."""
        return save_point == self.last_saved

    def due(self, save_point: SavePoint) -> bool:
        """Return whether to save now, by the number of steps or by the clock."""
        if self.is_saved(save_point):
            return False
        if self.config.steps is not None:
            return save_point.index == 0 and save_point.step % self.config.steps == 0
        waited = time.monotonic() - self._last_save_time
        return waited >= max(self.config.seconds, MIN_INTERVAL_PER_SAVE * self._last_save_seconds)

    def save(self, save_point: SavePoint, loop_state: Mapping[str, Any]) -> None:
        """Save the state.

        Raises:
            OSError: the disk is full or cannot be written. Earlier checkpoints are unharmed.
        """
        start = time.monotonic()
        try:
            tracked = {name: tracked.state_dict() for name, tracked in self._tracked.items()}
            own = {
                LOGS: self._run.log_positions(),
                NUMERICS: self._numerics_state(),
                LOOP_STATE: loop_state,
            }
            self._checkpoints.write(save_point, own | tracked, self._shared_objects)
            self.last_saved = save_point
            self._checkpoints.prune(self.config.keep, self.best["name"] if self.best else None)
        finally:
            self._last_save_time = time.monotonic()
            self._last_save_seconds = self._last_save_time - start
            self.num_saves += 1
            self.save_seconds += self._last_save_seconds

    def save_model(self, name: str, model: Saveable | None) -> None:
        """Save a model atomically to ``name`` in the run directory; None is left out.

        One process writes.

        Raises:
            TrainingError: the model cannot be written. The run can be resumed later.
        """
        if model is not None:
            distributed.from_rank_0("a model's files", lambda: self._save_model(name, model))

    def _save_model(self, name: str, model: Saveable) -> None:
        try:
            with self._run.saving(name) as directory:
                check = model.save(directory)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TrainingError(
                f"{self._run.path / name}: cannot be written: {reason}; free disk space, then "
                f"resume from {self.last_saved}: trivium resume {self._run.path}"
            ) from error
        if check is not None:
            self._run.event("compared", check.message, name=name, **check.fields())
            if check.message:
                logger.warning("%s: %s", self._run.path / name, check.message)

    def finish(self, step: int) -> None:
        """Log that the run has finished, and delete the checkpoints that it no longer needs."""
        seconds = round(self.save_seconds, 3)
        self._run.event("finished", step=step, saves=self.num_saves, saving_seconds=seconds)
        keep = self.config.keep_finished
        self._checkpoints.prune(keep, self.best["name"] if self.best and keep else None)

    def try_to_save(self, save_point: SavePoint, loop_state: Mapping[str, Any]) -> bool:
        """Save the state, or log why it cannot be saved. Return whether it was saved.

        One process writes.
        """
        saved = distributed.from_rank_0(
            "a checkpoint", lambda: self._try_to_save(save_point, loop_state)
        )
        if saved:
            self.last_saved = save_point
        return saved

    def _try_to_save(self, save_point: SavePoint, loop_state: Mapping[str, Any]) -> bool:
        try:
            self.save(save_point, loop_state)
        except OSError as error:
            reason = f"the run's state cannot be saved: {error.strerror or error}"
            logger.warning(
                "%s; training continues, and the last checkpoint is %s", reason, self.last_saved
            )
            self._run.event("not_saved", reason, step=save_point.step)
            return False
        return True

    def is_best(self, save_point: SavePoint, record: Mapping[str, Any]) -> bool:
        """Return whether an evaluation is the best so far, by the metric of the configuration."""
        name = self.config.best
        if name is None:
            return False
        value = record.get(name)
        if not isinstance(value, int | float):
            raise _not_measured(name, record)
        better = self.best is None or (
            (value > self.best["value"]) == (self.config.best_is == "highest")
            and value != self.best["value"]
        )
        if better:
            self.best = {"value": value, "step": save_point.step, "name": save_point.name}
        return better


def require_evaluation(config: CheckpointsConfig, evaluator: Stateful | None) -> None:
    """Raise ConfigurationError if the best checkpoint is to be kept and nothing measures it."""
    if config.best is not None and evaluator is None:
        raise ConfigurationError(
            f"run.checkpoints.best = {config.best}: this run has no held-out evaluation; leave "
            "best out, or configure held-out data"
        )


def _not_measured(name: str, record: Mapping[str, Any]) -> ConfigurationError:
    """Return the error for a ``run.checkpoints.best`` that is no number of the evaluation."""
    if name in RENAMED_METRICS:
        return ConfigurationError(
            f"run.checkpoints.best = {name}: this metric is now called {RENAMED_METRICS[name]}: "
            "write that name instead"
        )
    metrics = [key for key, value in record.items() if isinstance(value, int | float)]
    return ConfigurationError(
        f"run.checkpoints.best = {name}: this run's evaluations measure "
        f"{', '.join(metrics)}; name one of them"
    )
