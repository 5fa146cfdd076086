"""Report of a comparison: the content of ``comparison.json`` as one HTML file.

The report uses only that file. ``templates/compare.js`` draws the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.errors import DataError
from trivium.monitoring.metrics import METRICS
from trivium.report.page import render_page, require_new_output, write_page
from trivium.runs.files import read_json_object

SCRIPTS = ("compare_table.js", "compare_charts.js", "compare.js")
NUMBERS = "comparison.json"


def write(directory: Path, comparison: Mapping[str, Any], output: Path | None = None) -> Path:
    """Write the report, by default as ``report.html`` in the comparison's directory.

    Raises:
        TrainingError: the file cannot be written.
    """
    return write_page(output or directory / "report.html", _page(comparison))


def _page(comparison: Mapping[str, Any]) -> str:
    return render_page(f"{comparison['title']} · Trivium", collect(comparison), SCRIPTS)


def rewrite(directory: Path, output: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the report of an earlier comparison from its ``comparison.json``.

    Raises:
        DataError: the file cannot be read or was written before version 0.2.
        ConfigurationError: ``output`` exists and ``overwrite`` is False.
        TrainingError: the report cannot be written.
    """
    require_new_output(output, overwrite)
    path = directory / NUMBERS
    comparison = read_json_object(path)
    absent = next((key for key in ("methods", "gains") if key not in comparison), None)
    if absent is not None:
        raise DataError(
            f"{path} has no key '{absent}': it was written before version 0.2; rerun the comparison"
        )
    try:
        text = _page(comparison)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: is damaged: {type(error).__name__}: {error}; restore it, or rerun the "
            "comparison"
        ) from None
    return write_page(output or directory / "report.html", text)


def collect(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of the page: the comparison without the rewards of single prompts."""
    methods = [
        {
            **method,
            "runs": [_without_outcomes(run) for run in method["runs"]],
            "varied": [_without_outcomes(run) for run in method["varied"]],
        }
        for method in comparison["methods"]
    ]
    meanings = {name: {"title": m.title, "meaning": m.meaning} for name, m in METRICS.items()}
    return {
        **comparison,
        "methods": methods,
        "meanings": {
            name: meanings[name] for name in _training_metrics(methods) if name in meanings
        },
    }


def _without_outcomes(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "outcomes"}


def _training_metrics(methods: list[dict[str, Any]]) -> list[str]:
    return list(
        dict.fromkeys(
            name for method in methods for run in method["runs"] for name in run["training"]
        )
    )
