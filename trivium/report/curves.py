"""Curves from the lines of metrics.jsonl, grouped into charts and thinned.

The page has a bounded size for a run of any length: a long curve keeps the smallest and the largest
value of each interval of steps, so that every spike stays visible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

from trivium.monitoring.metrics import METRICS, Metric, metric

MAX_POINTS = 2000
"""Maximum number of points of a curve."""
_MAX_TOTAL_POINTS = 100_000
_MAX_BINS = 120
_MAX_CURVES_PER_CHART = 6
_MAX_SCALE_RATIO = 300.0
_MAX_BITS = 1024
_UNKNOWN_PANEL = "Other numbers"
_ORDER = {name: i for i, name in enumerate(METRICS)}
_FIRST_OF_PANEL = {m.panel: _ORDER[m.name] for m in reversed(METRICS.values())}

Row = dict[str, Any]


def by_step(records: Sequence[Row]) -> list[Row]:
    """Return the records ordered by step, and only the last record of each step."""
    last = {row["step"]: row for row in records if _is_finite_number(row.get("step"))}
    return [last[step] for step in sorted(last)]


def is_number(value: Any) -> bool:
    """Return whether a value is a number, finite or not, and not a bool or beyond all floats."""
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() < _MAX_BITS
    return isinstance(value, float)


def _is_finite_number(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def round_digits(value: Any) -> Any:
    """Round a finite float to six significant digits; return any other value unchanged."""
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def axes(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Return seconds and tokens since the start for each step, for at most MAX_POINTS steps."""
    table: dict[str, list[float]] = {"step": [row["step"] for row in rows]}
    table["elapsed"] = _elapsed(rows)
    for name, column in (("tokens/generated", "generated"), ("tokens/trained", "trained")):
        if any(is_number(row.get(name)) for row in rows):
            table[column] = _running_sum(rows, name)
    if rows and table["step"][0] > 0:
        table = {name: [0, *column] for name, column in table.items()}
    kept = evenly_spaced(len(table["step"]), MAX_POINTS)
    return {name: [round_digits(column[i]) for i in kept] for name, column in table.items()}


def panels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the charts in the order of METRICS; each unknown metric has its own chart, at the
    end."""
    names = sorted({name for row in rows for name in row if name not in ("step", "elapsed")})
    described = [(name, metric(name)) for name in names]
    known = [(name, m) for name, m in described if m is not None]
    known.sort(key=lambda pair: _panel_order(pair[1]))
    max_points = min(MAX_POINTS, max(20, _MAX_TOTAL_POINTS // max(1, len(names))))
    charts: list[dict[str, Any]] = []
    for title, members in groupby(known, key=lambda pair: pair[1].panel):
        curves = [_curve(rows, name, m, max_points) for name, m in members]
        charts += _charts(title, [curve for curve in curves if curve])
    for name, m in described:
        unknown = Metric(name, name, "", _UNKNOWN_PANEL, "")
        curve = None if m else _curve(rows, name, unknown, max_points)
        charts += [{"panel": _UNKNOWN_PANEL, "unit": "", "series": [curve]}] if curve else []
    return charts


def cost(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the seconds of each stage, in total and per interval of steps; None if not logged."""
    stages = [m for m in METRICS.values() if m.panel == "Time" and m.name != "time/total"]
    stages = [m for m in stages if any(is_number(row.get(m.name)) for row in rows)]
    if not stages:
        return None
    per_row = [[_finite_or_zero(row.get(m.name)) for m in stages] for row in rows]
    other = [
        max(0.0, _finite_or_zero(row.get("time/total")) - sum(seconds))
        for row, seconds in zip(rows, per_row, strict=True)
    ]
    per_row = [[*seconds, rest] for seconds, rest in zip(per_row, other, strict=True)]
    speeds = {"time/rollout": "tokens/generated", "time/update": "tokens/trained"}
    totals = [sum(column) for column in zip(*per_row, strict=True)]
    named = [
        {
            "name": m.title,
            "meaning": m.meaning,
            "seconds": round_digits(total),
            "tokens": _total(rows, speeds.get(m.name)),
        }
        for m, total in zip(stages, totals, strict=False)
    ]
    rest = {
        "name": "other",
        "meaning": "Remaining time of the steps.",
        "seconds": round_digits(totals[-1]),
        "tokens": None,
    }
    return {
        "stages": [*named, rest],
        "bins": [
            _bin(rows, per_row, first, last) for first, last in _intervals(len(rows), _MAX_BINS)
        ],
        "flops": _total(rows, "flops"),
        "generated": _total(rows, "tokens/generated"),
        "trained": _total(rows, "tokens/trained"),
    }


def thin(steps: Sequence[float], values: Sequence[float], max_points: int) -> list[int]:
    """Return the indices of the points to keep, at most ``max_points``, in order.

    These are both ends, and the smallest, the largest and the first non-finite value of each
    interval.
    """
    assert max_points >= 5, "a thinned curve needs at least five points"
    if len(steps) <= max_points:
        return list(range(len(steps)))
    kept = {0, len(steps) - 1}
    for first, last in _intervals(len(steps), (max_points - 2) // 3):
        finite = [i for i in range(first, last) if math.isfinite(values[i])]
        kept.update(next(([i] for i in range(first, last) if not math.isfinite(values[i])), []))
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def evenly_spaced(count: int, max_points: int) -> list[int]:
    """Return at most ``max_points`` evenly spaced indices below ``count``, including both ends."""
    if count <= max_points:
        return list(range(count))
    return sorted({round(i * (count - 1) / (max_points - 1)) for i in range(max_points)})


def _curve(rows: Sequence[Row], name: str, m: Metric, max_points: int) -> dict[str, Any] | None:
    logged = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    if not logged:
        return None
    steps, values = zip(*logged, strict=True)
    kept = thin(steps, values, max_points)
    return {
        "name": name,
        "title": m.title,
        "unit": m.unit,
        "meaning": m.meaning,
        "source": m.source,
        "points": len(steps),
        "steps": [steps[i] for i in kept],
        "values": [round_digits(values[i]) for i in kept],
    }


def _charts(title: str, curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group the curves of one panel into as few charts as possible.

    Curves share a chart if they have the same unit and similar magnitudes.
    """
    charts: list[dict[str, Any]] = []
    for curve in curves:
        for chart in charts:
            if _fits(curve, chart):
                chart["series"].append(curve)
                break
        else:
            charts.append({"panel": title, "unit": curve["unit"], "series": [curve]})
    return charts


def _fits(curve: dict[str, Any], chart: dict[str, Any]) -> bool:
    if curve["unit"] != chart["unit"] or len(chart["series"]) >= _MAX_CURVES_PER_CHART:
        return False
    sizes = [_max_abs(other) for other in (curve, *chart["series"])]
    sizes = [size for size in sizes if size > 0]
    return not sizes or max(sizes) <= _MAX_SCALE_RATIO * min(sizes)


def _max_abs(curve: dict[str, Any]) -> float:
    return max((abs(value) for value in curve["values"] if math.isfinite(value)), default=0.0)


def _panel_order(m: Metric) -> tuple[int, int]:
    """Return the sort key of a metric: the position of its panel, then its own position."""
    name = re.sub(r"^rewards/.+/", "rewards/<reward>/", m.name)
    return _FIRST_OF_PANEL[m.panel], _ORDER[name]


def _elapsed(rows: Sequence[Row]) -> list[float]:
    """Return the seconds since the start; the clock of a resumed run restarts at 0."""
    read = [_finite_or_zero(row.get("elapsed")) for row in rows]
    before = 0.0
    seconds = read[:1]
    for last, now in pairwise(read):
        before += last if now < last else 0.0
        seconds.append(before + now)
    return seconds


def _running_sum(rows: Sequence[Row], name: str) -> list[float]:
    return list(accumulate(_finite_or_zero(row.get(name)) for row in rows))


def _total(rows: Sequence[Row], name: str | None) -> float | None:
    values = [_finite_or_zero(row[name]) for row in rows if name in row] if name else []
    return round_digits(sum(values)) if values else None


def _finite_or_zero(value: Any) -> float:
    """Return a finite number as a float, and 0 for any other value."""
    return float(value) if is_number(value) and math.isfinite(value) else 0.0


def _intervals(count: int, max_intervals: int) -> Iterator[tuple[int, int]]:
    """Divide ``count`` indices into at most ``max_intervals`` intervals of nearly equal length."""
    intervals = min(count, max_intervals)
    for i in range(intervals):
        yield i * count // intervals, (i + 1) * count // intervals


def _bin(
    rows: Sequence[Row], seconds: Sequence[Sequence[float]], first: int, last: int
) -> dict[str, Any]:
    return {
        "first": rows[first]["step"],
        "last": rows[last - 1]["step"],
        "seconds": [round_digits(sum(column)) for column in zip(*seconds[first:last], strict=True)],
    }
