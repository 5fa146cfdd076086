"""From the lines of metrics.jsonl to curves: which belong together, and how many points are enough.

A run of any length gives a page of bounded size: a long curve keeps the smallest and the largest
value of each of its stretches, so that no spike is lost. Left out: drawing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

from trivium.monitoring.metrics import METRICS, Metric, metric

MOST_POINTS = 2000
"""Points that one curve keeps at most."""
_ALL_POINTS = 100_000
_MOST_BINS = 120
_MOST_IN_CHART = 6
_FAR_APART = 300.0
_UNNAMED = "Other numbers"
_ORDER = {name: place for place, name in enumerate(METRICS)}
_FIRST_OF_PANEL = {m.panel: _ORDER[m.name] for m in reversed(METRICS.values())}

Row = dict[str, Any]


def by_step(records: Sequence[Row]) -> list[Row]:
    """Return the records in order of their steps; of several of one step, the last."""
    last = {row["step"]: row for row in records if _is_step(row.get("step"))}
    return [last[step] for step in sorted(last)]


def is_number(value: Any) -> bool:
    """Whether a value is a number that counts: finite or not, but no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_step(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def short(value: Any) -> Any:
    """Return a number with six significant digits; anything else as it is."""
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value


def axes(rows: Sequence[Row]) -> dict[str, list[float]]:
    """What a step means in seconds and tokens since the start, for at most MOST_POINTS steps."""
    table: dict[str, list[float]] = {"step": [row["step"] for row in rows]}
    table["elapsed"] = _elapsed(rows)
    for name, column in (("tokens/generated", "generated"), ("tokens/trained", "trained")):
        if any(is_number(row.get(name)) for row in rows):
            table[column] = _running_sum(rows, name)
    if rows and table["step"][0] > 0:
        table = {name: [0, *column] for name, column in table.items()}
    kept = evenly(len(table["step"]), MOST_POINTS)
    return {name: [short(column[i]) for i in kept] for name, column in table.items()}


def panels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the curves by panel, in the order of METRICS; unknown names come last, one by one."""
    names = sorted({name for row in rows for name in row if name not in ("step", "elapsed")})
    described = [(name, metric(name)) for name in names]
    known = [(name, m) for name, m in described if m is not None]
    known.sort(key=lambda pair: _place(pair[1]))
    most = min(MOST_POINTS, max(20, _ALL_POINTS // max(1, len(names))))
    found: list[dict[str, Any]] = []
    for title, members in groupby(known, key=lambda pair: pair[1].panel):
        curves = [_curve(rows, name, m, most) for name, m in members]
        found += _charts(title, [curve for curve in curves if curve])
    for name, m in described:
        curve = None if m else _curve(rows, name, Metric(name, name, "", _UNNAMED, ""), most)
        found += [{"panel": _UNNAMED, "unit": "", "series": [curve]}] if curve else []
    return found


def cost(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the seconds of each stage, in total and over stretches of steps; None if unlogged."""
    stages = [m for m in METRICS.values() if m.panel == "Time" and m.name != "time/total"]
    stages = [m for m in stages if any(is_number(row.get(m.name)) for row in rows)]
    if not stages:
        return None
    per_row = [[_count(row.get(m.name)) for m in stages] for row in rows]
    other = [
        max(0.0, _count(row.get("time/total")) - sum(seconds))
        for row, seconds in zip(rows, per_row, strict=True)
    ]
    per_row = [[*seconds, rest] for seconds, rest in zip(per_row, other, strict=True)]
    speeds = {"time/rollout": "tokens/generated", "time/update": "tokens/trained"}
    totals = [sum(column) for column in zip(*per_row, strict=True)]
    named = [
        {
            "name": m.title,
            "meaning": m.meaning,
            "seconds": short(total),
            "tokens": _total(rows, speeds.get(m.name)),
        }
        for m, total in zip(stages, totals, strict=False)
    ]
    rest = {
        "name": "other",
        "meaning": "The rest of the steps' time.",
        "seconds": short(totals[-1]),
        "tokens": None,
    }
    return {
        "stages": [*named, rest],
        "bins": [
            _bin(rows, per_row, first, last) for first, last in _stretches(len(rows), _MOST_BINS)
        ],
        "flops": _total(rows, "flops"),
        "generated": _total(rows, "tokens/generated"),
        "trained": _total(rows, "tokens/trained"),
    }


def thin(steps: Sequence[float], values: Sequence[float], most: int) -> list[int]:
    """Return the places to keep: ends, and each stretch's smallest, largest and first not finite.

    At most ``most`` places, in order; all of them where there are no more.
    """
    assert most >= 5, "fewer than five points hold no curve"
    if len(steps) <= most:
        return list(range(len(steps)))
    kept = {0, len(steps) - 1}
    for first, last in _stretches(len(steps), (most - 2) // 3):
        finite = [i for i in range(first, last) if math.isfinite(values[i])]
        kept.update(next(([i] for i in range(first, last) if not math.isfinite(values[i])), []))
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)


def evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` places, evenly spread, both ends among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _curve(rows: Sequence[Row], name: str, m: Metric, most: int) -> dict[str, Any] | None:
    logged = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    if not logged:
        return None
    steps, values = zip(*logged, strict=True)
    kept = thin(steps, values, most)
    return {
        "name": name,
        "title": m.title,
        "unit": m.unit,
        "meaning": m.meaning,
        "source": m.source,
        "points": len(steps),
        "steps": [steps[i] for i in kept],
        "values": [short(values[i]) for i in kept],
    }


def _charts(title: str, curves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the curves of one panel into as few charts as one axis can serve.

    Curves share a chart where they have one unit and are not of wholly different size.
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
    if curve["unit"] != chart["unit"] or len(chart["series"]) >= _MOST_IN_CHART:
        return False
    sizes = [_size(other) for other in (curve, *chart["series"])]
    sizes = [size for size in sizes if size > 0]
    return not sizes or max(sizes) <= _FAR_APART * min(sizes)


def _size(curve: dict[str, Any]) -> float:
    return max((abs(value) for value in curve["values"] if math.isfinite(value)), default=0.0)


def _place(m: Metric) -> tuple[int, int]:
    """Where a metric stands: by its panel's first member, then by its own place in the table."""
    name = re.sub(r"^rewards/.+/", "rewards/<reward>/", m.name)
    return _FIRST_OF_PANEL[m.panel], _ORDER[name]


def _elapsed(rows: Sequence[Row]) -> list[float]:
    """Seconds since the start; the clock of a run that was continued starts again at 0."""
    read = [_count(row.get("elapsed")) for row in rows]
    before = 0.0
    seconds = read[:1]
    for last, now in pairwise(read):
        before += last if now < last else 0.0
        seconds.append(before + now)
    return seconds


def _running_sum(rows: Sequence[Row], name: str) -> list[float]:
    return list(accumulate(_count(row.get(name)) for row in rows))


def _total(rows: Sequence[Row], name: str | None) -> float | None:
    values = [_count(row[name]) for row in rows if name in row] if name else []
    return short(sum(values)) if values else None


def _count(value: Any) -> float:
    """A number that can be summed; 0 where there is none."""
    return float(value) if is_number(value) and math.isfinite(value) else 0.0


def _stretches(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` places into at most ``most`` stretches of nearly one length."""
    parts = min(count, most)
    for i in range(parts):
        yield i * count // parts, (i + 1) * count // parts


def _bin(
    rows: Sequence[Row], seconds: Sequence[Sequence[float]], first: int, last: int
) -> dict[str, Any]:
    return {
        "first": rows[first]["step"],
        "last": rows[last - 1]["step"],
        "seconds": [short(sum(column)) for column in zip(*seconds[first:last], strict=True)],
    }
