"""The verdict: which method suits this problem, derived from the numbers by fixed rules.

1. The methods are ranked by held-out greedy quality, averaged over seeds.
2. A method is level with the best if the 95 % interval of their paired difference over the same
   prompts contains 0.
3. Among level methods, the one with the fewest alarms is preferred; then the one with the smallest
   KL divergence; then the one with the least wall-clock time.
4. A method whose quality does not exceed the base's is never recommended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = dict[str, Any]

RULES = (
    "Methods are ranked by held-out greedy quality, averaged over seeds.",
    "A method is level with the best if the 95 % interval of their paired difference over the same "
    "prompts contains 0.",
    "Among level methods: fewer alarms, then a smaller KL divergence, then less wall-clock time.",
    "A method that does not exceed its base is not recommended.",
)
SMALLER = 0.75
"""Largest smaller budget that is considered, as a share of the recommended method's cost."""
CURRENCY_WORDS = {
    "seconds": "seconds of training",
    "generated_tokens": "generated tokens",
    "trained_tokens": "trained tokens",
    "flops": "FLOPs",
}


def judge(result: Mapping[str, Any]) -> Record:
    """Return the recommended method, the level methods, the reasons, and what would change it."""
    methods = sorted(result["methods"], key=lambda method: -method["greedy"]["mean"])
    base = _mean([record["greedy"] for record in result["bases"].values()])
    best = methods[0]
    level = [m for m in methods if m is best or _level(result["differences"], best, m)]
    chosen = min(level, key=lambda m: (_alarms(m), _kl(m), _seconds(m)))
    helps = chosen["greedy"]["mean"] > base
    return {
        "recommended": chosen["name"] if helps else None,
        "best": best["name"],
        "level": [method["name"] for method in level],
        "base": base,
        "ranking": [{"name": m["name"], **m["greedy"]} for m in methods],
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
    seeds_text = f"{seeds} seeds" if seeds > 1 else "one seed"
    budget = result["budget"]
    budget_text = (
        f"With {budget['amount']:,.0f} {CURRENCY_WORDS[budget['currency']]} for each method"
        if budget
        else "With each method's own number of steps"
    )
    sentences = [
        f"{budget_text}, on {result['n']:,} held-out prompts and {seeds_text}, "
        f"{best['name']} reached the highest quality: {best['greedy']['mean']:.3f} "
        f"({best['greedy']['low']:.3f} – {best['greedy']['high']:.3f}), from {base:.3f} before."
    ]
    if best["greedy"]["mean"] <= base:
        return [*sentences, "No method exceeded the base: none is recommended."]
    others = [m["name"] for m in level if m is not best]
    if others:
        sentences.append(
            f"{_join_names(others)} {'are' if len(others) > 1 else 'is'} level with it: the 95 % "
            "interval of the paired difference contains 0."
        )
        sentences.append(
            f"Among these, {chosen['name']} is preferred: {_alarms(chosen)} alarms, KL "
            f"{_kl(chosen):.2f}, {_seconds(chosen):,.0f} s of training."
        )
    behind = [m for m in methods if m not in level]
    if behind:
        gap = _difference(result["differences"], best, behind[0])
        sentences.append(
            f"Behind it, {behind[0]['name']} is {gap['mean']:.3f} lower "
            f"({gap['low']:.3f} – {gap['high']:.3f})."
        )
    below = [m["name"] for m in methods if m["greedy"]["mean"] <= base]
    if below:
        sentences.append(f"{_join_names(below)} did not exceed the base.")
    return sentences


def _would_change(
    result: Mapping[str, Any], methods: Sequence[Record], chosen: Record
) -> list[str]:
    """Return the conditions under which another method would be recommended."""
    sentences = [_less_budget(result, methods, chosen), _no_sampling(methods, chosen)]
    sentences += [_kl_limit(methods, chosen), _one_seed(result)]
    return [sentence for sentence in sentences if sentence is not None]


def _less_budget(
    result: Mapping[str, Any], methods: Sequence[Record], chosen: Record
) -> str | None:
    """Describe the largest clearly smaller budget at which another method led, if there is one."""
    currency = result["budget"]["currency"] if result["budget"] else "seconds"
    total = _mean([run["spent"][currency] for run in chosen["runs"]])
    points = {p[currency] for m in methods for run in m["runs"] for p in run["curve"]}
    limits = sorted(limit for limit in points if 0 < limit <= SMALLER * total)
    for limit in reversed(limits):
        reached = {m["name"]: quality_at(m, currency, limit) for m in methods}
        quality = {name: q for name, q in reached.items() if q is not None}
        if chosen["name"] not in quality:
            continue
        leader = max(quality, key=lambda name: quality[name])
        if quality[leader] > quality[chosen["name"]] + 0.02:
            return (
                f"A smaller budget: after {limit:,.0f} {CURRENCY_WORDS[currency]} of these runs "
                f"{leader} led with {quality[leader]:.3f} against {quality[chosen['name']]:.3f}."
            )
    return None


def quality_at(method: Mapping[str, Any], currency: str, limit: float) -> float | None:
    """Return the greedy quality after spending ``limit``, averaged over seeds.

    Quality is interpolated linearly between evaluations. None if the method has no evaluation that
    early or does not spend the currency.
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
    nearer = [m for m in methods if _kl(m) < 0.7 * _kl(chosen) and m["stages"]]
    if not nearer:
        return None
    return (
        f"A limit on KL below {_kl(chosen):.2f} nats per response: {nearer[0]['name']} is the best "
        f"method well below it, at {nearer[0]['greedy']['mean']:.3f} with {_kl(nearer[0]):.2f}."
    )


def _one_seed(result: Mapping[str, Any]) -> str | None:
    if len(result["seeds"]) > 1:
        return None
    return "More seeds: one seed does not show how much a method varies from run to run."


def _level(differences: Sequence[Record], best: Record, other: Record) -> bool:
    gap = _difference(differences, best, other)
    return gap["low"] <= 0 <= gap["high"]


def _difference(differences: Sequence[Record], one: Record, other: Record) -> Record:
    """Return by how much ``one`` is better than ``other``, with the interval."""
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


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
