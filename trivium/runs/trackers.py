"""Experiment trackers that receive a copy of the metrics: TensorBoard, Weights & Biases, trackio.

Each one is an optional dependency (``pip install 'trivium[tensorboard]'``). The run directory holds
every metric without them. Their own settings come from their own environment variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from trivium import distributed
from trivium.config.base import Configuration
from trivium.errors import ConfigurationError
from trivium.runs.store import Run
from trivium.runs.tracker_config import TrackerName


class Tracker(Protocol):
    """Receiver of a run's metrics."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ConfigurationError if the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigurationError(
                f"run.trackers names {name}, which is not installed: "
                f"pip install 'trivium[{name}]', or leave it out"
            )


def open_trackers(
    names: Sequence[TrackerName], run: Run, resolved: Configuration, done: int = 0
) -> list[Tracker]:
    """Open the named trackers for a run whose first ``done`` steps they have received before.

    Of several processes the first sends metrics to them.
    """
    require_trackers(names)
    if distributed.rank() > 0:
        return []
    settings = resolved.model_dump(mode="json")
    return [OPENERS[name](run, settings, done) for name in names]


class TensorBoard:
    """Event files in the run directory, for ``tensorboard --logdir runs``."""

    def __init__(self, run: Run, settings: Mapping[str, Any], done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1)
        self._writer.add_text("configuration", f"```\n{dict(settings)}\n```")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class HostedTracker:
    """Weights & Biases or trackio, which share one interface. A resumed run keeps its entry."""

    def __init__(self, module: str, run: Run, settings: Mapping[str, Any], **options: Any) -> None:
        self._module = import_module(module)
        self._module.init(
            project="trivium", name=run.path.name, config=dict(settings), resume="allow", **options
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


OPENERS: dict[str, Callable[[Run, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda run, settings, done: HostedTracker(
        "wandb", run, settings, dir=str(run.path), id=run.run_id
    ),
    "trackio": lambda run, settings, done: HostedTracker("trackio", run, settings),
}
