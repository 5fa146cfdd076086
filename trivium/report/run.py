"""A run's report: everything that its directory says, as plain data, and as one HTML file.

Only the run's files are read, through the readers of ``trivium.runs.store``; nothing is computed
anew and no model is loaded. Left out: comparing runs, and how it is drawn (``templates/``).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trivium.report import curves, evaluations
from trivium.report.headline import headline
from trivium.report.page import build_components, clip, encode, require_free, write_page
from trivium.report.samples import MOST_BYTES, select
from trivium.runs.store import (
    read_evaluations,
    read_events,
    read_metrics,
    read_run,
    read_samples,
)

SCRIPTS = ("tokens.js", "samples.js", "panels.js", "cost.js", "run.js")
_MOST_ALARMS = 200
_MOST_EVENTS = 100
_MOST_CONFIG = 150_000  # bytes
_MOST_WORDS = 1000  # bytes of one text of an event
_MOST_BYTES = 5_200_000  # of all data, so that a page with its scripts stays below 6 MB


def write(run: Path, output: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the report of the run at ``run`` to one HTML file and return the file's path.

    Args:
        run: the run's directory.
        output: the file; by default report.html in the run's directory, where an earlier report
            is replaced.
        overwrite: replace ``output`` if it exists.

    Raises:
        DataError: the directory is no run, or a file in it is damaged.
        ConfigurationError: ``output`` exists and may not be replaced.
        TrainingError: the file cannot be written.
    """
    require_free(output, overwrite)
    data = collect(run)
    return write_page(output or run / "report.html", page(data))


def page(data: dict[str, Any], *, live: bool = False) -> str:
    """Return the page that shows what ``collect`` returned."""
    return build_components(f"{data['name']} · Trivium", data, SCRIPTS, live=live)


def collect(run: Path) -> dict[str, Any]:
    """Return everything that the page shows of the run at ``run``; DataError if it is no run."""
    record = read_run(run)
    rows = curves.by_step(read_metrics(run))
    events = read_events(run)
    measured = evaluations.rows(read_evaluations(run))
    config = _config(run)
    charts = curves.panels(rows)
    data = {
        "name": run.resolve().name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": record,
        "headline": headline(record, config, rows, measured, events),
        "alarms": _ends([e for e in events if e.get("kind") == "alarm"], _MOST_ALARMS),
        "events": _ends([e for e in events if e.get("kind") != "alarm"], _MOST_EVENTS),
        "axes": curves.axes(rows),
        "held_out": evaluations.panels(measured),
        "curves": charts,
        "thinned": _thinned(charts),
        "evaluation": {"columns": evaluations.columns(measured), "rows": measured},
        "cost": curves.cost(rows),
        "config": {"text": clip(config, _MOST_CONFIG), "characters": len(config)},
    }
    left = _MOST_BYTES - len(encode(data).encode())
    return data | {"samples": select(read_samples(run), min(MOST_BYTES, left))}


def _config(run: Path) -> str:
    """The run's configuration as it stands in config.yaml; empty where there is none."""
    try:
        return (run / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _thinned(charts: Sequence[dict[str, Any]]) -> int:
    """How many points of how the longest curve were there, if a curve was thinned; else 0."""
    series = [curve for chart in charts for curve in chart["series"]]
    return max((c["points"] for c in series if c["points"] > len(c["steps"])), default=0)


def _ends(events: Sequence[dict[str, Any]], most: int) -> dict[str, Any]:
    """How many events there are, and all of them or, of many, the first and the last."""
    few = len(events) <= most
    shown = events if few else [*events[: most // 2], *events[-(most // 2) :]]
    return {"total": len(events), "shown": [_words(event) for event in shown]}


def _words(event: dict[str, Any]) -> dict[str, Any]:
    """An event with its texts cut to what a reader reads."""
    return {
        name: clip(value, _MOST_WORDS) if isinstance(value, str) else value
        for name, value in event.items()
    }
