"""Description of a logged metric."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One logged metric.

    Attributes:
        name: key in ``metrics.jsonl`` or ``evaluation.jsonl``.
        title: label of its curve in the report.
        unit: unit of the value; empty for a plain number, "share" for a number in [0, 1].
        panel: report panel that shows the curve; metrics of one panel are drawn together.
        meaning: definition and interpretation, in one to three sentences.
        source: paper that defines it.
    """

    name: str
    title: str
    unit: str
    panel: str
    meaning: str
    source: str = ""
