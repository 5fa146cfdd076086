"""What is known of a logged number besides its value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One logged number.

    Attributes:
        name: as it stands in ``metrics.jsonl``.
        title: what a curve is called.
        unit: of the number; empty for a plain number, "share" for one in [0, 1].
        panel: which curves are drawn together.
        meaning: what it is and what to make of it, in a sentence or two.
        source: where it is defined.
    """

    name: str
    title: str
    unit: str
    panel: str
    meaning: str
    source: str = ""
