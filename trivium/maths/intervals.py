"""Confidence intervals of means: of shares, of bounded values, and of values without bounds.

They are honest for few values, for shares near 0 and 1, and for values that are all equal
(docs/internals/intervals.md has their coverage).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from trivium.maths.distributions import at_least, solve, student_quantile

Bounds = tuple[float, float]
SHARE: Bounds = (0.0, 1.0)
"""Bounds of the mean of shares, or of successes and failures."""
UNBOUNDED: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True)
class Interval:
    """Mean with its confidence interval; the ends are infinite if the values do not tell."""

    mean: float
    low: float
    high: float

    def ends(self) -> tuple[float | None, float | None]:
        """Return both ends for a JSON file: None if they are infinite."""
        return _or_none(self.low), _or_none(self.high)


@lru_cache(maxsize=4096)
def share_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return Blaker's interval of a proportion (Blaker 2000).

    It holds the proportions p whose acceptability exceeds α: the smaller of ``P(X ≥ x)`` and
    ``P(X ≤ x)``, plus the largest probability of the other tail that is no larger. It covers every
    proportion with at least the confidence, and lies within the interval of Clopper and Pearson.
    """
    _require_values(n)
    alpha = 1 - confidence
    low, high = _blaker_low(successes, n, alpha), 1 - _blaker_low(n - successes, n, alpha)
    return Interval(successes / n, low, high)


def _blaker_low(successes: int, n: int, alpha: float) -> float:
    """Return the smallest acceptable proportion.

    At Clopper and Pearson's end, ``P(X ≥ x)`` is α/2 and the acceptability at most α. It rises
    with p, and jumps above α where the tail ``P(X ≤ k)`` of the next k is as small as ``P(X ≥ x)``.
    """
    if successes == 0:
        return 0.0

    def upper(p: float) -> float:
        return at_least(successes, n, p)

    start = solve(upper, alpha / 2, 0.0, 1.0)
    k = bisect_right(range(successes), alpha / 2, key=lambda k: 1 - at_least(k + 1, n, start)) - 1

    def lower(p: float) -> float:
        return 1 - at_least(k + 1, n, p)

    jump = solve(lambda p: upper(p) - (1 - at_least(k + 2, n, p)), 0.0, start, 1.0)
    return min(jump, solve(lambda p: upper(p) + lower(p), alpha, start, jump))


def mean_interval(
    values: Sequence[float], *, bounds: Bounds | None = None, confidence: float = 0.95
) -> Interval:
    """Return the mean of independent values with its interval.

    - Successes and failures (0 and 1): Blaker's interval.
    - Other bounded values: Student's interval over the values and one further value at each bound
      (Agresti and Caffo 2000; for paired differences Bonett and Price 2012), within the bounds.
      The two values stand for what few observations cannot exclude, so that equal values have an
      interval, too. It is about 3/n of the range wide.
    - Unbounded values: Student's interval. A single value, or equal values, have none: its ends are
      infinite.

    Args:
        values: the values, at least one.
        bounds: least and largest value that is possible, such as ``SHARE`` or ``UNBOUNDED``;
            by default 0 and 1 if all values are between them, and otherwise none.
        confidence: probability that the interval covers the mean.
    """
    _require_values(len(values))
    bounds = bounds or value_bounds(values)
    if bounds == SHARE and all(v in (0.0, 1.0) for v in values):
        return share_interval(int(sum(values)), len(values), confidence)
    mean = math.fsum(values) / len(values)
    if bounds == UNBOUNDED:
        return _student(values, mean, confidence)
    padded = _student([*values, *bounds], mean, confidence)
    return Interval(mean, max(bounds[0], padded.low), min(bounds[1], padded.high))


def _student(values: Sequence[float], mean: float, confidence: float) -> Interval:
    """Return Student's interval of these values, widened to contain ``mean``."""
    n = len(values)
    center = math.fsum(values) / n
    variance = math.fsum((v - center) ** 2 for v in values) / max(1, n - 1)
    if min(values) == max(values):
        return Interval(mean, *UNBOUNDED)
    half = student_quantile((1 + confidence) / 2, n - 1) * math.sqrt(variance / n)
    return Interval(mean, min(mean, center - half), max(mean, center + half))


def value_bounds(values: Sequence[float]) -> Bounds:
    """Return 0 and 1 if all values are between them, and otherwise no bounds."""
    return SHARE if all(0 <= v <= 1 for v in values) else UNBOUNDED


def _require_values(n: int) -> None:
    if n < 1:
        raise ValueError("an interval needs at least one observation, but there are 0")


def _or_none(end: float) -> float | None:
    return end if math.isfinite(end) else None
