"""Report of a pipeline: every stage on one page.

Only the pipeline's files are read: ``pipeline.json`` names the stages, and each stage has the files
of its command. ``templates/pipeline.js`` draws the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trivium.errors import DataError
from trivium.report import curves, evaluations, run
from trivium.report.headline import headline
from trivium.report.page import render_page, require_new_output, write_page
from trivium.runs.store import read_evaluations, read_events, read_metrics, read_run

SCRIPTS = ("panels.js", "pipeline.js")
NUMBERS = "pipeline.json"
MAX_STEPS = 300
"""Maximum number of steps of a stage's curves; the stage's own report has them all."""
_COUNTS = ("prompts", "responses", "pairs", "written")
_MEASURES = ("greedy", "sampled", "kl", "length", "truncated")


def write(directory: Path, output: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the report, by default as ``report.html`` in the pipeline's directory.

    The reports of the stages' runs are written beside their files, which the page links to.

    Raises:
        DataError: a file of the pipeline is damaged.
        ConfigurationError: ``output`` exists and ``overwrite`` is False.
        TrainingError: the file cannot be written.
    """
    require_new_output(output, overwrite)
    data = collect(directory)
    for stage in data["stages"]:
        if stage["report"] is not None and _is_stale(directory / stage["name"]):
            run.write(directory / stage["name"])
    text = render_page(f"{data['title']} · Trivium", data, SCRIPTS)
    return write_page(output or directory / "report.html", text)


def collect(directory: Path) -> dict[str, Any]:
    """Return the data of the page.

    Raises:
        DataError: a file of the pipeline is damaged.
    """
    path = directory / NUMBERS
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        stages = [dict(stage) for stage in record["stages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot read the pipeline: {error}") from None
    return {
        "title": record["title"],
        "seed": record["seed"],
        "directory": str(directory),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": [{**stage, **_results(directory / stage["name"])} for stage in stages],
    }


def _is_stale(directory: Path) -> bool:
    """Return whether a run has no report, or logged something after it was written."""
    page = directory / "report.html"
    logs = [path.stat().st_mtime for path in directory.glob("*.jsonl")]
    return not page.is_file() or page.stat().st_mtime < max(logs, default=math.inf)


def summary(directory: Path) -> str:
    """Return the stages and what was measured after each, one line per stage."""
    return "\n".join(_line(stage) for stage in collect(directory)["stages"])


def _line(stage: Mapping[str, Any]) -> str:
    measured = stage["evaluation"] or {}
    values = [f"{name} {measured[name]:.3f}" for name in _MEASURES[:3] if name in measured]
    counts = [f"{number:,} {name}" for name, number in stage["counts"].items()]
    return f"{stage['name']}: {stage['state']}" + "".join(f", {v}" for v in [*values, *counts])


def _results(directory: Path) -> dict[str, Any]:
    """Return what a stage measured; its state is left to ``pipeline.json``."""
    if (directory / "run.json").is_file():
        return _run_results(directory)
    results = {"report": None, "headline": None, "alarms": [], "axes": None, "counts": {}}
    counts = _read(directory / "rows.counts.json")
    results["counts"] = {name: counts[name] for name in _COUNTS if name in counts}
    evaluation = _read(directory / "evaluation.json")
    return {**results, "evaluation": _measured(evaluation), "held_out": [], "curves": []}


def _run_results(directory: Path) -> dict[str, Any]:
    rows = curves.by_step(read_metrics(directory))
    shown = [rows[i] for i in curves.evenly_spaced(len(rows), MAX_STEPS)]
    events = read_events(directory)
    measured = evaluations.rows(read_evaluations(directory))
    config = (directory / "config.yaml").read_text(encoding="utf-8", errors="replace")
    return {
        "report": f"{directory.name}/report.html",
        "headline": headline(read_run(directory), config, rows, measured, events),
        "alarms": [event for event in events if event.get("kind") == "alarm"][:50],
        "axes": curves.axes(rows),
        "counts": {},
        "evaluation": _measured(measured[-1] if measured else {}),
        "held_out": evaluations.panels(measured),
        "curves": curves.panels(shown),
    }


def _measured(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the measures of an evaluation with their intervals; None without a reward."""
    names = [f"{name}{end}" for name in _MEASURES for end in ("", "_low", "_high")]
    found = {n: record[n] for n in ("n", *names) if curves.is_number(record.get(n))}
    return found if "greedy" in found else None


def _read(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; empty if the stage has not written it."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged: {error}") from None
