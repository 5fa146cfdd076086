"""Quantiles of Student's t and tails of the binomial, from the incomplete beta function.

Trivium depends on no library of statistics; the tests compare these functions with tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

_LARGE = 1e6
"""Degrees of freedom from which the normal quantile is within 1e-5 of Student's."""
_TINY = 1e-300
_MAX_TERMS = 20_000


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return ``I_x(a, b)`` for positive a and b, from its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(b, a, 1 - x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a * _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """Return the continued fraction of ``I_x(a, b)``, by Lentz's algorithm."""
    result = d = 1 / _nonzero(1 - (a + b) * x / (a + 1))
    c = 1.0
    for m in range(1, _MAX_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = result
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            result *= c * d
        if abs(result - before) <= 1e-15 * abs(result):
            break
    return result


def _nonzero(x: float) -> float:
    return x if abs(x) > _TINY else _TINY


@lru_cache(maxsize=1024)
def student_quantile(probability: float, df: float) -> float:
    """Return the quantile of Student's t with ``df`` ≥ 1 degrees of freedom, for p above ½."""
    if not 0.5 < probability < 1 or not df >= 1:
        raise ValueError(f"p = {probability}, df = {df}: give ½ < p < 1 and df ≥ 1")
    normal = NormalDist().inv_cdf(probability)
    if df > _LARGE:
        return normal

    def cumulative(t: float) -> float:
        return 1 - incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2

    high = 2 * normal
    while cumulative(high) < probability:
        high *= 2
    return solve(cumulative, probability, normal, high)


def at_least(successes: int, n: int, p: float) -> float:
    """Return the probability of at least ``successes`` in n trials, each with probability p."""
    if successes <= 0:
        return 1.0
    return incomplete_beta(successes, n - successes + 1, p) if successes <= n else 0.0


def solve(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return where a rising function reaches a target, by bisection; an end if it does not."""
    for _ in range(60):
        middle = (low + high) / 2
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2
