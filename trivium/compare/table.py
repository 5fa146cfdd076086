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
    pooled = result["methods"][0]["greedy"]["over"]
    title = f"Quality on {result['n']:,} held-out prompts{over}, with 95 % intervals over {pooled}"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("greedy", "", "+", "sampled", "KL", "length", "alarms", "time", "generated"):
        table.add_column(heading, justify="right", no_wrap=True)
    bases = list(result["bases"].values())
    base = result["base_quality"]["greedy"]["mean"]
    share = result["unit"] == "share"
    scale, gained = (100, "+.1f") if share else (1, "+.3f")

    def shown(value: float) -> str:
        return f"{value:.1%}" if share else f"{value:.3f}"

    def ends(low: float | None, high: float | None) -> str:
        return "–" if low is None or high is None else f"{shown(low)} – {shown(high)}"

    for method in sorted(result["methods"], key=lambda r: -r["greedy"]["mean"]):
        quality = method["greedy"]
        runs = method["runs"]
        table.add_row(
            printable(method["name"]),
            shown(quality["mean"]),
            ends(quality["low"], quality["high"]),
            f"{scale * (quality['mean'] - base):{gained}}",
            shown(method["sampled"]["mean"]),
            f"{_mean([run['final']['kl'] or 0.0 for run in runs]):.1f}",
            f"{_mean([run['final']['length'] for run in runs]):.1f}",
            str(sum(len(run["alarms"]) for run in runs)),
            duration(_mean([run["spent"]["seconds"] for run in runs])),
            f"{_mean([run['spent']['generated_tokens'] for run in runs]):,.0f}",
        )
    table.add_section()
    greedy, sampled = (result["base_quality"][name] for name in ("greedy", "sampled"))
    table.add_row(
        "the base",
        shown(base),
        ends(greedy["low"], greedy["high"]),
        "",
        shown(sampled["mean"]),
        "0.0",
        f"{_mean([record['length'] for record in bases]):.1f}",
    )
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
