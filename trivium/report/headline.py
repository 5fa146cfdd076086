"""Summary of a run: the key facts at the top of its report.

Every fact is computed from the run's files. A fact that was not logged is None and is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trivium.config.yaml_source import YamlSource
from trivium.errors import ConfigurationError
from trivium.monitoring.metrics import EVALUATIONS, METRICS
from trivium.report.curves import axes, is_number, round_digits

_MAX_CONFIG = 1 << 17  # characters; a longer text is not the configuration of a run
_HELD_OUT = ("accuracy", "nll")
_MEASURES = {"reward-model": ("accuracy",), "dpo": ("implicit_reward/accuracy",)}
_FALLBACK_MEASURES = ("nll", "reward/mean", "loss")

Row = dict[str, Any]


def headline(
    record: Row, config: str, rows: Sequence[Row], measured: Sequence[Row], events: Sequence[Row]
) -> dict[str, Any]:
    """Return the summary of a run."""
    settings = _settings(config)
    kind = str(record.get("kind", "run"))
    last = measured[-1] if measured else {}
    seconds = _seconds(rows)
    return {
        "kind": kind,
        "base": _lookup(settings, "model", "path"),
        "started": record.get("started"),
        "seed": _lookup(settings, "run", "seed"),
        "state": state(rows, events),
        "step": rows[-1]["step"] if rows else None,
        "steps": _lookup(settings, "steps"),
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
    """Return whether the run finished, stopped, was interrupted or failed, and the reason.

    The latest such event counts, unless later steps were logged. A run that saved its final model
    is finished. The state "open" means that the run is in progress or ended without an event.
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
    """Return the first and the last held-out quality: greedy, or sampled if there is no greedy one.

    The change is clear if the interval of the win rate excludes one half, or, without a win rate,
    if the two 95 % intervals do not overlap.
    """
    for name in ("greedy", "sampled"):
        rows_with_value = [row for row in measured if is_number(row.get(name))]
        if not rows_with_value:
            continue
        first, last = (_interval(row, name) for row in (rows_with_value[0], rows_with_value[-1]))
        assert first and last, "every selected row has a value"
        several = len(rows_with_value) > 1
        return {
            "decoding": name,
            "n": rows_with_value[-1].get("n"),
            "first": first | {"step": rows_with_value[0]["step"]} if several else None,
            "last": last | {"step": rows_with_value[-1]["step"]},
            "best": _best(rows_with_value, name) if several else None,
            "change": _direction(first, last, rows_with_value[-1]) if several else None,
        }
    return None


def training(kind: str, rows: Sequence[Row], measured: Sequence[Row]) -> dict[str, Any] | None:
    """Return the first and last value of the main metric, for a run without held-out rewards."""
    names = (*_MEASURES.get(kind, ()), *_FALLBACK_MEASURES)
    candidates = [(EVALUATIONS[name], measured, True) for name in _HELD_OUT]
    candidates += [(METRICS[name], rows, False) for name in names]
    for metric, source, held_out in candidates:
        values = change(source, metric.name)
        if values:
            description = {"title": metric.title, "meaning": metric.meaning}
            return {**description, "held_out": held_out, **values}
    return None


def change(rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    """Return the first and the last value of a metric; ``first`` is None for a single value."""
    values = [row[name] for row in rows if _finite(row.get(name))]
    if not values:
        return None
    return {
        "first": round_digits(values[0]) if len(values) > 1 else None,
        "last": round_digits(values[-1]),
    }


def _direction(first: Row, last: Row, row: Row) -> str:
    """Return "rose", "fell" or "unclear"."""
    win_rate = _interval(row, "win_rate")
    if win_rate and win_rate["low"] is not None and win_rate["high"] is not None:
        rose, fell = win_rate["low"] > 0.5, win_rate["high"] < 0.5
    elif None in (first["low"], first["high"], last["low"], last["high"]):
        return "unclear"
    else:
        rose, fell = last["low"] > first["high"], last["high"] < first["low"]
    return "rose" if rose else "fell" if fell else "unclear"


def _best(rows: Sequence[Row], name: str) -> dict[str, Any]:
    best = max(rows, key=lambda row: row[name] if math.isfinite(row[name]) else -math.inf)
    return {"value": best[name], "step": best["step"]}


def _interval(row: Row, name: str) -> dict[str, Any] | None:
    if not is_number(row.get(name)):
        return None
    ends = {end: row.get(f"{name}_{end}") for end in ("low", "high")}
    return {"value": row[name]} | {end: v if is_number(v) else None for end, v in ends.items()}


def _last(rows: Sequence[Row], name: str) -> dict[str, Any] | None:
    values = change(rows, name)
    return {"value": values["last"], "low": None, "high": None} if values else None


def _seconds(rows: Sequence[Row]) -> float | None:
    return axes(rows)["elapsed"][-1] if rows else None


def _sum(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if _finite(row.get(name))]
    return round_digits(sum(values)) if values else None


def _finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def _settings(config: str) -> Any:
    """Return the configuration as a mapping; empty if it cannot be parsed."""
    try:
        return YamlSource(None, config[:_MAX_CONFIG]).values
    except ConfigurationError:
        return {}


def _lookup(settings: Any, *keys: str) -> Any:
    for key in keys:
        settings = settings.get(key) if isinstance(settings, dict) else None
    return settings if isinstance(settings, str | bool) or is_number(settings) else None
