"""Rows, columns and curves of the evaluations in evaluation.jsonl."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trivium.monitoring.metrics import EVALUATIONS
from trivium.report.curves import by_step, evenly_spaced, is_number, round_digits

_PASS = re.compile("pass@[0-9]{1,9}")
MAX_EVALUATIONS = 400
"""Maximum number of evaluations on a page."""


def rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluations ordered by step, with pass@k as columns, thinned to the maximum."""
    ordered = by_step(records)
    kept = [ordered[i] for i in evenly_spaced(len(ordered), MAX_EVALUATIONS)]
    return [_flatten(record) for record in kept]


def columns(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the measured columns: name, title, unit and meaning of each."""
    passes = sorted(
        {name for row in evaluations for name in row if _PASS.fullmatch(name)},
        key=lambda name: int(name.removeprefix("pass@")),
    )
    known = [m for m in EVALUATIONS.values() if m.panel and m.name != "pass_at"]
    table = [*known, *(replace(EVALUATIONS["pass_at"], name=n, title=n) for n in passes)]
    return [vars(m) for m in table if any(is_number(row.get(m.name)) for row in evaluations)]


def panels(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the held-out charts by panel, with the curves' confidence intervals."""
    charts: dict[str, dict[str, Any]] = {}
    for column in columns(evaluations):
        chart = {"panel": column["panel"], "unit": column["unit"], "series": []}
        charts.setdefault(column["panel"], chart)["series"].append(_curve(evaluations, column))
    return list(charts.values())


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


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    flat = {name: round_digits(value) for name, value in record.items() if is_number(value)}
    passes = record.get("pass_at")
    if isinstance(passes, dict):
        flat |= {f"pass@{k}": round_digits(p) for k, p in passes.items() if is_number(p)}
    return flat
