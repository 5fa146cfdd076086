"""Draws how the ratio of a GRPO step scales: one picture of four panels, from results.json.

python benchmarks/speed/curves.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from results import REPOSITORY, read

RESULTS = REPOSITORY / "benchmarks" / "results.json"
PICTURE = REPOSITORY / "docs" / "pictures" / "speed-curves.svg"
PANELS = {
    "prompt": "tokens of the prompt",
    "group": "responses per prompt (G)",
    "vocabulary": "words of the vocabulary",
    "response": "most tokens of a response",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 190, 150, 40, 44, 50
INK, PALE, LINE = "#333", "#ddd", "#0b6e4f"


@dataclass(frozen=True)
class Point:
    """A measured ratio, with the lowest and the highest of its pairs."""

    at: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, result: dict[str, Any]) -> Point:
        at = float(result["case"].rpartition("-")[2])
        return cls(at, result["ratio"], result["ratio_low"], result["ratio_high"])


def main() -> None:
    results = read(RESULTS)
    series = {
        name: [Point.of(r) for r in results if r["case"].startswith(f"curve-{name}-")]
        for name in PANELS
    }
    missing = [name for name, points in series.items() if len(points) < 2]
    if missing:
        raise SystemExit(f"{RESULTS} has no curve of {', '.join(missing)}: run make bench-curves")
    PICTURE.write_text(picture(series))
    print(PICTURE)


def picture(series: dict[str, list[Point]]) -> str:
    """The whole picture; all panels share the scale of their ratios."""
    top = math.ceil(max(point.high for points in series.values() for point in points))
    width, height = LEFT + len(series) * (WIDTH + GAP) - GAP + 20, TOP + HEIGHT + 60
    panels = [
        panel(PANELS[name], points, top, LEFT + i * (WIDTH + GAP))
        for i, (name, points) in enumerate(series.items())
    ]
    title = "GRPO step: processor time of TRL over that of Trivium"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f'<text x="{LEFT}" y="20" font-size="14" fill="{INK}">{title}</text>\n'
        + "\n".join(panels)
        + "\n</svg>\n"
    )


def panel(label: str, points: Sequence[Point], top: float, left: float) -> str:
    """One curve: logarithmic to the right, from 0 up."""
    first, last = math.log(points[0].at), math.log(points[-1].at)

    def x(point: Point) -> float:
        return round(left + WIDTH * (math.log(point.at) - first) / (last - first), 1)

    def y(ratio: float) -> float:
        return round(TOP + HEIGHT * (1 - ratio / top), 1)

    drawn = [
        f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(r)}" y2="{y(r)}" stroke="{PALE}"/>'
        + text(left - 6, y(r) + 4, f"{r:g}×", "end")
        for r in ticks(top)
    ]
    path = " ".join(f"{x(point)},{y(point.ratio)}" for point in points)
    drawn.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2"/>')
    for p in points:
        drawn.append(
            f'<line x1="{x(p)}" x2="{x(p)}" y1="{y(p.low)}" y2="{y(p.high)}" stroke="{LINE}"/>'
            f'<circle cx="{x(p)}" cy="{y(p.ratio)}" r="3.5" fill="{LINE}"/>'
            + text(x(p), y(p.high) - 7, f"{p.ratio:.1f}", "start" if p is points[0] else "middle")
            + text(x(p), TOP + HEIGHT + 18, short(p.at), "middle")
        )
    drawn.append(text(left + WIDTH / 2, TOP + HEIGHT + 38, label, "middle"))
    return "\n".join(drawn)


def ticks(top: float) -> list[float]:
    """0, and a few round ratios up to the top."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if top / s <= 6)
    return [i * step for i in range(int(top / step) + 1)]


def text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{INK}">{content}</text>'


def short(number: float) -> str:
    """A number of at most four digits, in thousands of 1,024 where it is larger."""
    return f"{number:g}" if number < 10_000 else f"{number / 1024:g}k"


if __name__ == "__main__":
    main()
