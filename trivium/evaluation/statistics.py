"""What is made of an evaluation's responses: intervals, win rates, pass@k, repetition."""

from __future__ import annotations

import math
import re
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
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    return Interval(p, min(p, center - half), max(p, center + half))


def mean_interval(values: Sequence[float], *, share: bool = True) -> Interval:
    """The mean of independent values: Wilson's interval for 0/1 values, else the normal one.

    ``share`` false says that values of 0 and 1 are no share of successes, but, for instance,
    differences that happen to be so.
    """
    n = len(values)
    if n < 1:
        raise ValueError("an interval needs at least one observation")
    if share and all(v in (0.0, 1.0) for v in values):
        return wilson(sum(values), n)
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / max(1, n - 1)
    half = Z95 * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t with 1, 2, … degrees of freedom."""


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of a few independent values with Student's interval."""
    n = len(values)
    if n < 2:
        raise ValueError("Student's interval needs at least two observations")
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    half = _student(n - 1) * math.sqrt(variance / n)
    return Interval(mean, mean - half, mean + half)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; beyond the table by its expansion in 1/freedom."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    z = Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def wins(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> list[float]:
    """For each prompt, how often a response of mine beats one of theirs; ties count half.

    All pairs of the prompt's responses are compared, so a prompt is one observation in [0, 1].
    """
    found = []
    for a, b in zip(mine, theirs, strict=True):
        points = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
        found.append(points / (len(a) * len(b)))
    return found


def pass_at_k(n: int, passed: int, k: int) -> float:
    """The chance that one of k responses passes, unbiased, from n ≥ k of which ``passed`` do.

    ``1 − C(n − passed, k)/C(n, k)`` (Chen et al. 2021, eq. 1).
    """
    if not 0 <= passed <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} responses, {passed} of which pass, is not defined")
    return 1.0 - math.comb(n - passed, k) / math.comb(n, k)


def distinct_words(texts: Sequence[str]) -> float:
    """Mean share of distinct words in a text; texts without words are left out (1.0 if all are)."""
    shares = [len(set(words)) / len(words) for words in map(_words, texts) if words]
    return sum(shares) / len(shares) if shares else 1.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Mean share of a text's word n-grams that occurred in it before; 0.0 where there are none."""
    shares = []
    for words in map(_words, texts):
        grams = list(zip(*(words[i:] for i in range(n)), strict=False))
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
