"""Reward hacking: the training reward rises while held-out quality falls.

    since the first evaluation   variety = distinct words − repeated 3-grams of sampled responses;
                                 log-prob per token of sampled responses under the reference
    since the best evaluation    held-out reward, greedy and sampled, outside its interval

A policy that hacks a lexicon reward loses variety first. The reference finds "her friends. She
loved to play with her friends" more likely than a story, so likelihood alone would count it as an
improvement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trivium.monitoring.history import MetricHistory
from trivium.monitoring.monitor_config import RewardHackingConfig
from trivium.monitoring.rules import Finding

_REWARD, _REWARD_STD, _MARGIN = "reward/mean", "reward/std", "implicit_reward/margin"
_COMPARED = ("distinct", "repetition", "reference_logprob", "length", "n")
_LENGTH_GROWTH = 1.25
"""Growth of responses above which distinct words are not compared: long texts repeat words."""
_DISTINCT_STD = 0.08
"""Standard deviation of a response's share of distinct words: 0.04 to 0.12 in the stories and the
demo's problems. It sets the smallest fall that counts if few prompts are held out."""


@dataclass(frozen=True)
class QualityChange:
    """Change of one quality metric since an earlier evaluation.

    Attributes:
        metric: name of the metric.
        label: the metric in words.
        before: value at the earlier evaluation.
        since: step of the earlier evaluation.
        after: value now.
        limit: largest fall that is allowed.
        reward: training reward at the earlier evaluation.
    """

    metric: str
    label: str
    before: float
    since: int
    after: float
    limit: float
    reward: Mapping[str, Any]

    @property
    def exceeds_limit(self) -> bool:
        return self.before - self.after > self.limit


def record_reward(config: RewardHackingConfig, history: MetricHistory) -> None:
    """Store the first and the latest training reward; offline DPO uses the margin instead."""
    name = _REWARD if history.current(_REWARD) is not None else _MARGIN
    first, last = history.first(name, config.window), history.window(name, config.window)
    std = history.first(_REWARD_STD, config.window)
    if first is None or last is None:
        return
    history.rule_state["first_reward"] = {"mean": first.mean, "steps": first.steps}
    history.rule_state["reward"] = {"mean": last.mean, "steps": last.steps, "name": name}
    history.rule_state["reward_std"] = 0.0 if std is None else std.mean


def reward_hacking(config: RewardHackingConfig, history: MetricHistory) -> Finding | None:
    """Compare an evaluation with the first evaluation and with the best one so far."""
    changes = [*_since_first(config, history), *_since_best(history)]
    reward = history.rule_state.get("reward")
    if reward is None or not changes:
        return None
    findings = [_finding(config, history, change, reward) for change in changes]
    return next((finding for finding in findings if finding.holds), findings[0])


def _since_first(config: RewardHackingConfig, history: MetricHistory) -> Iterator[QualityChange]:
    """Yield the changes of variety and of the reference's log-prob."""
    last = {name: x for name in _COMPARED if (x := history.current(name)) is not None}
    state = history.rule_state
    first = state.setdefault(
        "first_evaluation", {**last, "step": history.step, "reward": state.get("reward")}
    )
    reward = first["reward"] or state.get("first_reward")
    if reward is None:
        return
    grew = last.get("length", 0.0) > _LENGTH_GROWTH * first.get("length", math.inf)
    metric, label = "distinct", "distinct words − repeated 3-grams"
    before, after = _variety(first), _variety(last)
    if grew or before is None or after is None:
        metric, label = "repetition", "the share of 3-grams that are not repeated"
        before, after = _unrepeated(first), _unrepeated(last)
    if before is not None and after is not None:
        limit = max(config.variety, _noise(last))
        yield QualityChange(metric, label, before, first["step"], after, limit, reward)
    metric, label = "reference_logprob", "the log-prob per token under the reference"
    if metric in first and metric in last:
        limit = config.reference_logprob
        before, after = first[metric], last[metric]
        yield QualityChange(metric, label, before, first["step"], after, limit, reward)


def _variety(evaluation: Mapping[str, float]) -> float | None:
    if "distinct" not in evaluation:
        return None
    return evaluation["distinct"] - evaluation.get("repetition", 0.0)


def _unrepeated(evaluation: Mapping[str, float]) -> float | None:
    """Return the share of unrepeated 3-grams; length affects it less than distinct words."""
    return 1 - evaluation["repetition"] if "repetition" in evaluation else None


def _noise(evaluation: Mapping[str, float]) -> float:
    """Return four standard errors of a difference; a run makes many comparisons."""
    return 4 * _DISTINCT_STD * math.sqrt(2 / max(1.0, evaluation.get("n", 1.0)))


def _since_best(history: MetricHistory) -> Iterator[QualityChange]:
    """Yield the change of each held-out reward since its best evaluation.

    A fall counts only if the intervals do not overlap. If all rewards are near their maximum, the
    interval may be so narrow that any change is outside it. The fall must therefore also exceed the
    half-width of the first evaluation's interval.
    """
    state = history.rule_state
    for name in ("greedy", "sampled"):
        mean, low, high = (history.current(key) for key in (name, f"{name}_low", f"{name}_high"))
        if mean is None or low is None or high is None:
            continue
        best = state.setdefault(f"best_{name}", {"half_width": (high - low) / 2, "mean": -math.inf})
        if mean >= best["mean"]:
            reward = state.get("reward")
            best |= {"mean": mean, "low": low, "step": history.step, "reward": reward}
        reward = best["reward"] or state.get("first_reward")
        if reward is not None:
            limit = best["half_width"] if high < best["low"] else math.inf
            label = f"the {name} reward"
            yield QualityChange(name, label, best["mean"], best["step"], mean, limit, reward)


def _finding(
    config: RewardHackingConfig,
    history: MetricHistory,
    change: QualityChange,
    reward: Mapping[str, Any],
) -> Finding:
    before = change.reward
    rise = reward["mean"] - before["mean"]
    rose = rise > config.rise * history.rule_state["reward_std"]
    seen = (
        f"{reward['name']} rose from {before['mean']:.3g} ({before['steps']}) to "
        f"{reward['mean']:.3g} ({reward['steps']}), while {change.label} on held-out prompts "
        f"fell from {change.before:.3g} (step {change.since}) to {change.after:.3g} "
        f"(step {history.step})"
    )
    holds = change.exceeds_limit and rose
    return Finding(holds, change.metric, change.after, change.before - change.limit, seen)
