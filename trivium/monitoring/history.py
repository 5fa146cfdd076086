"""What a monitor remembers between steps: recent values, first values, and whether it has spoken.

Plain lists and numbers, so that a checkpoint can hold them as JSON and a resumed run raises the
same alarms. What is judged by them is for ``monitor_rules``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any


@dataclass(frozen=True)
class Series:
    """Values of one metric at successive steps, oldest first."""

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
    def at(self) -> str:
        """The steps in words: ``step 3`` or ``steps 3–7``."""
        first, last = int(self.points[0][0]), int(self.points[-1][0])
        return f"step {first}" if first == last else f"steps {first}–{last}"


@dataclass
class Memory:
    """One monitor's memory.

    Attributes:
        recent: the last points (step, value) of each metric, as many as were asked for.
        first: the first points of each metric.
        notes: what else a rule keeps.
        raised: whether the alarm was raised and its condition has not been gone for long.
        clear_since: the step since which the condition is gone.
    """

    recent: dict[str, list[list[float]]] = field(default_factory=dict)
    first: dict[str, list[list[float]]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    raised: bool = False
    clear_since: int | None = None

    def begins(self, holds: bool, step: int, again_after: int) -> bool:
        """Whether an alarm is due, now that its condition holds, or does not, at `step`."""
        if not holds:
            if self.clear_since is None:
                self.clear_since = step
            return False
        gone = self.clear_since is not None and step - self.clear_since >= again_after
        self.clear_since = None
        due = not self.raised or gone
        self.raised = True
        return due

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Memory:
        """The memory that `state()` came from."""
        return cls(**deepcopy(dict(state)))


class View:
    """The numbers of one step, or of one evaluation, and what a monitor remembers of earlier ones.

    Asking for a metric remembers it. A number that is absent, or not finite, answers None.
    """

    def __init__(self, step: int, numbers: Mapping[str, float], memory: Memory) -> None:
        self.step = step
        self.numbers = numbers
        self.notes = memory.notes
        self._memory = memory

    def get(self, name: str) -> float | None:
        """This step's value."""
        return self.numbers.get(name)

    def history(self, name: str, most: int) -> Series | None:
        """The last values up to this step's, at most so many; None where this step has none."""
        if name not in self.numbers:
            return None
        points = self._memory.recent.setdefault(name, [])
        points.append([self.step, self.numbers[name]])
        del points[:-most]
        return Series(list(points))

    def last(self, name: str, window: int) -> Series | None:
        """The last `window` values; None before there are so many, or where this step has none."""
        series = self.history(name, window)
        return series if series is not None and len(series.points) == window else None

    def start(self, name: str, window: int) -> Series | None:
        """The first `window` values of the run; None before there are so many."""
        points = self._memory.first.setdefault(name, [])
        if len(points) < window and name in self.numbers:
            points.append([self.step, self.numbers[name]])
        return Series(list(points)) if len(points) >= window else None
