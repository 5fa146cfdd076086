"""Comparison on the terminal: one row per method, best quality first, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trivium.monitoring.progress import duration, printable


def show(result: Mapping[str, Any], seconds: float, written: Sequence[Path]) -> None:
    """Print the table, the verdict, and the paths of the written files."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    console.print(make_table(result))
    for sentence in result["verdict"]["sentences"]:
        console.print(Text(printable(sentence)))
    paths = ", ".join(str(path) for path in written)
    console.print(Text(f"\nTotal time: {duration(seconds)}. Written: {printable(paths)}"))


def make_table(result: Mapping[str, Any]) -> Table:
    """Return the table of each method's quality with 95 % intervals, KL, length and cost."""
    seeds = len(result["seeds"])
    over = f", {seeds} seeds" if seeds > 1 else ""
    title = f"Quality on {result['n']:,} held-out prompts{over}, with 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("greedy", "", "+", "sampled", "KL", "length", "alarms", "time", "generated"):
        table.add_column(heading, justify="right", no_wrap=True)
    bases = list(result["bases"].values())
    base = _mean([record["greedy"] for record in bases])
    shown = _quality_format(result)
    for method in sorted(result["methods"], key=lambda r: -r["greedy"]["mean"]):
        quality = method["greedy"]
        runs = method["runs"]
        table.add_row(
            printable(method["name"]),
            shown(quality["mean"]),
            f"{shown(quality['low'])} – {shown(quality['high'])}",
            f"{100 * (quality['mean'] - base):+.1f}",
            shown(method["sampled"]["mean"]),
            f"{_mean([run['final']['kl'] or 0.0 for run in runs]):.1f}",
            f"{_mean([run['final']['length'] for run in runs]):.1f}",
            str(sum(len(run["alarms"]) for run in runs)),
            duration(_mean([run["spent"]["seconds"] for run in runs])),
            f"{_mean([run['spent']['generated_tokens'] for run in runs]):,.0f}",
        )
    table.add_section()
    low, high = (_mean([record[f"greedy_{end}"] for record in bases]) for end in ("low", "high"))
    table.add_row(
        "the base",
        shown(base),
        f"{shown(low)} – {shown(high)}",
        "",
        shown(_mean([record["sampled"] for record in bases])),
        "0.0",
        f"{_mean([record['length'] for record in bases]):.1f}",
    )
    return table


def _quality_format(result: Mapping[str, Any]) -> Any:
    """Return a function that writes rewards in [0, 1] as per cent, and other rewards as numbers."""
    values = [method["greedy"]["mean"] for method in result["methods"]]
    if all(0 <= v <= 1 for v in values):
        return lambda x: f"{x:.1%}"
    return lambda x: f"{x:.3f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
