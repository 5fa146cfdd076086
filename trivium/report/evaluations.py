"""The lines of evaluation.jsonl, by the names of ``monitoring.metrics``, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trivium.monitoring.metrics import EVALUATIONS
from trivium.report.curves import by_step, evenly, is_number, short

MOST_EVALUATIONS = 400
"""Evaluations that a page carries at most."""


def rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations in order of steps, with pass@k beside the rest; many are thinned."""
    ordered = by_step(records)
    kept = [ordered[i] for i in evenly(len(ordered), MOST_EVALUATIONS)]
    return [_flat(record) for record in kept]


def columns(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the evaluations measured: name, title, unit and meaning of each number."""
    passes = sorted(
        {name for row in evaluations for name in row if name.startswith("pass@")},
        key=lambda name: int(name.removeprefix("pass@")),
    )
    known = [m for m in EVALUATIONS.values() if m.panel and m.name != "pass_at"]
    table = [*known, *(replace(EVALUATIONS["pass_at"], name=n, title=n) for n in passes)]
    return [vars(m) for m in table if any(is_number(row.get(m.name)) for row in evaluations)]


def panels(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the held-out curves by panel, with their intervals where they have one."""
    found: dict[str, dict[str, Any]] = {}
    for column in columns(evaluations):
        chart = {"panel": column["panel"], "unit": column["unit"], "series": []}
        found.setdefault(column["panel"], chart)["series"].append(_curve(evaluations, column))
    return list(found.values())


def _curve(evaluations: Sequence[dict[str, Any]], column: dict[str, Any]) -> dict[str, Any]:
    name = column["name"]
    measured = [row for row in evaluations if is_number(row.get(name))]
    curve = {key: column[key] for key in ("name", "title", "unit", "meaning", "source")}
    curve |= {"points": len(measured), "steps": [row["step"] for row in measured]}
    curve["values"] = [row[name] for row in measured]
    if any(is_number(row.get(f"{name}_low")) for row in measured):
        curve["low"] = [row.get(f"{name}_low") for row in measured]
        curve["high"] = [row.get(f"{name}_high") for row in measured]
    return curve


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    flat = {name: short(value) for name, value in record.items() if is_number(value)}
    passes = record.get("pass_at")
    if isinstance(passes, dict):
        flat |= {f"pass@{k}": short(p) for k, p in passes.items() if k.isdigit()}
    return flat
