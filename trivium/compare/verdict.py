"""The verdict: which method suits this problem, in words that follow from numbers by stated rules.

1. The methods are ranked by held-out greedy quality, averaged over seeds.
2. A method is level with the best where the 95 % interval of their paired difference over the same
   prompts holds 0.
3. Among level methods one is preferred that raised fewer alarms; then the one with the smaller KL
   divergence; then the one that spent less wall-clock.
4. A method whose quality does not exceed the base's is never recommended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]

RULES = (
    "Methods are ranked by held-out greedy quality, averaged over seeds.",
    "A method is level with the best where the 95 % interval of their paired difference over the "
    "same prompts holds 0.",
    "Among level methods: fewer alarms, then a smaller KL divergence, then less wall-clock.",
    "A method that does not exceed its base is not recommended.",
)
SMALLER = 0.75
"""A smaller budget is at most this share of what the recommended method spent."""
CURRENCY_WORDS = {
    "seconds": "seconds of training",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "flops": "FLOPs",
}


def judge(result: Mapping[str, Any]) -> Record:
    """The recommended method, what is level with it, why, and what would change it."""
    methods = sorted(result["methods"], key=lambda method: -method["greedy"]["mean"])
    base = _mean([record["greedy"] for record in result["bases"].values()])
    best = methods[0]
    level = [r for r in methods if r is best or _level(result["differences"], best, r)]
    chosen = min(level, key=lambda r: (_alarms(r), _kl(r), _seconds(r)))
    helps = chosen["greedy"]["mean"] > base
    return {
        "recommended": chosen["name"] if helps else None,
        "best": best["name"],
        "level": [method["name"] for method in level],
        "base": base,
        "ranking": [{"name": r["name"], **r["greedy"]} for r in methods],
        "sentences": _sentences(result, methods, level, chosen, base),
        "would_change": _would_change(result, methods, chosen),
        "rules": list(RULES),
    }


def _sentences(
    result: Mapping[str, Any],
    methods: Sequence[Record],
    level: Sequence[Record],
    chosen: Record,
    base: float,
) -> list[str]:
    best = methods[0]
    seeds = len(result["seeds"])
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    budget = result["budget"]
    equal = (
        f"With {budget['amount']:,.0f} {CURRENCY_WORDS[budget['currency']]} for each method"
        if budget
        else "With each method's own number of steps"
    )
    said = [
        f"{equal}, on {result['n']:,} held-out prompts and {over}, {best['name']} reached the "
        f"highest quality: {best['greedy']['mean']:.3f} "
        f"({best['greedy']['low']:.3f} – {best['greedy']['high']:.3f}), from {base:.3f} before."
    ]
    if best["greedy"]["mean"] <= base:
        return [*said, "No method exceeded the base: none is recommended."]
    others = [r["name"] for r in level if r is not best]
    if others:
        said.append(
            f"{_listed(others)} {'are' if len(others) > 1 else 'is'} level with it: the paired "
            "difference is within its 95 % interval of 0."
        )
        said.append(
            f"Among these, {chosen['name']} is preferred: {_alarms(chosen)} alarms, KL "
            f"{_kl(chosen):.2f}, {_seconds(chosen):,.0f} s of training."
        )
    behind = [r for r in methods if r not in level]
    if behind:
        gap = _difference(result["differences"], best, behind[0])
        said.append(
            f"Behind it, {behind[0]['name']} is {gap['mean']:.3f} lower "
            f"({gap['low']:.3f} – {gap['high']:.3f})."
        )
    below = [r["name"] for r in methods if r["greedy"]["mean"] <= base]
    if below:
        said.append(f"{_listed(below)} did not exceed the base.")
    return said


def _would_change(
    result: Mapping[str, Any], methods: Sequence[Record], chosen: Record
) -> list[str]:
    """Conditions under which another method would be recommended, from the measured curves."""
    found = [_less_budget(result, methods, chosen), _no_sampling(methods, chosen)]
    found += [_kl_limit(methods, chosen), _one_seed(result)]
    return [sentence for sentence in found if sentence is not None]


def _less_budget(
    result: Mapping[str, Any], methods: Sequence[Record], chosen: Record
) -> str | None:
    """The largest budget, well below what was spent, at which another method's curve led."""
    currency = result["budget"]["currency"] if result["budget"] else "seconds"
    whole = _mean([run["spent"][currency] for run in chosen["runs"]])
    points = {p[currency] for r in methods for run in r["runs"] for p in run["curve"]}
    limits = sorted(limit for limit in points if 0 < limit <= SMALLER * whole)
    for limit in reversed(limits):
        reached = {r["name"]: quality_at(r, currency, limit) for r in methods}
        known = {name: q for name, q in reached.items() if q is not None}
        if chosen["name"] not in known:
            continue
        leader = max(known, key=lambda name: known[name])
        if known[leader] > known[chosen["name"]] + 0.02:
            return (
                f"A smaller budget: after {limit:,.0f} {CURRENCY_WORDS[currency]} of these runs "
                f"{leader} led with {known[leader]:.3f} against {known[chosen['name']]:.3f}."
            )
    return None


def quality_at(method: Mapping[str, Any], currency: str, limit: float) -> float | None:
    """Greedy quality after spending ``limit``, between measured points linearly, over seeds.

    None where the method was not measured so early, or spends nothing of the currency.
    """
    values = []
    for run in method["runs"]:
        points = [p for p in run["curve"] if p["greedy"] is not None]
        before = [p for p in points if p[currency] <= limit]
        after = [p for p in points if p[currency] > limit]
        if not before or points[-1][currency] == 0:
            return None
        a = before[-1]
        if after:
            b = after[0]
            share = (limit - a[currency]) / (b[currency] - a[currency])
            values.append(a["greedy"] + share * (b["greedy"] - a["greedy"]))
        else:
            values.append(a["greedy"])
    return _mean(values)


def _no_sampling(methods: Sequence[Record], chosen: Record) -> str | None:
    """The best method that samples nothing while it trains."""
    if all(s["sampling"] == "none" for s in chosen["stages"][-1:]):
        return None
    offline = [r for r in methods if r["stages"] and r["stages"][-1]["sampling"] == "none"]
    if not offline:
        return None
    return (
        "No sampling while training (no engine, or preferences that people gave): "
        f"{offline[0]['name']}, at {offline[0]['greedy']['mean']:.3f}."
    )


def _kl_limit(methods: Sequence[Record], chosen: Record) -> str | None:
    """The best method that stays nearer to the reference."""
    nearer = [r for r in methods if _kl(r) < 0.7 * _kl(chosen) and r["stages"]]
    if not nearer:
        return None
    return (
        f"A limit on KL below {_kl(chosen):.2f} nats per response: {nearer[0]['name']} is the best "
        f"of those well below it, at {nearer[0]['greedy']['mean']:.3f} with {_kl(nearer[0]):.2f}."
    )


def _one_seed(result: Mapping[str, Any]) -> str | None:
    if len(result["seeds"]) > 1:
        return None
    return "More seeds: one seed says nothing of how much a method varies from run to run."


def _level(differences: Sequence[Record], best: Record, other: Record) -> bool:
    gap = _difference(differences, best, other)
    return gap["low"] <= 0 <= gap["high"]


def _difference(differences: Sequence[Record], one: Record, other: Record) -> Record:
    """How far ``one`` is ahead of ``other``, with its interval."""
    for d in differences:
        if d["methods"] == [one["name"], other["name"]]:
            return d
        if d["methods"] == [other["name"], one["name"]]:
            return {"mean": -d["mean"], "low": -d["high"], "high": -d["low"]}
    raise KeyError(f"{one['name']} and {other['name']} were not compared")


def _alarms(method: Mapping[str, Any]) -> int:
    return sum(len(run["alarms"]) for run in method["runs"])


def _kl(method: Mapping[str, Any]) -> float:
    return _mean([run["final"].get("kl") or 0.0 for run in method["runs"]])


def _seconds(method: Mapping[str, Any]) -> float:
    return _mean([run["spent"]["seconds"] for run in method["runs"]])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
