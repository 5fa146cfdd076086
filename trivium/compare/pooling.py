"""Pool the seeds of a comparison: the quality of each method, and paired differences.

A method has one row of values per seed: the quality at every held-out prompt. Two or three seeds do
not show how much seeds vary (Student's interval of two is 13 times as wide as that of many). Their
interval is over prompts, given the trained models. From ``MIN_SEEDS`` seeds on, it includes the
spread between seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from trivium.maths.distributions import student_quantile
from trivium.maths.intervals import SHARE, UNBOUNDED, Bounds, Interval, mean_interval

Record = dict[str, Any]
Rows = Sequence[Sequence[float]]

MIN_SEEDS = 4
"""Number of seeds from which an interval includes the spread between seeds."""
CONFIDENCE = 0.95


def pool(rows: Rows, bounds: Bounds, confidence: float = CONFIDENCE) -> Record:
    """Return the mean over seeds and prompts with its interval, and the mean of every seed."""
    interval = over_prompts(rows, bounds, confidence)
    if len(rows) >= MIN_SEEDS:
        crossed = over_seeds(rows, confidence)
        low, high = min(interval.low, crossed.low), max(interval.high, crossed.high)
        interval = Interval(interval.mean, max(low, bounds[0]), min(high, bounds[1]))
    low, high = interval.ends()
    return {
        "mean": interval.mean,
        "low": low,
        "high": high,
        "seeds": [fmean(row) for row in rows],
        "over": "prompts" if len(rows) < MIN_SEEDS else "prompts and seeds",
    }


def over_prompts(rows: Rows, bounds: Bounds, confidence: float) -> Interval:
    """Return the interval over prompts, given the models of these seeds.

    A prompt's value is its mean over seeds. Seeds whose prompts differ in number are independent:
    the errors of their means add up in squares.
    """
    if len({len(row) for row in rows}) == 1:
        by_prompt = [fmean(column) for column in zip(*rows, strict=True)]
        return mean_interval(by_prompt, bounds=bounds, confidence=confidence)
    each = [mean_interval(row, bounds=bounds, confidence=confidence) for row in rows]
    mean = fmean(i.mean for i in each)
    below = math.hypot(*(i.mean - i.low for i in each)) / len(rows)
    above = math.hypot(*(i.high - i.mean for i in each)) / len(rows)
    return Interval(mean, mean - below, mean + above)


def over_seeds(rows: Rows, confidence: float) -> Interval:
    """Return the interval over prompts and seeds.

    Of the variance components of a prompt × seed table without repetition, the variance of the
    mean is ``(MS_seed + MS_prompt − MS_rest)/(seeds · prompts)``. This holds for seeds with the
    same prompts and for seeds with their own. Seeds whose prompts differ in number are compared by
    their means alone.
    """
    seeds, means = len(rows), [fmean(row) for row in rows]
    mean = fmean(means)
    variance = math.fsum((m - mean) ** 2 for m in means) / (seeds - 1) / seeds
    n = len(rows[0])
    if n > 1 and {len(row) for row in rows} == {n}:
        columns = [fmean(column) for column in zip(*rows, strict=True)]
        prompts = math.fsum((c - mean) ** 2 for c in columns) / (n - 1)
        rest = math.fsum(
            (x - m - c + mean) ** 2
            for row, m in zip(rows, means, strict=True)
            for x, c in zip(row, columns, strict=True)
        ) / ((n - 1) * (seeds - 1))
        variance += max(0.0, prompts - rest / seeds) / n
    half = student_quantile((1 + confidence) / 2, seeds - 1) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def pool_decodings(runs: Sequence[Mapping[str, Any]], bounds: Bounds) -> Record:
    """Return the pooled quality of greedy and of sampled responses."""
    return {name: pool(quality_rows(runs, name), bounds) for name in ("greedy", "sampled")}


def quality_rows(runs: Sequence[Mapping[str, Any]], decoding: str) -> list[list[float]]:
    """Return the quality at every prompt, for every seed; the mean of a prompt's samples."""
    if decoding == "greedy":
        return [list(run["outcomes"]["greedy"]) for run in runs]
    return [[fmean(samples) for samples in run["outcomes"]["sampled"]] for run in runs]


def reward_bounds(runs: Sequence[Mapping[str, Any]]) -> Bounds:
    """Return the bounds of quality: 0 and 1 if every reward of all runs is between them."""
    return SHARE if all(0 <= reward <= 1 for reward in _rewards(runs)) else UNBOUNDED


def quality_unit(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return "share" if every reward is 0 or 1, so that quality is a share of responses."""
    return "share" if all(reward in (0, 1) for reward in _rewards(runs)) else ""


def _rewards(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    outcomes = [run["outcomes"] for run in runs]
    greedy = [reward for o in outcomes for reward in o["greedy"]]
    return greedy + [reward for o in outcomes for row in o["sampled"] for reward in row]


def differences(methods: Sequence[Mapping[str, Any]], bounds: Bounds) -> list[Record]:
    """Return the paired difference of greedy quality for every two methods.

    The intervals hold for all pairs together (Bonferroni): the verdict compares with the best
    method, and which one is best depends on the same data.
    """
    pairs = list(combinations(methods, 2))
    return [
        {"methods": [one["name"], other["name"]]}
        | _difference(one["runs"], other["runs"], bounds, len(pairs))
        for one, other in pairs
    ]


def gains(
    methods: Sequence[Mapping[str, Any]],
    bases: Mapping[int, Mapping[str, Any]],
    bounds: Bounds,
) -> list[Record]:
    """Return by how much the greedy quality of every method exceeds that of its base."""
    return [
        {"method": method["name"]}
        | _difference(
            method["runs"], [bases[run["seed"]] for run in method["runs"]], bounds, len(methods)
        )
        for method in methods
    ]


def _difference(
    runs: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    bounds: Bounds,
    comparisons: int,
) -> Record:
    rows = [
        [x - y for x, y in zip(one, other, strict=True)]
        for one, other in zip(
            quality_rows(runs, "greedy"), quality_rows(others, "greedy"), strict=True
        )
    ]
    width = bounds[1] - bounds[0]
    return pool(rows, (-width, width), 1 - (1 - CONFIDENCE) / comparisons)


def separate(difference: Mapping[str, Any]) -> bool:
    """Return whether a paired difference is significant.

    Its interval excludes 0, and with few seeds its sign is that of every seed.
    """
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return False
    signs = {seed > 0 for seed in difference["seeds"] if seed} | {difference["mean"] > 0}
    return len(difference["seeds"]) >= MIN_SEEDS or len(signs) == 1
