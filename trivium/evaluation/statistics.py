"""Statistics of an evaluation's responses: intervals, win rates, pass@k, repetition."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Interval:
    """Mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def wilson(successes: float, n: int) -> Interval:
    """Return the Wilson score interval of a proportion (Wilson 1927)."""
    if n < 1:
        raise ValueError("an interval needs at least one observation, but there are 0")
    p = successes / n
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return Interval(p, min(p, center - half), max(p, center + half))


def mean_interval(values: Sequence[float], *, share: bool = True) -> Interval:
    """Return the mean of independent values with an interval.

    The interval is Wilson's if every value is 0 or 1, and the normal interval otherwise. Pass
    ``share=False`` if the values are not successes and failures, for example differences that
    happen to be 0 or 1.
    """
    n = len(values)
    if n < 1:
        raise ValueError("an interval needs at least one observation, but there are 0")
    if share and all(v in (0.0, 1.0) for v in values):
        return wilson(sum(values), n)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom."""


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of a few independent values with Student's t interval."""
    n = len(values)
    if n < 2:
        raise ValueError("Student's t interval needs at least two observations")
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    half = _student(n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def _student(df: int) -> float:
    """Return the 97.5 % quantile of Student's t; beyond the table, its expansion in 1/df."""
    if df <= len(_STUDENT):
        return _STUDENT[df - 1]
    z = Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / df + second / df**2


def wins(rewards: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each prompt, the share of comparisons won against the base; ties count half.

    All pairs of the prompt's responses are compared, so a prompt is one observation in [0, 1].
    """
    shares = []
    for a, b in zip(rewards, base, strict=True):
        points = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
        shares.append(points / (len(a) * len(b)))
    return shares


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from n ≥ k responses, ``passed`` of which pass.

    ``1 − C(n − passed, k)/C(n, k)`` (Chen et al. 2021, eq. 1).
    """
    if not 0 <= passed <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@{k} of {n} responses, {passed} of which pass, is not defined: give "
            "0 <= passed <= n and 1 <= k <= n"
        )
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def distinct_words(texts: Sequence[str]) -> float:
    """Return the mean share of distinct words in a text.

    Texts without words are left out; the result is 1.0 if no text has words.
    """
    shares = [len(set(words)) / len(words) for words in map(_words, texts) if words]
    return sum(shares) / len(shares) if shares else 1.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Return the mean share of a text's word n-grams that occur earlier in it; 0.0 if none."""
    shares = []
    for words in map(_words, texts):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
