"""When a run's state is saved, what it is made of, and what is kept of it.

    state = the loop_state (``training.run_loop``: step, spending, monitors, what is done of a step)
          + every object that a loop asked to keep (weights, optimizer, reference, …)

Left out: the files (``runs.checkpoint``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from trivium.config.renamed import RENAMED_METRICS
from trivium.errors import ConfigurationError
from trivium.models.cpu.linear import matmul_backend
from trivium.runs.checkpoint import Checkpoint, Checkpoints, Place
from trivium.runs.checkpoint_config import CheckpointsConfig
from trivium.runs.store import Run

logger = logging.getLogger(__name__)

LOOP_STATE, LOGS, NUMERICS = "loop_state", "logs", "matmul_backend"
_SHARE = 25
"""Save no sooner than after so many times what the last save took."""


class Stateful(Protocol):
    """Something that changes while a run goes on."""

    def state_dict(self) -> Any:
        """All that its future depends on, as ``trivium.serialization`` takes it."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Be as it was."""
        ...


@runtime_checkable
class Saveable(Protocol):
    """A model that can write itself."""

    def save(self, directory: Path) -> None: ...


class CheckpointManager:
    """Saves one run's state, and gives it back when the run goes on.

    Args:
        run: the run.
        config: when to save and what to keep.
        shared_objects: objects that states may name by their places, such as the run's prompts.
        checkpoint: where the run goes on from; None where it begins.

    Attributes:
        best: the best evaluation so far: its value, step, and the checkpoint's name.
        saved: the last saved place.
        saves, seconds: how often this process saved, and how long it took in all.
    """

    def __init__(
        self,
        run: Run,
        config: CheckpointsConfig,
        shared_objects: Sequence[object],
        checkpoint: Checkpoint | None,
    ) -> None:
        self.config = config
        self._run = run
        self._shared_objects = shared_objects
        self._checkpoint = checkpoint
        self._checkpoints = Checkpoints(run.path, run.identity)
        self._objects: dict[str, Stateful] = {}
        self.saved = checkpoint.place if checkpoint else Place(0)
        self._at = time.monotonic()
        self._took = 0.0
        self.saves, self.seconds = 0, 0.0
        self.best: dict[str, Any] | None = None

    @property
    def model(self) -> Stateful | None:
        """The model that is trained: what the loop keeps first."""
        return next(iter(self._objects.values()), None)

    def loop_state(self) -> Any:
        """The loop_state that was saved; None where the run begins."""
        return (
            None
            if self._checkpoint is None
            else self._checkpoint.part(LOOP_STATE, self._shared_objects)
        )

    def track(self, objects: Mapping[str, Stateful]) -> None:
        """Make these part of the state; where the run goes on, they are at once as they were."""
        self._objects |= objects
        if self._checkpoint is None:
            return
        for name, thing in objects.items():
            if name in self._checkpoint:
                thing.load_state_dict(self._checkpoint.part(name, self._shared_objects))

    def has(self, place: Place) -> bool:
        """Whether the last state that was saved is of this place."""
        return place == self.saved

    def due(self, place: Place) -> bool:
        """Whether to save now, by the steps or by the clock."""
        if self.has(place):
            return False
        if self.config.steps is not None:
            return place.pause == 0 and place.step % self.config.steps == 0
        waited = time.monotonic() - self._at
        return waited >= max(self.config.seconds, _SHARE * self._took)

    def save(self, place: Place, loop_state: Mapping[str, Any]) -> None:
        """Save the state.

        Raises:
            OSError: the disk is full or cannot be written; what was saved before is still there.
        """
        began = time.monotonic()
        try:
            parts = {name: thing.state_dict() for name, thing in self._objects.items()}
            own = {LOGS: self._run.written(), NUMERICS: matmul_backend.name, LOOP_STATE: loop_state}
            self._checkpoints.write(place, own | parts, self._shared_objects)
            self.saved = place
            self._checkpoints.prune(self.config.keep, self.best["name"] if self.best else None)
        finally:
            self._at = time.monotonic()
            self._took = self._at - began
            self.saves += 1
            self.seconds += self._took

    def try_to_save(self, place: Place, loop_state: Mapping[str, Any]) -> bool:
        """Save the state, or say why it cannot be: a run goes on without."""
        try:
            self.save(place, loop_state)
        except OSError as error:
            reason = f"the run's state cannot be saved: {error.strerror or error}"
            logger.warning("%s; the run goes on, and could go on from %s", reason, self.saved)
            self._run.event("not_saved", reason, step=place.step)
            return False
        return True

    def is_best(self, place: Place, record: Mapping[str, Any]) -> bool:
        """Whether an evaluation is the best so far, by the number that the user chose."""
        name = self.config.best
        if name is None:
            return False
        value = record.get(name)
        if not isinstance(value, int | float):
            if name in RENAMED_METRICS:
                raise ConfigurationError(
                    f"run.checkpoints.best = {name}: this metric is now "
                    f"{RENAMED_METRICS[name]}: write that instead"
                )
            numbers = [key for key, x in record.items() if isinstance(x, int | float)]
            raise ConfigurationError(
                f"run.checkpoints.best = {name}: this run's evaluations measure "
                f"{', '.join(numbers)}; name one of them"
            )
        better = self.best is None or (
            (value > self.best["value"]) == (self.config.best_is == "highest")
            and value != self.best["value"]
        )
        if better:
            self.best = {"value": value, "step": place.step, "name": place.name}
        return better
