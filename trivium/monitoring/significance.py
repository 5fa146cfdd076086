"""Conditions that a run is failing: each is a significant change, of which noise is unlikely.

learned reward      accuracy on the policy's own responses, measured before each reward update
held-out quality    paired differences from the best evaluation so far, over the same prompts
falling reward      slope of the training reward over the last steps
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from trivium.maths.distributions import student_quantile
from trivium.maths.intervals import (
    SHARE,
    UNBOUNDED,
    Interval,
    mean_interval,
    share_interval,
    value_bounds,
)
from trivium.monitoring.history import MetricHistory
from trivium.monitoring.monitor_config import (
    HeldOutQualityConfig,
    LearnedRewardConfig,
    RewardFallConfig,
)
from trivium.monitoring.rules import Finding

CHANCE = 0.5


def learned_reward(config: LearnedRewardConfig, history: MetricHistory) -> Finding | None:
    """Judge the accuracy on the policy's responses, pooled over the last updates."""
    accuracy = history.recent("accuracy", config.window)
    count = history.recent("labels", config.window)
    if accuracy is None or count is None or min(count.values) <= 0:
        return None
    first = history.rule_state.setdefault("first", [accuracy.values[-1], count.values[-1]])
    if len(accuracy.points) < config.window:
        return None
    recent, start = _pooled(accuracy.values, count.values), _pooled(first[:1], first[1:])
    at_chance = recent.low <= CHANCE
    lost = start.mean - recent.mean > config.share * (start.mean - CHANCE)
    fell = lost and recent.high < start.low
    seen = (
        f"the learned reward agrees with its labeler on {recent.mean:.0%} of the policy's own "
        f"responses ({recent.low:.0%} – {recent.high:.0%}; updates after {accuracy.steps})"
    )
    seen += "; chance is 50%" if at_chance else f"; it was {start.mean:.0%} in the first update"
    limit = CHANCE if at_chance else start.mean - config.share * (start.mean - CHANCE)
    return Finding(at_chance or fell, "accuracy", recent.mean, limit, seen)


def _pooled(shares: Sequence[float], counts: Sequence[float]) -> Interval:
    right = math.fsum(s * n for s, n in zip(shares, counts, strict=True))
    return share_interval(round(right), round(math.fsum(counts)))


def held_out_quality(config: HeldOutQualityConfig, history: MetricHistory) -> Finding | None:
    """Compare the quality at every held-out prompt with that of the best evaluation so far.

    A run compares many pairs of evaluations, and the best is chosen among them: after k evaluations
    the error probability of each test is that of the run divided by k(k − 1)/2.
    """
    now = _by_prompt(history.outcomes)
    if not now:
        return None
    state = history.rule_state
    state["evaluations"] = state.get("evaluations", 0) + 1
    findings = [_fall(config, history, name, values) for name, values in now.items()]
    known = [finding for finding in findings if finding is not None]
    return next((f for f in known if f.holds), known[0] if known else None)


def _by_prompt(outcomes: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return greedy and sampled quality at every prompt; values that are not finite: none."""
    values = {
        "greedy": [float(x) for x in outcomes.get("greedy", ())],
        "sampled": [fmean(row) for row in outcomes.get("sampled", ())],
    }
    return {name: xs for name, xs in values.items() if xs and all(map(math.isfinite, xs))}


def _fall(
    config: HeldOutQualityConfig, history: MetricHistory, name: str, values: list[float]
) -> Finding | None:
    state = history.rule_state
    mean = fmean(values)
    first = state.setdefault(f"first_{name}", mean)
    best = state.setdefault(f"best_{name}", {"step": history.step, "values": values})
    before = fmean(best["values"])
    if mean >= before or len(best["values"]) != len(values):
        state[f"best_{name}"] = {"step": history.step, "values": values}
        return Finding(False, name, mean, before, "")
    pairs = math.comb(state["evaluations"], 2)
    bounds = (-1.0, 1.0) if value_bounds([*values, *best["values"]]) == SHARE else UNBOUNDED
    change = mean_interval(
        [x - y for x, y in zip(values, best["values"], strict=True)],
        bounds=bounds,
        confidence=1 - (1 - config.confidence) / pairs,
    )
    limit = before - config.share * max(0.0, before - first)
    seen = (
        f"the {name} reward on held-out prompts fell from {before:.3g} (step {best['step']}) to "
        f"{mean:.3g} (step {history.step})"
    )
    if math.isfinite(change.low):
        seen += f", by {-change.high:.3g} to {-change.low:.3g} over the same prompts"
    return Finding(change.high < 0 and mean < limit, name, mean, limit, seen)


def reward_fall(config: RewardFallConfig, history: MetricHistory) -> Finding | None:
    """Judge the least-squares slope of the training reward over the last steps."""
    name = "reward/mean"
    std = history.first("reward/std", 1)
    last = history.window(name, config.window)
    if last is None or std is None:
        return None
    slope, error = _slope(last.values)
    fall = -slope * (config.window - 1)
    quantile = student_quantile(config.confidence, config.window - 2)
    limit = config.fall * std.mean
    seen = (
        f"the training reward fell by {fall:.3g} over {last.steps}, from about "
        f"{last.mean + fall / 2:.3g} to {last.mean - fall / 2:.3g}; the limit is {limit:.3g}"
    )
    holds = fall > limit and -slope > quantile * error
    return Finding(holds, name, last.mean - fall / 2, last.mean + fall / 2 - limit, seen)


def _slope(values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of a line through values at 0, 1, 2 …, and its standard error."""
    n = len(values)
    centered = [k - (n - 1) / 2 for k in range(n)]
    squares = math.fsum(x * x for x in centered)
    mean = fmean(values)
    slope = math.fsum(x * y for x, y in zip(centered, values, strict=True)) / squares
    rest = math.fsum((y - mean - slope * x) ** 2 for x, y in zip(centered, values, strict=True))
    return slope, math.sqrt(rest / (n - 2) / squares)
