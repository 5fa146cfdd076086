"""Report of a run: the content of its directory, as plain data and as one HTML file.

Only the run's files are read, with ``trivium.runs.store``; no model is loaded. ``templates/`` draws
the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trivium.errors import DataError
from trivium.report import curves, evaluations
from trivium.report.headline import headline
from trivium.report.page import clip, encode, render_page, require_new_output, write_page
from trivium.report.samples import MAX_BYTES, select
from trivium.runs.files import read_regular
from trivium.runs.store import (
    read_evaluations,
    read_events,
    read_metrics,
    read_run,
    read_samples,
)

SCRIPTS = ("tokens.js", "samples.js", "panels.js", "cost.js", "run.js")
_MAX_ALARMS = 200
_MAX_EVENTS = 100
_MAX_CONFIG_BYTES = 150_000
_MAX_EVENT_BYTES = 1000  # for each text of an event
_MAX_DATA_BYTES = 5_200_000  # for all data, so that a page with its scripts stays below 6 MB


def write(run: Path, output: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the report of the run at ``run`` to one HTML file and return the file's path.

    Args:
        run: the run's directory.
        output: the file; by default report.html in the run's directory, which replaces an earlier
            report.
        overwrite: replace ``output`` if it exists.

    Raises:
        DataError: the directory is not that of a run, or a file in it is damaged.
        ConfigurationError: ``output`` exists and ``overwrite`` is False.
        TrainingError: the file cannot be written.
    """
    require_new_output(output, overwrite)
    data = collect(run)
    return write_page(output or run / "report.html", page(data))


def page(data: dict[str, Any], *, live: bool = False) -> str:
    """Return the page that shows what ``collect`` returned."""
    return render_page(f"{data['name']} · Trivium", data, SCRIPTS, live=live)


def collect(run: Path) -> dict[str, Any]:
    """Return the data of the page for the run at ``run``.

    Raises:
        DataError: the directory is not that of a run, or a file in it is damaged.
    """
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
        "alarms": _first_and_last([e for e in events if e.get("kind") == "alarm"], _MAX_ALARMS),
        "events": _first_and_last([e for e in events if e.get("kind") != "alarm"], _MAX_EVENTS),
        "axes": curves.axes(rows),
        "held_out": evaluations.panels(measured),
        "curves": charts,
        "thinned": _thinned(charts),
        "evaluation": {"columns": evaluations.columns(measured), "rows": measured},
        "cost": curves.cost(rows),
        "config": {"text": clip(config, _MAX_CONFIG_BYTES), "characters": len(config)},
    }
    left = _MAX_DATA_BYTES - len(encode(data).encode())
    return data | {"samples": select(read_samples(run), min(MAX_BYTES, left))}


def _config(run: Path) -> str:
    """Return the text of config.yaml; empty if there is none.

    Raises:
        DataError: it is something other than a file, or too long.
    """
    path = run / "config.yaml"
    try:
        return read_regular(path).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _thinned(charts: Sequence[dict[str, Any]]) -> int:
    """Return the original number of points of the longest thinned curve; 0 if none is thinned."""
    series = [curve for chart in charts for curve in chart["series"]]
    return max((c["points"] for c in series if c["points"] > len(c["steps"])), default=0)


def _first_and_last(events: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Return the number of events, and all of them or, if there are many, the first and the
    last."""
    few = len(events) <= limit
    shown = events if few else [*events[: limit // 2], *events[-(limit // 2) :]]
    return {"total": len(events), "shown": [_clip_texts(event) for event in shown]}


def _clip_texts(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event with its texts clipped."""
    return {
        name: clip(value, _MAX_EVENT_BYTES) if isinstance(value, str) else value
        for name, value in event.items()
    }
