"""A run's report: everything that its directory says, as plain data, and as one HTML file.

Only the run's files are read, through the readers of ``trivium.runs.store``; nothing is computed
anew and no model is loaded. Left out: comparing runs, and how it is drawn (``templates/``).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trivium.errors import ConfigurationError, TrainingError
from trivium.report import curves, evaluations
from trivium.report.headline import headline
from trivium.report.page import assemble
from trivium.report.samples import select
from trivium.runs.store import (
    read_evaluations,
    read_events,
    read_metrics,
    read_run,
    read_samples,
)

SCRIPTS = ("tokens.js", "samples.js", "panels.js", "cost.js", "run.js")
_MOST_CONFIG = 200_000
_MOST_ALARMS = 400
_MOST_EVENTS = 200
_MOST_WORDS = 2000


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
    if output is not None and output.exists() and not overwrite:
        raise ConfigurationError(
            f"--output {output}: exists already; name another file, or write --overwrite to "
            "replace it"
        )
    data = collect(run)
    target = output or run / "report.html"
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(page(data), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise TrainingError(
            f"{target}: the report cannot be written: {error.strerror}; name another file "
            "with --output"
        ) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def page(data: dict[str, Any], *, live: bool = False) -> str:
    """Return the page that shows what ``collect`` returned."""
    return assemble(f"{data['name']} · Trivium", data, SCRIPTS, live=live)


def collect(run: Path) -> dict[str, Any]:
    """Return everything that the page shows of the run at ``run``; DataError if it is no run."""
    record = read_run(run)
    logged = read_metrics(run)
    events = read_events(run)
    rows = curves.by_step(logged)
    measured = evaluations.rows(read_evaluations(run))
    config = _config(run)
    samples = select(read_samples(run))
    alarms = [event for event in events if event.get("kind") == "alarm"]
    others = [event for event in events if event.get("kind") != "alarm"]
    charts = curves.panels(rows)
    return {
        "name": run.resolve().name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": record,
        "headline": headline(record, config, rows, measured, events),
        "alarms": {"total": len(alarms), "shown": [_words(a) for a in _ends(alarms, _MOST_ALARMS)]},
        "events": {"total": len(others), "shown": [_words(e) for e in _ends(others, _MOST_EVENTS)]},
        "axes": curves.axes(rows),
        "held_out": evaluations.panels(measured),
        "curves": charts,
        "thinned": _thinned(charts),
        "evaluation": {
            "columns": evaluations.columns(measured),
            "rows": measured,
        },
        "cost": curves.cost(rows),
        "samples": samples,
        "config": {"text": config[:_MOST_CONFIG], "characters": len(config)},
    }


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


def _ends(events: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The first and the last of many events."""
    if len(events) <= most:
        return list(events)
    return [*events[: most // 2], *events[-(most // 2) :]]


def _words(event: dict[str, Any]) -> dict[str, Any]:
    """An event with its texts cut to what a reader reads."""
    return {
        name: value[:_MOST_WORDS] if isinstance(value, str) else value
        for name, value in event.items()
    }
