"""Draw how the speed ratio of a GRPO step scales: four panels in one SVG, from results.json.

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
    "prompt": "prompt tokens",
    "group": "responses per prompt (G)",
    "vocabulary": "vocabulary size",
    "response": "maximum response tokens",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 190, 150, 40, 44, 50
TEXT, GRID, CURVE = "#333", "#ddd", "#0b6e4f"


@dataclass(frozen=True)
class Point:
    """A measured ratio, with the lowest and highest ratio of its pairs of runs."""

    x_value: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, result: dict[str, Any]) -> Point:
        x_value = float(result["case"].rpartition("-")[2])
        return cls(x_value, result["ratio"], result["ratio_low"], result["ratio_high"])


def main() -> None:
    results = read(RESULTS)
    series = {
        name: [Point.of(r) for r in results if r["case"].startswith(f"curve-{name}-")]
        for name in PANELS
    }
    missing = [name for name, points in series.items() if len(points) < 2]
    if missing:
        raise SystemExit(f"{RESULTS} has no curve for {', '.join(missing)}: run make bench-curves")
    PICTURE.write_text(picture(series))
    print(PICTURE)


def picture(series: dict[str, list[Point]]) -> str:
    """Return the SVG text; all panels share one scale of ratios."""
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
        f'<text x="{LEFT}" y="20" font-size="14" fill="{TEXT}">{title}</text>\n'
        + "\n".join(panels)
        + "\n</svg>\n"
    )


def panel(label: str, points: Sequence[Point], top: float, left: float) -> str:
    """Return one panel: a logarithmic horizontal axis and a vertical axis that begins at 0."""
    first, last = math.log(points[0].x_value), math.log(points[-1].x_value)

    def x(point: Point) -> float:
        return round(left + WIDTH * (math.log(point.x_value) - first) / (last - first), 1)

    def y(ratio: float) -> float:
        return round(TOP + HEIGHT * (1 - ratio / top), 1)

    elements = [
        f'<line x1="{left}" x2="{left + WIDTH}" y1="{y(r)}" y2="{y(r)}" stroke="{GRID}"/>'
        + text(left - 6, y(r) + 4, f"{r:g}×", "end")
        for r in ticks(top)
    ]
    path = " ".join(f"{x(point)},{y(point.ratio)}" for point in points)
    elements.append(f'<polyline points="{path}" fill="none" stroke="{CURVE}" stroke-width="2"/>')
    for p in points:
        elements.append(
            f'<line x1="{x(p)}" x2="{x(p)}" y1="{y(p.low)}" y2="{y(p.high)}" stroke="{CURVE}"/>'
            f'<circle cx="{x(p)}" cy="{y(p.ratio)}" r="3.5" fill="{CURVE}"/>'
            + text(x(p), y(p.high) - 7, f"{p.ratio:.1f}", "start" if p is points[0] else "middle")
            + text(x(p), TOP + HEIGHT + 18, short(p.x_value), "middle")
        )
    elements.append(text(left + WIDTH / 2, TOP + HEIGHT + 38, label, "middle"))
    return "\n".join(elements)


def ticks(top: float) -> list[float]:
    """Return 0 and a few round ratios up to the top."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if top / s <= 6)
    return [i * step for i in range(int(top / step) + 1)]


def text(x: float, y: float, content: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{TEXT}">{content}</text>'


def short(number: float) -> str:
    """Return a number of at most four digits; larger numbers in units of 1,024."""
    return f"{number:g}" if number < 10_000 else f"{number / 1024:g}k"


if __name__ == "__main__":
    main()
