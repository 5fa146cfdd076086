"""Criteria for methods that are level in quality: alarms, KL and cost.

A difference counts only if it is clear. Alarms: one method raised them in most of its runs, and the
other in none. KL and costs: they differ by a stated factor, and by more than their spread between
seeds. The seconds of two equal runs often differ by a tenth or two, and their KL as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from trivium.maths.distributions import student_quantile

Method = dict[str, Any]
Lower = Callable[[Method, Method], bool]
"""Whether the first method's quality seems lower than the second's, if not significantly."""

FACTOR = 1.5
"""Smallest factor that counts with several seeds, whose spread is measured."""
ONE_SEED_FACTOR = 2.0
"""Smallest factor of KL and time that counts with one seed, whose spread is unknown."""


@dataclass(frozen=True)
class Criterion:
    """One criterion, of which less is better.

    Attributes:
        values: its value in every run; None if it was not measured.
        words: the difference in words, from the larger value, the smaller one and their ratio.
        floor: smaller values count as this.
        ends: the ends of the interval over prompts in every run, if there is one.
        one_seed: smallest factor that counts with one seed.
    """

    name: str
    values: Callable[[Method], list[float] | None]
    words: Callable[[float, float, float], str]
    floor: float
    ends: Callable[[Method], list[tuple[float, float]]] = lambda _: []
    one_seed: float = FACTOR

    def worse(self, one: Method, other: Method) -> bool:
        """Return whether ``one`` is clearly worse than ``other``."""
        values, others = self.values(one), self.values(other)
        if values is None or others is None:
            return False
        logs = [[math.log(max(v, self.floor)) for v in each] for each in (values, others)]
        ratio = fmean(logs[0]) - fmean(logs[1])
        several = min(map(len, logs)) > 1
        if ratio < math.log(FACTOR if several else self.one_seed):
            return False
        return self._beyond_prompts(one, other) and (not several or ratio > _spread(*logs))

    def _beyond_prompts(self, one: Method, other: Method) -> bool:
        """Return whether the difference exceeds the intervals over prompts."""
        values, others = self.ends(one), self.ends(other)
        if not values or not others:
            return True
        gap = fmean(map(fmean, values)) - fmean(map(fmean, others))
        return gap > math.hypot(_half_width(values), _half_width(others))

    def mean(self, method: Method) -> float:
        """Return the mean over runs; 0 if it was not measured."""
        return fmean(self.values(method) or [0.0])

    def describe(self, one: Method, other: Method) -> str:
        """Return in words by how much ``one`` is worse than ``other``."""
        large, small = self.mean(one), self.mean(other)
        return self.words(large, small, large / max(small, self.floor))


class Alarms(Criterion):
    """Share of the runs that raised an alarm."""

    def worse(self, one: Method, other: Method) -> bool:
        raised, others = self.values(one), self.values(other)
        return fmean(raised or [0.0]) > 0.5 and not any(others or [])

    def describe(self, one: Method, other: Method) -> str:
        runs = [run for run in one["runs"] if run["alarms"]]
        names = sorted({alarm["monitor"] for run in runs for alarm in run["alarms"]})
        where = f" in {len(runs)} of {len(one['runs'])} runs" if len(one["runs"]) > 1 else ""
        return f"alarms{where} ({', '.join(names)})"


def _spread(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the half-width of Student's 95 % interval of the difference of two means."""
    df = len(one) + len(other) - 2
    pooled = ((len(one) - 1) * variance(one) + (len(other) - 1) * variance(other)) / df
    return student_quantile(0.975, df) * math.sqrt(pooled * (1 / len(one) + 1 / len(other)))


def _half_width(ends: Sequence[tuple[float, float]]) -> float:
    """Return the half-width of the interval of the mean over seeds."""
    return math.hypot(*((high - low) / 2 for low, high in ends)) / len(ends)


def _alarms(method: Method) -> list[float]:
    return [float(bool(run["alarms"])) for run in method["runs"]]


def _kl(method: Method) -> list[float] | None:
    values = [run["final"].get("kl") for run in method["runs"]]
    return None if None in values else values


def _kl_ends(method: Method) -> list[tuple[float, float]]:
    ends = [(run["final"].get("kl_low"), run["final"].get("kl_high")) for run in method["runs"]]
    return [] if any(None in each for each in ends) else ends


def _spent(currency: str) -> Callable[[Method], list[float]]:
    return lambda method: [run["spent"][currency] for run in method["runs"]]


def _responses(method: Method) -> list[float]:
    return [float(method.get("best_of") or 1)] * len(method["runs"])


def _times(what: str) -> Callable[[float, float, float], str]:
    def words(large: float, small: float, ratio: float) -> str:
        return (
            f"{ratio:.1f} times the {what}" if small > 0 else f"{large:,.0f} {what}, against none"
        )

    return words


KL = Criterion("KL", _kl, _times("KL"), 0.1, _kl_ends, ONE_SEED_FACTOR)
CRITERIA = (
    Alarms("alarms", _alarms, lambda *_: "", 0.0),
    KL,
    Criterion("time", _spent("seconds"), _times("time"), 1e-9, one_seed=ONE_SEED_FACTOR),
    Criterion("generated tokens", _spent("generated_tokens"), _times("generated tokens"), 1.0),
    Criterion(
        "responses per prompt",
        _responses,
        lambda large, small, _: f"{large:g} responses per prompt instead of {small:g}",
        1.0,
    ),
)


def preferred(one: Method, other: Method, lower: Lower) -> bool:
    """Return whether ``one`` is clearly better in one criterion, and worse in none."""
    if lower(one, other) or any(c.worse(one, other) for c in CRITERIA):
        return False
    return any(c.worse(other, one) for c in CRITERIA)


def not_surpassed(methods: Sequence[Method], lower: Lower) -> list[Method]:
    """Return the methods to which no other is preferred; all of them if they go in a circle."""
    kept = [m for m in methods if not any(preferred(o, m, lower) for o in methods if o is not m)]
    return kept or list(methods)


def disadvantages(method: Method, others: Sequence[Method], lower: Lower) -> str:
    """Return in one line where a method is worse than the best of the others; or ""."""
    parts = ["perhaps lower quality"] if any(lower(method, other) for other in others) else []
    for criterion in CRITERIA:
        better = [other for other in others if criterion.worse(method, other)]
        if better:
            best = min(better, key=criterion.mean)
            of = f" of {best['name']}" if len(others) > 1 else ""
            parts.append(criterion.describe(method, best) + of)
    return f"{method['name']}: {', '.join(parts)}" if parts else ""
