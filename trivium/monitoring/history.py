"""Metric history that a monitor keeps between steps: recent values, first values, alarm state.

The state holds plain lists and numbers, so a checkpoint can store it as JSON and a resumed run
raises the same alarms. The conditions of the alarms are in ``monitoring.rules``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any


@dataclass(frozen=True)
class Series:
    """Values of one metric at successive steps, oldest first, as (step, value) points."""

    points: list[list[float]]

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def steps(self) -> str:
        """Range of steps as text: ``step 3`` or ``steps 3–7``."""
        first, last = int(self.points[0][0]), int(self.points[-1][0])
        return f"step {first}" if first == last else f"steps {first}–{last}"


@dataclass
class MonitorState:
    """State of one monitor between steps.

    Attributes:
        recent: the last points (step, value) of each metric, up to the largest requested window.
        first: the first points of each metric.
        rule_state: other JSON values that the monitor's rule keeps.
        raised: whether the alarm has been raised.
        clear_since: the first step at which the condition no longer held; None while it holds.
    """

    recent: dict[str, list[list[float]]] = field(default_factory=dict)
    first: dict[str, list[list[float]]] = field(default_factory=dict)
    rule_state: dict[str, Any] = field(default_factory=dict)
    raised: bool = False
    clear_since: int | None = None

    def should_raise(self, condition: bool, step: int, again_after: int) -> bool:
        """Update the alarm state with the condition at `step` and return whether to raise it.

        An alarm is raised when its condition first holds, and again only after the condition has
        not held for `again_after` steps.
        """
        if not condition:
            if self.clear_since is None:
                self.clear_since = step
            return False
        cleared = self.clear_since is not None and step - self.clear_since >= again_after
        self.clear_since = None
        due = not self.raised or cleared
        self.raised = True
        return due

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> MonitorState:
        """Return the state that `state_dict` saved."""
        return cls(**deepcopy(dict(state)))


class MetricHistory:
    """Metrics of the current step or evaluation, with the history that one monitor keeps.

    Requesting a metric's history stores its current value. A metric that is absent or not finite
    has no value: the methods return None. ``outcomes`` are the rewards of an evaluation.
    """

    def __init__(
        self,
        step: int,
        metrics: Mapping[str, float],
        state: MonitorState,
        *,
        half_precision: bool = False,
        outcomes: Mapping[str, Any] | None = None,
    ) -> None:
        self.step, self.half_precision = step, half_precision
        self.outcomes = outcomes or {}
        self.metrics = metrics
        self.rule_state = state.rule_state
        self._state = state

    def current(self, name: str) -> float | None:
        """Return the metric's value at this step."""
        return self.metrics.get(name)

    def recent(self, name: str, max_points: int) -> Series | None:
        """Return up to `max_points` last values; None if the metric is absent at this step."""
        if name not in self.metrics:
            return None
        points = self._state.recent.setdefault(name, [])
        points.append([self.step, self.metrics[name]])
        del points[:-max_points]
        return Series(list(points))

    def window(self, name: str, size: int) -> Series | None:
        """Return the last `size` values; None if there are fewer or the metric is absent now."""
        series = self.recent(name, size)
        return series if series is not None and len(series.points) == size else None

    def first(self, name: str, size: int) -> Series | None:
        """Return the first `size` values of the run; None if there are fewer so far."""
        points = self._state.first.setdefault(name, [])
        if len(points) < size and name in self.metrics:
            points.append([self.step, self.metrics[name]])
        return Series(list(points)) if len(points) >= size else None
