"""The verdict: which method suits this problem, derived from the numbers by fixed rules.

Every rule asks whether a difference is significant (``RULES``). Methods are level unless their
paired difference in quality is. Among level methods, alarms, KL and cost decide if one of them is
clearly better in something and worse in nothing (``criteria``). The rest is a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from trivium.compare.criteria import (
    CRITERIA,
    FACTOR,
    KL,
    ONE_SEED_FACTOR,
    Lower,
    disadvantages,
    not_surpassed,
)
from trivium.compare.pooling import MIN_SEEDS, separate

Record = dict[str, Any]

RULES = (
    "Quality is the held-out greedy reward. Two methods are level unless the interval of their "
    "paired difference over the same prompts excludes 0. The intervals hold at 95 % for all pairs "
    "of methods together.",
    "With two or three seeds, the difference must also have the same sign with every seed. From "
    f"{MIN_SEEDS} seeds on, the interval includes the spread between seeds.",
    "A method is recommended only if its paired difference from its base is significant.",
    "Among level methods, one is preferred to another if it is clearly better in alarms, KL, time, "
    "generated tokens or responses per prompt, clearly worse in none of these, and not lower in "
    "quality by more than half of the interval's half-width.",
    "Alarms count if one method raised them in most of its runs, and the other in none. KL and "
    f"costs count if they differ by a factor of {FACTOR:g} and by more than the spread between "
    f"seeds; with one seed, whose spread is unknown, KL and time by a factor of "
    f"{ONE_SEED_FACTOR:g}.",
    "Level methods of which none is preferred are tied.",
)
MAX_NAMES = 3
"""Largest number of tied methods that the headline names."""
SMALLER = 0.75
"""Largest smaller budget that is considered, as a share of the recommended method's cost."""
CURRENCY_WORDS = {
    "seconds": "seconds of training",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "flops": "FLOPs",
}


def judge(result: Mapping[str, Any]) -> Record:
    """Return the recommended method or the tie, the reasons, and what would change it."""
    methods = sorted(result["methods"], key=lambda method: -method["greedy"]["mean"])
    base = result["base_quality"]["greedy"]["mean"]
    best = methods[0]
    level = [m for m in methods if m is best or not separate(_difference(result, best, m))]
    lower = partial(_seems_lower, result)
    tied = not_surpassed([m for m in level if _exceeds_base(result, m)], lower)
    return {
        "headline": _headline(tied),
        "recommended": tied[0]["name"] if len(tied) == 1 else None,
        "tied": [method["name"] for method in tied] if len(tied) > 1 else [],
        "best": best["name"],
        "level": [method["name"] for method in level],
        "base": base,
        "ranking": [{"name": m["name"], **m["greedy"]} for m in methods],
        "budget": budget_words(result),
        "sentences": _sentences(result, methods, level, tied, base),
        "would_change": _would_change(result, methods, tied[0] if tied else best),
        "rules": list(RULES),
    }


# --- Sentences ------------------------------------------------------------------------------------


def _headline(tied: Sequence[Record]) -> str:
    """Return the name of the recommended method, or a sentence."""
    if not tied:
        return "No method is recommended"
    names = [method["name"] for method in tied]
    if len(names) == 1:
        return names[0]
    who = _join_names(names) if len(names) <= MAX_NAMES else f"{len(names)} methods"
    return f"A tie: {who} are level in quality"


def budget_words(result: Mapping[str, Any]) -> str:
    """Return the budget, and what the methods spent if that differs by more than 2 %.

    A method ends after the step that reaches its budget.
    """
    if not result["budget"]:
        return "each method's own number of steps"
    currency, amount = result["budget"]["currency"], result["budget"]["amount"]
    words = f"a budget of {amount:,.0f} {CURRENCY_WORDS[currency]} for each method"
    means = [fmean(run["spent"][currency] for run in m["runs"]) for m in result["methods"]]
    spent = [mean for mean in means if mean > 0]
    if all(abs(mean - amount) <= 0.02 * amount for mean in spent):
        return words
    low, high = f"{min(spent):,.0f}", f"{max(spent):,.0f}"
    return f"{words} ({f'{low} were spent' if low == high else f'{low} to {high} were spent'})"


def _sentences(
    result: Mapping[str, Any],
    methods: Sequence[Record],
    level: Sequence[Record],
    tied: Sequence[Record],
    base: float,
) -> list[str]:
    best, seeds = methods[0], len(result["seeds"])
    sentences = [
        f"With {budget_words(result)}, on {result['n']:,} held-out prompts and "
        f"{f'{seeds} seeds' if seeds > 1 else 'one seed'}, {best['name']} reached the highest "
        f"quality: {_with_ends(best['greedy'])}, from {base:.3f} before."
    ]
    if not tied:
        gain = _with_ends(_gain(result, best))
        sentences.append(
            f"That is {gain} above its base. No method is shown to exceed its base, so none is "
            "recommended."
        )
    gaps = [f"{m['name']}, lower by {_with_ends(_difference(result, best, m))}" for m in level[1:]]
    if gaps:
        sentences.append(f"Level with it: {'; '.join(gaps)}.")
    if tied and len(level) > 1:
        sentences += _choice_sentences(level, tied, partial(_seems_lower, result))
    behind = [m for m in methods if m not in level]
    if behind:
        gap = _with_ends(_difference(result, best, behind[0]))
        sentences.append(f"Behind it, {behind[0]['name']} is lower by {gap}.")
    below = [m["name"] for m in methods if not _exceeds_base(result, m)]
    if below and tied:
        sentences.append(f"Not shown to exceed the base: {_join_names(below)}.")
    return [*sentences, _seeds_sentence(seeds)]


def _choice_sentences(level: Sequence[Record], tied: Sequence[Record], lower: Lower) -> list[str]:
    """Say which of the level methods is preferred or tied, and the price of each."""

    def prices(methods: Sequence[Record], others: Sequence[Record]) -> list[str]:
        lines = [disadvantages(m, [o for o in others if o is not m], lower) for m in methods]
        return [f"{line}." for line in lines if line]

    surpassed = prices([m for m in level if m not in tied], level)
    names = _join_names([method["name"] for method in tied])
    if len(tied) == 1:
        return [f"Among these, {names} is preferred.", *surpassed]
    tie = prices(tied, tied)
    if tie:
        verdict = f"It is a tie: of {names}, none is preferred to another."
    else:
        criteria = _join_names([criterion.name for criterion in CRITERIA], "or")
        verdict = f"It is a tie: {names} do not differ clearly in {criteria} either."
    return [verdict, *tie, *(f"Another is preferred to {line}" for line in surpassed)]


def _seeds_sentence(seeds: int) -> str:
    """Say what the number of seeds allows."""
    if seeds >= MIN_SEEDS:
        return f"The intervals include the spread between the {seeds} seeds."
    models = "The intervals are over prompts, for these trained models"
    if seeds == 1:
        return f"{models}: whether another run would give the same order, only more seeds can say."
    return (
        f"{models}: {seeds} seeds, shown as points, are too few for the spread between runs "
        f"(from {MIN_SEEDS} seeds on the intervals include it)."
    )


# --- What would change it -------------------------------------------------------------------------


def _would_change(
    result: Mapping[str, Any], methods: Sequence[Record], chosen: Record
) -> list[str]:
    """Return the conditions under which another method would be recommended."""
    sentences = [_less_budget(result, methods, chosen), _no_sampling(methods, chosen)]
    sentences += [_kl_limit(methods, chosen), _more_seeds(result)]
    return [sentence for sentence in sentences if sentence is not None]


def _less_budget(
    result: Mapping[str, Any], methods: Sequence[Record], chosen: Record
) -> str | None:
    """Describe the largest clearly smaller budget at which another method led, if there is one.

    It led if the intervals of both qualities are apart.
    """
    currency = result["budget"]["currency"] if result["budget"] else "seconds"
    total = fmean(run["spent"][currency] for run in chosen["runs"])
    points = {p[currency] for m in methods for run in m["runs"] for p in run["curve"]}
    limits = sorted(limit for limit in points if 0 < limit <= SMALLER * total)
    for limit in reversed(limits):
        lows = {m["name"]: quality_at(m, currency, limit, "greedy_low") for m in methods}
        known = {name: low for name, low in lows.items() if low is not None}
        high = quality_at(chosen, currency, limit, "greedy_high")
        if high is None or not known:
            continue
        leader = max(known, key=lambda name: known[name])
        if known[leader] > high:
            reached = {m["name"]: quality_at(m, currency, limit) for m in methods}
            return (
                f"A smaller budget: after {limit:,.0f} {CURRENCY_WORDS[currency]} of these runs "
                f"{leader} led with {reached[leader]:.3f} against {reached[chosen['name']]:.3f}."
            )
    return None


def quality_at(
    method: Mapping[str, Any], currency: str, limit: float, name: str = "greedy"
) -> float | None:
    """Return the quality, or an end of its interval, after spending ``limit``; the mean over seeds.

    Values are interpolated linearly between evaluations. None if the method has no evaluation that
    early or does not spend the currency.
    """
    values = []
    for run in method["runs"]:
        points = [p for p in run["curve"] if p.get(name) is not None]
        before = [p for p in points if p[currency] <= limit]
        after = [p for p in points if p[currency] > limit]
        if not before or points[-1][currency] == 0:
            return None
        a = before[-1]
        if after:
            b = after[0]
            share = (limit - a[currency]) / (b[currency] - a[currency])
            values.append(a[name] + share * (b[name] - a[name]))
        else:
            values.append(a[name])
    return fmean(values)


def _no_sampling(methods: Sequence[Record], chosen: Record) -> str | None:
    """Describe the best method without sampling during training, if ``chosen`` samples."""
    if all(s["sampling"] == "none" for s in chosen["stages"][-1:]):
        return None
    offline = [m for m in methods if m["stages"] and m["stages"][-1]["sampling"] == "none"]
    if not offline:
        return None
    return (
        "No sampling during training (no engine, or human preferences): "
        f"{offline[0]['name']}, at {offline[0]['greedy']['mean']:.3f}."
    )


def _kl_limit(methods: Sequence[Record], chosen: Record) -> str | None:
    """Describe the best method with a clearly smaller KL divergence, if there is one."""
    nearer = [m for m in methods if KL.worse(chosen, m) and m["stages"]]
    if not nearer:
        return None
    return (
        f"A limit on KL below {KL.mean(chosen):.2f} nats per response: {nearer[0]['name']} is the "
        f"best method well below it, at {nearer[0]['greedy']['mean']:.3f} with "
        f"{KL.mean(nearer[0]):.2f}."
    )


def _more_seeds(result: Mapping[str, Any]) -> str | None:
    if len(result["seeds"]) >= MIN_SEEDS:
        return None
    seeds = len(result["seeds"])
    show = f"{seeds} seeds do not show" if seeds > 1 else "one seed does not show"
    return f"More seeds: {show} how much a method varies from run to run."


# --- Differences ----------------------------------------------------------------------------------


def _difference(result: Mapping[str, Any], one: Record, other: Record) -> Record:
    """Return by how much ``one`` is better than ``other``, with the interval."""
    for d in result["differences"]:
        if d["methods"] == [one["name"], other["name"]]:
            return d
        if d["methods"] == [other["name"], one["name"]]:
            ends = {"low": _negative(d["high"]), "high": _negative(d["low"])}
            return {"mean": -d["mean"], "seeds": [-x for x in d["seeds"]], **ends}
    raise KeyError(f"{one['name']} and {other['name']} were not compared")


def _gain(result: Mapping[str, Any], method: Record) -> Record:
    (gain,) = [gain for gain in result["gains"] if gain["method"] == method["name"]]
    return gain


def _exceeds_base(result: Mapping[str, Any], method: Record) -> bool:
    gain = _gain(result, method)
    return separate(gain) and gain["mean"] > 0


def _seems_lower(result: Mapping[str, Any], one: Record, other: Record) -> bool:
    """Return whether a paired difference passes half of its interval's half-width."""
    gap = _difference(result, other, one)
    return gap["low"] is not None and gap["mean"] > (gap["mean"] - gap["low"]) / 2


def _negative(end: float | None) -> float | None:
    return None if end is None else -end


def _with_ends(quality: Mapping[str, Any]) -> str:
    ends = "" if quality["low"] is None else f" ({quality['low']:.3f} – {quality['high']:.3f})"
    return f"{quality['mean']:.3f}{ends}".replace("-", "−")


def _join_names(names: Sequence[str], last: str = "and") -> str:
    """Join names in a sentence, in quotes if a name has a comma."""
    if len(names) > 1 and any("," in name for name in names):
        names = [f"“{name}”" for name in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
