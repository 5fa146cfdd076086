"""When a monitor's condition holds, one function each: from a view of the metrics to a finding.

A rule answers None where it cannot judge: its metrics are absent, or a window is not full. Medians
and means over windows keep single noisy steps from raising alarms. The start that a run is compared
with is its first step, before any update: a run in trouble may be far away five steps later. Limits
and their reasons are in ``monitor_config``; reward hacking, which compares training with
evaluation, in ``monitor_hacking``; what to say and when to say it again in ``monitors``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from trivium.monitoring.history import View
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
    OutOfMemoryConfig,
    PreferencesLearnedConfig,
    RatioConfig,
    SamplerConfig,
    TruncatedConfig,
)

_FALLBACKS = re.compile("rewards/(?P<reward>.+)/fallbacks")
_FEWEST_NORMS = 5


@dataclass(frozen=True)
class Finding:
    """What a monitor's condition is about at this step, and whether it holds."""

    holds: bool
    metric: str
    value: float
    limit: float
    seen: str


def kl(config: KLConfig, view: View) -> Finding | None:
    whole = view.last("kl/response", config.window)
    each = view.last("kl/k1", config.window)
    if whole is None:
        return None
    view.notes["trained"] = True
    per_token = math.inf if each is None else each.median
    return _kl(config, "kl/response", whole.median, per_token, f"{_over(config.window)}{whole.at}")


def held_out_kl(config: KLConfig, view: View) -> Finding | None:
    """The same on held-out samples, for runs whose steps measure none: DPO, GRPO at β = 0."""
    whole, length = view.get("kl"), view.get("length")
    if whole is None or not length or "trained" in view.notes:
        return None
    return _kl(config, "kl", whole, whole / length, "on held-out prompts")


def _kl(config: KLConfig, metric: str, whole: float, per_token: float, where: str) -> Finding:
    each = "" if math.isinf(per_token) else f", {per_token:.3g} per token"
    return Finding(
        whole > config.limit and per_token > config.per_token,
        metric,
        whole,
        config.limit,
        f"KL to the reference is {whole:.3g} nats per response{each} ({where}); the limits are "
        f"{config.limit:g} and {config.per_token:g}",
    )


def kl_old(config: KLOldConfig, view: View) -> Finding | None:
    value = view.get("policy/kl_old")
    if value is None:
        return None
    seen = f"one step moved the policy by {value:.3g} nats per token; the limit is {config.limit:g}"
    return Finding(value > config.limit, "policy/kl_old", value, config.limit, seen)


def entropy(config: EntropyConfig, view: View) -> Finding | None:
    start = view.start("policy/entropy", 1)
    now = view.last("policy/entropy", config.window)
    if start is None or now is None:
        return None
    limit = config.share * start.median
    if start.median >= 2 * config.floor:
        limit = max(limit, config.floor)
    seen = (
        f"entropy fell from {start.median:.3g} ({start.at}) to {now.median:.3g} nats per token "
        f"({now.at}); the limit is {limit:.3g}"
    )
    return Finding(now.median < limit, "policy/entropy", now.median, limit, seen)


def length_growth(config: LengthGrowthConfig, view: View) -> Finding | None:
    lengths = _lengths(view, config.window)
    if lengths is None:
        return None
    metric, start, now, words = lengths
    limit = config.factor * start
    seen = f"responses grew {words}, {now / start:.3g} times; the limit is {config.factor:g} times"
    return Finding(now > limit, metric, now, limit, seen)


def length_collapse(config: LengthCollapseConfig, view: View) -> Finding | None:
    lengths = _lengths(view, config.window)
    if lengths is None:
        return None
    metric, start, now, words = lengths
    limit = config.share * start
    seen = f"responses shrank {words}; the limit is {config.share:g} of the start"
    return Finding(now < limit, metric, now, limit, seen)


def _lengths(view: View, window: int) -> tuple[str, float, float, str] | None:
    """Metric, length at the start, length now, and both in words.

    Held-out lengths count where the training steps sample nothing (DPO from a file).
    """
    trained = "length/mean" in view.numbers or "trained" in view.notes
    metric, window = ("length/mean", window) if trained else ("length", 1)
    if trained:
        view.notes["trained"] = True
    start, now = view.start(metric, 1), view.last(metric, window)
    if start is None or now is None or start.median <= 0:
        return None
    held_out = "" if trained else "held-out, "
    words = f"from {start.median:.4g} ({held_out}{start.at}) to {now.median:.4g} tokens ({now.at})"
    return metric, start.median, now.median, words


def truncated(config: TruncatedConfig, view: View) -> Finding | None:
    now = view.last("length/truncated", config.window)
    if now is None:
        return None
    seen = f"the length limit cut off {now.mean:.0%} of responses ({now.at})"
    return Finding(now.mean >= config.share, "length/truncated", now.mean, config.share, seen)


def empty(config: EmptyConfig, view: View) -> Finding | None:
    now = view.last("length/empty", config.window)
    if now is None:
        return None
    seen = f"{now.mean:.0%} of responses have no text ({now.at})"
    return Finding(now.mean >= config.share, "length/empty", now.mean, config.share, seen)


def equal_rewards(config: EqualRewardsConfig, view: View) -> Finding | None:
    now = view.last("group/equal_rewards", config.window)
    if now is None:
        return None
    seen = (
        f"in {now.median:.0%} of groups all responses got the same reward "
        f"({_over(config.window)}{now.at})"
    )
    holds = now.median >= config.share
    return Finding(holds, "group/equal_rewards", now.median, config.share, seen)


def critic(config: CriticConfig, view: View) -> Finding | None:
    name = "value/explained_variance"
    now = view.last(name, config.window)
    if now is None or view.step <= config.grace:
        return None
    seen = (
        f"the critic's explained variance is {now.median:.3g} ({_over(config.window)}{now.at}): "
        "a constant has 0"
    )
    return Finding(now.median < config.limit, name, now.median, config.limit, seen)


def clip_fraction(config: ClipFractionConfig, view: View) -> Finding | None:
    low = view.last("policy/clip_low", config.window)
    high = view.last("policy/clip_high", config.window)
    if low is None or high is None:
        return None
    value = low.mean + high.mean
    metric = "policy/clip_high" if high.mean >= low.mean else "policy/clip_low"
    seen = (
        f"clipping took the gradient of {value:.1%} of tokens ({low.mean:.1%} below, "
        f"{high.mean:.1%} above; {low.at})"
    )
    return Finding(value >= config.share, metric, value, config.share, seen)


def ratio(config: RatioConfig, view: View) -> Finding | None:
    now = view.last("policy/ratio_max", config.window)
    if now is None:
        return None
    seen = (
        f"the largest ratio π/π_old is {now.median:.3g} ({_over(config.window)}{now.at}); the "
        f"limit is {config.limit:g}"
    )
    return Finding(now.median > config.limit, "policy/ratio_max", now.median, config.limit, seen)


def sampler_difference(config: SamplerConfig, view: View) -> Finding | None:
    name = "policy/sampler_difference"
    now = view.last(name, config.window)
    if now is None:
        return None
    seen = (
        f"sampler and trainer differ by up to {now.median:.3g} nats on a token "
        f"({_over(config.window)}{now.at}); the limit is {config.limit:g}"
    )
    return Finding(now.median > config.limit, name, now.median, config.limit, seen)


def chosen_logprob(config: ChosenConfig, view: View) -> Finding | None:
    """By the implicit reward: unlike the log-prob, it does not depend on which pairs came."""
    name, other = "implicit_reward/chosen", "implicit_reward/margin"
    start, now = view.start(name, 1), view.last(name, config.window)
    start_margin, margin = view.start(other, 1), view.last(other, config.window)
    if start is None or now is None or start_margin is None or margin is None:
        return None
    fall = start.median - now.median
    growth = max(0.0, margin.median - start_margin.median)
    seen = (
        f"the chosen responses' implicit reward fell from {start.median:.3f} ({start.at}) to "
        f"{now.median:.3f} ({now.at}), while the margin grew by {growth:.3f}"
    )
    holds = fall > config.fall and fall > config.share * growth
    return Finding(holds, name, now.median, start.median - config.fall, seen)


def preferences_learned(config: PreferencesLearnedConfig, view: View) -> Finding | None:
    accuracy = view.last("implicit_reward/accuracy", config.window)
    weight = view.last("implicit_reward/gradient_weight", config.window)
    if accuracy is None or weight is None:
        return None
    seen = (
        f"{accuracy.median:.1%} of pairs are told apart, and their mean gradient weight is "
        f"{weight.median:.2g} ({_over(config.window)}{weight.at})"
    )
    holds = accuracy.median >= config.accuracy and weight.median < config.weight
    name = "implicit_reward/gradient_weight"
    return Finding(holds, name, weight.median, config.weight, seen)


def gradient_norm(config: GradientConfig, view: View) -> Finding | None:
    """Steps without a gradient, such as an actor's while its critic warms up, do not count."""
    if not view.get("gradient_norm"):
        return None
    series = view.history("gradient_norm", config.window + config.steps)
    if series is None or len(series.points) < config.steps + _FEWEST_NORMS:
        return None
    before = type(series)(series.points[: -config.steps])
    recent = type(series)(series.points[-config.steps :])
    usual, last = before.median, recent.values[-1]
    sudden = last > config.jump * usual
    value = last if sudden else recent.median
    limit = max(config.floor, (config.jump if sudden else config.factor) * usual)
    seen = (
        f"the gradient norm went from {usual:.3g} ({_over(2)}{before.at}) to {value:.3g} "
        f"({f'step {view.step}' if sudden else recent.at}); the limit is {limit:.3g}"
    )
    return Finding(value > limit, "gradient_norm", value, limit, seen)


def fallbacks(config: FallbacksConfig, view: View) -> Finding | None:
    counts = {name: n for name, n in view.numbers.items() if _FALLBACKS.fullmatch(name)}
    if not counts:
        return None
    worst = max(counts, key=lambda name: counts[name])
    count = counts[worst]
    seen = (
        f"the reward {worst.split('/', 1)[1].removesuffix('/fallbacks')} failed on {count:g} "
        "responses of a step, which got its fallback value"
    )
    return Finding(count >= config.limit, worst, count, float(config.limit), seen)


def out_of_memory(config: OutOfMemoryConfig, view: View) -> Finding | None:
    count = view.get("memory/splits")
    if count is None:
        return None
    seen = f"{count:g} micro-batches of a step did not fit the memory and were done in halves"
    return Finding(count >= config.limit, "memory/splits", count, float(config.limit), seen)


def _over(window: int) -> str:
    return "median of " if window > 1 else ""
