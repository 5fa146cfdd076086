"""Intervals for what an evaluation measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def wilson(successes: float, n: int) -> Interval:
    """The Wilson score interval of a proportion (Wilson 1927)."""
    if n < 1:
        raise ValueError("an interval needs at least one observation")
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return Interval(p, min(p, centre - half), max(p, centre + half))


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values: Wilson's interval for 0/1 values, else the normal one."""
    n = len(values)
    if n < 1:
        raise ValueError("an interval needs at least one observation")
    if all(v in (0.0, 1.0) for v in values):
        return wilson(sum(values), n)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)
