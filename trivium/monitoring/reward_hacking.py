"""Reward hacking: the training reward rises while held-out quality that it does not see falls.

    since the first evaluation   variety = distinct words − repeated 3-grams of sampled responses;
                                 log-prob per token of sampled responses under the reference
    since the best evaluation    held-out reward, greedy and sampled, beyond its interval

A gamed lexicon reward loses its variety first: the reference finds "her friends. She loved to play
with her friends" more likely than a story, so that likelihood alone would call it an improvement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trivium.monitoring.history import View
from trivium.monitoring.monitor_config import RewardHackingConfig
from trivium.monitoring.rules import Finding

_REWARD, _SPREAD, _MARGIN = "reward/mean", "reward/std", "implicit_reward/margin"
_BESIDES = ("distinct", "repetition", "reference_logprob", "length", "n")
_GROWN = 1.25
_DEVIATION = 0.08
"""Standard deviation of a response's share of distinct words: 0.04 to 0.12 in the stories and the
demo's problems. It sets what a fall must exceed where few prompts are held out."""


@dataclass(frozen=True)
class Fall:
    """How a quality moved since an earlier evaluation, and the training reward back then."""

    metric: str
    words: str
    before: float
    since: int
    after: float
    limit: float
    reward: Mapping[str, Any]

    @property
    def holds(self) -> bool:
        return self.before - self.after > self.limit


def remember_reward(config: RewardHackingConfig, view: View) -> None:
    """Keep what the training reward is and was; for DPO from a file, the margin stands for it."""
    name = _REWARD if view.get(_REWARD) is not None else _MARGIN
    start, now = view.start(name, config.window), view.last(name, config.window)
    spread = view.start(_SPREAD, config.window)
    if start is None or now is None:
        return
    view.notes["first_reward"] = {"mean": start.mean, "at": start.at}
    view.notes["reward"] = {"mean": now.mean, "at": now.at, "name": name}
    view.notes["spread"] = 0.0 if spread is None else spread.mean


def reward_hacking(config: RewardHackingConfig, view: View) -> Finding | None:
    """Compare an evaluation with the first one and with the best before it."""
    falls = [*_since_first(config, view), *_since_best(view)]
    now = view.notes.get("reward")
    if now is None or not falls:
        return None
    findings = [_finding(config, view, fall, now) for fall in falls]
    return next((finding for finding in findings if finding.holds), findings[0])


def _since_first(config: RewardHackingConfig, view: View) -> Iterator[Fall]:
    now = {name: value for name in _BESIDES if (value := view.get(name)) is not None}
    reward = view.notes.get("reward")
    first = view.notes.setdefault("first", {**now, "step": view.step, "reward": reward})
    reward = first["reward"] or view.notes.get("first_reward")
    if reward is None:
        return
    grown = now.get("length", 0.0) > _GROWN * first.get("length", math.inf)
    metric, words = "distinct", "distinct words − repeated 3-grams"
    before, after = _variety(first), _variety(now)
    if grown or before is None or after is None:
        metric, words = "repetition", "the share of 3-grams that are not repeated"
        before, after = _unrepeated(first), _unrepeated(now)
    if before is not None and after is not None:
        limit = max(config.variety, _noise(now))
        yield Fall(metric, words, before, first["step"], after, limit, reward)
    metric, words = "reference_logprob", "the log-prob per token under the reference"
    if metric in first and metric in now:
        limit = config.reference_logprob
        yield Fall(metric, words, first[metric], first["step"], now[metric], limit, reward)


def _variety(numbers: Mapping[str, float]) -> float | None:
    if "distinct" not in numbers:
        return None
    return numbers["distinct"] - numbers.get("repetition", 0.0)


def _unrepeated(numbers: Mapping[str, float]) -> float | None:
    """What a text's length moves less than its share of distinct words."""
    return 1 - numbers["repetition"] if "repetition" in numbers else None


def _noise(numbers: Mapping[str, float]) -> float:
    """Four standard errors of the difference of two evaluations: a run has many of them."""
    return 4 * _DEVIATION * math.sqrt(2 / max(1.0, numbers.get("n", 1.0)))


def _since_best(view: View) -> Iterator[Fall]:
    """Each held-out reward against its best: intervals apart, and a fall that counts.

    An interval may be so narrow, where all rewards are near their maximum, that any change leaves
    it; so the fall must also exceed the half-width that the first evaluation had.
    """
    for name in ("greedy", "sampled"):
        mean, low, high = (view.get(key) for key in (name, f"{name}_low", f"{name}_high"))
        if mean is None or low is None or high is None:
            continue
        key = f"best_{name}"
        best = view.notes.setdefault(key, {"half": (high - low) / 2, "mean": -math.inf})
        if mean >= best["mean"]:
            reward = view.notes.get("reward")
            best |= {"mean": mean, "low": low, "step": view.step, "reward": reward}
        reward = best["reward"] or view.notes.get("first_reward")
        if reward is not None:
            limit = best["half"] if high < best["low"] else math.inf
            words = f"the {name} reward"
            yield Fall(name, words, best["mean"], best["step"], mean, limit, reward)


def _finding(
    config: RewardHackingConfig, view: View, fall: Fall, now: Mapping[str, Any]
) -> Finding:
    then = fall.reward
    risen = now["mean"] - then["mean"] > config.rise * view.notes["spread"]
    seen = (
        f"{now['name']} rose from {then['mean']:.3g} ({then['at']}) to {now['mean']:.3g} "
        f"({now['at']}), while {fall.words} on held-out prompts fell from {fall.before:.3g} "
        f"(step {fall.since}) to {fall.after:.3g} (step {view.step})"
    )
    return Finding(fall.holds and risen, fall.metric, fall.after, fall.before - fall.limit, seen)
