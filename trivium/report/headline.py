"""What came of a run, in a handful of facts: the first thing that its report shows.

Every fact is read off the run's files by the rule that stands here; one that was not logged is
null and is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml

from trivium.monitoring.metrics import EVALUATIONS, METRICS
from trivium.report.curves import axes, is_number, short

_HELD_OUT = ("accuracy", "nll")
_MEASURES = {"reward-model": ("accuracy",), "dpo": ("implicit_reward/accuracy",)}
_OTHERWISE = ("nll", "reward/mean", "loss")

Row = dict[str, Any]


def headline(
    record: Row, config: str, rows: Sequence[Row], measured: Sequence[Row], events: Sequence[Row]
) -> dict[str, Any]:
    """Return the facts: see each function for its rule."""
    settings = _settings(config)
    kind = str(record.get("kind", "run"))
    last = measured[-1] if measured else {}
    seconds = _seconds(rows)
    return {
        "kind": kind,
        "base": _at(settings, "model", "path"),
        "started": record.get("started"),
        "seed": _at(settings, "run", "seed"),
        "state": state(rows, events),
        "step": rows[-1]["step"] if rows else None,
        "steps": _at(settings, "steps"),
        "quality": quality(measured),
        "training": None if quality(measured) else training(kind, rows, measured),
        "win_rate": _interval(last, "win_rate"),
        "kl": _interval(last, "kl") or _last(rows, "kl/response"),
        "length": change(measured, "length") or change(rows, "length/mean"),
        "alarms": sum(event.get("kind") == "alarm" for event in events),
        "seconds": seconds,
        "generated": _sum(rows, "tokens/generated"),
        "trained": _sum(rows, "tokens/trained"),
        "flops": _sum(rows, "flops"),
    }


def state(rows: Sequence[Row], events: Sequence[Row]) -> dict[str, Any]:
    """Whether the run finished or was stopped, and why; otherwise it goes on, or was broken off.

    The latest such event counts, unless steps were logged after the one it names. A run that
    saved its final model is finished.
    """
    reached = rows[-1]["step"] if rows else 0
    for event in reversed(events):
        kind = event.get("kind")
        step = event.get("step")
        if kind == "resumed":
            break
        if kind in ("finished", "stopped", "interrupted", "failed"):
            if isinstance(step, int | float) and step < reached:
                break
            return {"kind": kind, "reason": str(event.get("message", ""))}
        if kind == "saved" and event.get("name") == "final":
            return {"kind": "finished", "reason": ""}
    return {"kind": "open", "reason": ""}


def quality(measured: Sequence[Row]) -> dict[str, Any] | None:
    """The first and the last held-out quality: greedy, or sampled where that is all there is.

    The change is clear where the win rate against the first evaluation excludes one half; without
    a win rate, where the two 95 % intervals do not overlap.
    """
    for name in ("greedy", "sampled"):
        found = [row for row in measured if is_number(row.get(name))]
        if not found:
            continue
        first, last = (_interval(row, name) for row in (found[0], found[-1]))
        assert first and last, "the rows were chosen for having the number"
        several = len(found) > 1
        return {
            "drawn": name,
            "n": found[-1].get("n"),
            "first": first | {"step": found[0]["step"]} if several else None,
            "last": last | {"step": found[-1]["step"]},
            "best": _best(found, name) if several else None,
            "change": _direction(first, last, found[-1]) if several else None,
        }
    return None


def training(kind: str, rows: Sequence[Row], measured: Sequence[Row]) -> dict[str, Any] | None:
    """The first and last of the number that tells most, for a run that answers no prompts."""
    names = (*_MEASURES.get(kind, ()), *_OTHERWISE)
    known = [(EVALUATIONS[name], measured, True) for name in _HELD_OUT]
    known += [(METRICS[name], rows, False) for name in names]
    for metric, source, held_out in known:
        found = change(source, metric.name)
        if found:
            told = {"title": metric.title, "meaning": metric.meaning}
            return {**told, "held_out": held_out, **found}
    return None


def change(rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    """The first and the last value of a number, first null where it was measured once."""
    values = [row[name] for row in rows if _finite(row.get(name))]
    if not values:
        return None
    return {"first": short(values[0]) if len(values) > 1 else None, "last": short(values[-1])}


def _direction(first: Row, last: Row, row: Row) -> str:
    """Return "rose", "fell" or "unclear"."""
    won = _interval(row, "win_rate")
    if won and won["low"] is not None and won["high"] is not None:
        rose, fell = won["low"] > 0.5, won["high"] < 0.5
    elif None in (first["low"], first["high"], last["low"], last["high"]):
        return "unclear"
    else:
        rose, fell = last["low"] > first["high"], last["high"] < first["low"]
    return "rose" if rose else "fell" if fell else "unclear"


def _best(found: Sequence[Row], name: str) -> dict[str, Any]:
    best = max(found, key=lambda row: row[name] if math.isfinite(row[name]) else -math.inf)
    return {"value": best[name], "step": best["step"]}


def _interval(row: Row, name: str) -> dict[str, Any] | None:
    if not is_number(row.get(name)):
        return None
    ends = {end: row.get(f"{name}_{end}") for end in ("low", "high")}
    return {"value": row[name]} | {end: v if is_number(v) else None for end, v in ends.items()}


def _last(rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    found = change(rows, name)
    return {"value": found["last"], "low": None, "high": None} if found else None


def _seconds(rows: Sequence[Row]) -> float | None:
    return axes(rows)["elapsed"][-1] if rows else None


def _sum(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if _finite(row.get(name))]
    return short(sum(values)) if values else None


def _finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _settings(config: str) -> Any:
    """The configuration as a mapping; empty where it cannot be read."""
    try:
        return yaml.safe_load(config)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}


def _at(settings: Any, *keys: str) -> Any:
    for key in keys:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings if isinstance(settings, str | int | float) else None
