"""A comparison's report: everything that ``comparison.json`` says, as one HTML file.

Only that file's content is used; nothing is computed anew but what a reader needs to see numbers
together. Left out: how it is drawn (``templates/compare.js``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.errors import DataError
from trivium.monitoring.metrics import METRICS
from trivium.report.page import build_components, require_free, write_page

SCRIPTS = ("compare_table.js", "compare_charts.js", "compare.js")
NUMBERS = "comparison.json"


def write(directory: Path, comparison: Mapping[str, Any], output: Path | None = None) -> Path:
    """Write the report, by default as ``report.html`` in the comparison's directory.

    Raises:
        TrainingError: the file cannot be written.
    """
    text = build_components(f"{comparison['title']} · Trivium", collect(comparison), SCRIPTS)
    return write_page(output or directory / "report.html", text)


def rewrite(directory: Path, output: Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the report of a comparison that was made before.

    Raises:
        DataError: the comparison's numbers cannot be read.
        ConfigurationError: ``output`` exists and may not be replaced.
        TrainingError: the file cannot be written.
    """
    require_free(output, overwrite)
    path = directory / NUMBERS
    try:
        comparison = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a comparison's numbers: {error}") from None
    return write(directory, comparison, output)


def collect(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows; every single prompt's reward is left out."""
    methods = [
        {
            **method,
            "runs": [_without_outcomes(run) for run in method["runs"]],
            "varied": [_without_outcomes(run) for run in method["varied"]],
        }
        for method in comparison["methods"]
    ]
    rewards = [q for method in comparison["methods"] for r in method["runs"] for q in _rewards(r)]
    meanings = {name: {"title": m.title, "meaning": m.meaning} for name, m in METRICS.items()}
    return {
        **comparison,
        "methods": methods,
        "unit": "share" if all(0 <= q <= 1 for q in rewards) else "",
        "meanings": {name: meanings[name] for name in _watched(methods) if name in meanings},
    }


def _without_outcomes(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "outcomes"}


def _rewards(run: Mapping[str, Any]) -> list[float]:
    outcomes = run.get("outcomes", {})
    return [*outcomes.get("greedy", []), *(q for row in outcomes.get("sampled", []) for q in row)]


def _watched(methods: list[dict[str, Any]]) -> list[str]:
    return list(
        dict.fromkeys(name for r in methods for run in r["runs"] for name in run["training"])
    )
