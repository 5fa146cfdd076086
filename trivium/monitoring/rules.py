"""Conditions of the monitors, one function each: from a metric history to a finding.

A rule returns None if it cannot judge: its metrics are absent, or a window is not full. Medians and
means over windows keep single noisy steps from raising alarms. The baseline of a run is its first
step, before any update, because a failing run may have moved far after five steps. Limits and their
reasons are in ``monitor_config``. Reward hacking, which compares training with evaluation, is in
``reward_hacking``. ``monitors`` holds the alarm texts and decides when to raise an alarm again.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trivium.monitoring.history import MetricHistory, Series
from trivium.monitoring.monitor_config import (
    ChosenConfig,
    ClipFractionConfig,
    CriticConfig,
    EmptyConfig,
    EntropyConfig,
    EqualRewardsConfig,
    FallbacksConfig,
    GradientConfig,
    KLConfig,
    KLOldConfig,
    LengthCollapseConfig,
    LengthGrowthConfig,
    LostUpdatesConfig,
    OutOfMemoryConfig,
    PreferencesLearnedConfig,
    RatioConfig,
    SamplerConfig,
    TruncatedConfig,
)

_FALLBACKS = re.compile("rewards/(?P<reward>.+)/fallbacks")
_MIN_BASELINE_NORMS = 5
"""Fewest gradient norms that give a baseline."""


@dataclass(frozen=True)
class Finding:
    """Result of a rule at one step.

    Attributes:
        holds: whether the condition holds.
        metric: name of the metric that was compared.
        value: value that was compared with the limit.
        limit: limit that applies.
        seen: observation in words and numbers.
    """

    holds: bool
    metric: str
    value: float
    limit: float
    seen: str


def kl(config: KLConfig, history: MetricHistory) -> Finding | None:
    per_response = history.window("kl/response", config.window)
    k1 = history.window("kl/k1", config.window)
    if per_response is None:
        return None
    history.rule_state["trained"] = True
    per_token = math.inf if k1 is None else k1.median
    steps = f"{_median_of(config.window)}{per_response.steps}"
    return _kl_finding(config, "kl/response", per_response.median, per_token, steps)


def held_out_kl(config: KLConfig, history: MetricHistory) -> Finding | None:
    """Judge the KL on held-out samples if training steps do not log it: DPO, GRPO at β = 0."""
    per_response, length = history.current("kl"), history.current("length")
    if per_response is None or not length or "trained" in history.rule_state:
        return None
    return _kl_finding(config, "kl", per_response, per_response / length, "on held-out prompts")


def _kl_finding(
    config: KLConfig, metric: str, per_response: float, per_token: float, source: str
) -> Finding:
    token_text = "" if math.isinf(per_token) else f", {per_token:.3g} per token"
    return Finding(
        per_response > config.limit and per_token > config.per_token,
        metric,
        per_response,
        config.limit,
        f"KL to the reference is {per_response:.3g} nats per response{token_text} ({source}); the "
        f"limits are {config.limit:g} and {config.per_token:g}",
    )


def kl_old(config: KLOldConfig, history: MetricHistory) -> Finding | None:
    value = history.current("policy/kl_old")
    if value is None:
        return None
    seen = f"one step moved the policy by {value:.3g} nats per token; the limit is {config.limit:g}"
    return Finding(value > config.limit, "policy/kl_old", value, config.limit, seen)


def entropy(config: EntropyConfig, history: MetricHistory) -> Finding | None:
    first = history.first("policy/entropy", 1)
    last = history.window("policy/entropy", config.window)
    if first is None or last is None:
        return None
    limit = config.share * first.median
    if first.median >= 2 * config.floor:
        limit = max(limit, config.floor)
    seen = (
        f"entropy fell from {first.median:.3g} ({first.steps}) to {last.median:.3g} nats per token "
        f"({last.steps}); the limit is {limit:.3g}"
    )
    return Finding(last.median < limit, "policy/entropy", last.median, limit, seen)


def length_growth(config: LengthGrowthConfig, history: MetricHistory) -> Finding | None:
    change = _length_change(history, config.window)
    if change is None:
        return None
    limit = config.factor * change.first
    seen = (
        f"responses grew {change.text}, by a factor of {change.last / change.first:.3g}; the limit "
        f"is a factor of {config.factor:g}"
    )
    return Finding(change.last > limit, change.metric, change.last, limit, seen)


def length_collapse(config: LengthCollapseConfig, history: MetricHistory) -> Finding | None:
    change = _length_change(history, config.window)
    if change is None:
        return None
    limit = config.share * change.first
    seen = f"responses shrank {change.text}; the limit is {config.share:g} of the first length"
    return Finding(change.last < limit, change.metric, change.last, limit, seen)


@dataclass(frozen=True)
class _LengthChange:
    """First and last mean response length of a run, with the change in words."""

    metric: str
    first: float
    last: float
    text: str


def _length_change(history: MetricHistory, window: int) -> _LengthChange | None:
    """Compare response lengths; use held-out lengths if training samples nothing (offline DPO)."""
    trained = "length/mean" in history.metrics or "trained" in history.rule_state
    metric, window = ("length/mean", window) if trained else ("length", 1)
    if trained:
        history.rule_state["trained"] = True
    first, last = history.first(metric, 1), history.window(metric, window)
    if first is None or last is None or first.median <= 0:
        return None
    held_out = "" if trained else "held-out, "
    text = (
        f"from {first.median:.4g} ({held_out}{first.steps}) to {last.median:.4g} tokens "
        f"({last.steps})"
    )
    return _LengthChange(metric, first.median, last.median, text)


def truncated(config: TruncatedConfig, history: MetricHistory) -> Finding | None:
    """Judge the first steps on their own, in case most responses are truncated from the start."""
    name = "length/truncated"
    last = history.recent(name, config.window)
    if last is None:
        return None
    full = len(last.points) == config.window
    value, limit = (last.mean, config.share) if full else (min(last.values), config.first_share)
    seen = f"the length limit truncated {last.mean:.0%} of responses ({last.steps})"
    return Finding(value >= limit, name, value, limit, seen)


def empty(config: EmptyConfig, history: MetricHistory) -> Finding | None:
    last = history.window("length/empty", config.window)
    if last is None:
        return None
    seen = f"{last.mean:.0%} of responses have no text ({last.steps})"
    return Finding(last.mean >= config.share, "length/empty", last.mean, config.share, seen)


def equal_rewards(config: EqualRewardsConfig, history: MetricHistory) -> Finding | None:
    last = history.window("group/equal_rewards", config.window)
    if last is None:
        return None
    seen = (
        f"in {last.median:.0%} of groups all responses have the same reward "
        f"({_median_of(config.window)}{last.steps})"
    )
    holds = last.median >= config.share
    return Finding(holds, "group/equal_rewards", last.median, config.share, seen)


def critic(config: CriticConfig, history: MetricHistory) -> Finding | None:
    name = "value/explained_variance"
    last = history.window(name, config.window)
    if last is None or history.step <= config.grace:
        return None
    seen = (
        f"the critic's explained variance is {last.median:.3g} "
        f"({_median_of(config.window)}{last.steps}); a constant has 0"
    )
    return Finding(last.median < config.limit, name, last.median, config.limit, seen)


def clip_fraction(config: ClipFractionConfig, history: MetricHistory) -> Finding | None:
    low = history.window("policy/clip_low", config.window)
    high = history.window("policy/clip_high", config.window)
    if low is None or high is None:
        return None
    value = low.mean + high.mean
    metric = "policy/clip_high" if high.mean >= low.mean else "policy/clip_low"
    seen = (
        f"clipping took effect on {value:.1%} of tokens ({low.mean:.1%} below, "
        f"{high.mean:.1%} above; {low.steps})"
    )
    return Finding(value >= config.share, metric, value, config.share, seen)


def ratio(config: RatioConfig, history: MetricHistory) -> Finding | None:
    name = "policy/ratio_max"
    last = history.window(name, config.window)
    if last is None:
        return None
    seen = (
        f"the largest ratio π/π_old is {last.median:.3g} ({_median_of(config.window)}{last.steps})"
        f"; the limit is {config.limit:g}"
    )
    return Finding(last.median > config.limit, name, last.median, config.limit, seen)


def sampler_difference(config: SamplerConfig, history: MetricHistory) -> Finding | None:
    name = "policy/sampler_difference"
    last = history.window(name, config.window)
    if last is None:
        return None
    limit = config.half_precision_limit if history.half_precision else config.limit
    seen = (
        f"the log-probs of sampler and trainer differ by up to {last.median:.3g} nats on a token "
        f"({_median_of(config.window)}{last.steps}); the limit is {limit:g}"
    )
    return Finding(last.median > limit, name, last.median, limit, seen)


def chosen_logprob(config: ChosenConfig, history: MetricHistory) -> Finding | None:
    """Judge by the implicit reward, which does not depend on which pairs a step drew."""
    name, margin_name = "implicit_reward/chosen", "implicit_reward/margin"
    first, last = history.first(name, 1), history.window(name, config.window)
    first_margin = history.first(margin_name, 1)
    last_margin = history.window(margin_name, config.window)
    if first is None or last is None or first_margin is None or last_margin is None:
        return None
    fall = first.median - last.median
    growth = max(0.0, last_margin.median - first_margin.median)
    seen = (
        f"the chosen responses' implicit reward fell from {first.median:.3f} ({first.steps}) to "
        f"{last.median:.3f} ({last.steps}), while the margin grew by {growth:.3f}"
    )
    holds = fall > config.fall and fall > config.share * growth
    return Finding(holds, name, last.median, first.median - config.fall, seen)


def preferences_learned(config: PreferencesLearnedConfig, history: MetricHistory) -> Finding | None:
    name = "implicit_reward/gradient_weight"
    accuracy = history.window("implicit_reward/accuracy", config.window)
    weight = history.window(name, config.window)
    if accuracy is None or weight is None:
        return None
    seen = (
        f"{accuracy.median:.1%} of pairs have a positive margin, and their mean gradient weight is "
        f"{weight.median:.2g} ({_median_of(config.window)}{weight.steps})"
    )
    holds = accuracy.median >= config.accuracy and weight.median < config.weight
    return Finding(holds, name, weight.median, config.weight, seen)


def gradient_norm(config: GradientConfig, history: MetricHistory) -> Finding | None:
    """Skip steps without a gradient, such as an actor's while its critic warms up."""
    if not history.current("gradient_norm"):
        return None
    series = history.recent("gradient_norm", config.window + config.steps)
    if series is None or len(series.points) < config.steps + _MIN_BASELINE_NORMS:
        return None
    before = Series(series.points[: -config.steps])
    recent = Series(series.points[-config.steps :])
    baseline, last = before.median, recent.values[-1]
    is_spike = last > config.jump * baseline
    value = last if is_spike else recent.median
    limit = max(config.floor, (config.jump if is_spike else config.factor) * baseline)
    seen = (
        f"the gradient norm rose from {baseline:.3g} ({_median_of(2)}{before.steps}) to "
        f"{value:.3g} ({f'step {history.step}' if is_spike else recent.steps}); the limit is "
        f"{limit:.3g}"
    )
    return Finding(value > limit, "gradient_norm", value, limit, seen)


def lost_updates(config: LostUpdatesConfig, history: MetricHistory) -> Finding | None:
    """Skip steps at a rate of zero, the last of a schedule, which change nothing by intent."""
    name = "weights/changed_share"
    last = history.window(name, config.window)
    if last is None or not history.current("learning_rate"):
        return None
    seen = (
        f"an optimizer step changed {last.median:.1%} of the weights that have a gradient "
        f"({_median_of(config.window)}{last.steps}); the limit is {config.share:.0%}"
    )
    return Finding(last.median < config.share, name, last.median, config.share, seen)


def fallbacks(config: FallbacksConfig, history: MetricHistory) -> Finding | None:
    counts = {name: n for name, n in history.metrics.items() if _FALLBACKS.fullmatch(name)}
    if not counts:
        return None
    worst = max(counts, key=lambda name: counts[name])
    count = counts[worst]
    seen = (
        f"the reward {worst.split('/', 1)[1].removesuffix('/fallbacks')} failed on {count:g} "
        "responses of a step and returned its fallback value for them"
    )
    return Finding(count >= config.limit, worst, count, float(config.limit), seen)


def out_of_memory(config: OutOfMemoryConfig, history: MetricHistory) -> Finding | None:
    count = history.current("memory/splits")
    if count is None:
        return None
    seen = f"{count:g} micro-batches of a step ran out of memory and were split in half"
    return Finding(count >= config.limit, "memory/splits", count, float(config.limit), seen)


def _median_of(window: int) -> str:
    """Return the words before a range of steps; the median of one step is the step's value."""
    return "median of " if window > 1 else ""
