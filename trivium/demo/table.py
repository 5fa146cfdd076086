"""The demo's result: one row per road, from the files that the runs left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from trivium.demo.roads import Road
from trivium.runs.progress import duration
from trivium.runs.store import read_evaluations, read_metrics


def summary_row(
    directory: Path, road: Road, planned: Sequence[Road], seconds: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """A road's last evaluation, and what it cost with all it needed beyond the base."""
    last = read_evaluations(directory / "runs" / road.name)[-1]
    chain = needed(road, planned)
    return {
        "road": road.name,
        "title": road.title,
        "seed": seed,
        "n": int(last["n"]),
        **{key: last[key] for key in ("greedy", "greedy_low", "greedy_high", "sampled")},
        "kl": last["kl"] or 0.0,
        "length": last["length"],
        "seconds": round(sum(seconds[name] for name in chain), 1),
        "generated_tokens": sum(generated(directory, name) for name in chain),
    }


def needed(road: Road, planned: Sequence[Road]) -> list[str]:
    """The road and what it builds on, the base left aside (unless it is the road)."""
    by_name = {r.name: r for r in planned}
    names, queue = [], [road.name]
    while queue:
        name = queue.pop()
        if name not in names and (name == road.name or by_name[name].after):
            names.append(name)
            queue += by_name[name].after
    return names


def generated(directory: Path, name: str) -> int:
    """Tokens that a run sampled to learn from."""
    counts = directory / "data" / f"{name}.counts.json"
    if counts.is_file():
        return int(json.loads(counts.read_text(encoding="utf-8"))["generated_tokens"])
    run = directory / "runs" / name
    if not (run / "metrics.jsonl").is_file():
        return 0
    return int(sum(row.get("tokens/generated", 0) for row in read_metrics(run)))


def print_table(rows: Sequence[Mapping[str, Any]], seconds: float, summary: Path) -> None:
    """The comparison, best greedy accuracy first."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    title = f"Accuracy on {rows[0]['n']:,} held-out problems, with 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("road", no_wrap=True)
    for heading in ("greedy", "", "+points", "sampled", "KL", "length", "time", "generated"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = {row["seed"]: row["greedy"] for row in rows if row["road"] == "sft"}
    several = len(base) > 1
    for row in sorted(rows, key=lambda r: (r["seed"], -r["greedy"])):
        name = f"{row['title']} (seed {row['seed']})" if several else row["title"]
        table.add_row(
            name,
            f"{row['greedy']:.1%}",
            f"{row['greedy_low']:.1%} – {row['greedy_high']:.1%}",
            f"{100 * (row['greedy'] - base[row['seed']]):+.1f}",
            f"{row['sampled']:.1%}",
            f"{row['kl']:.1f}",
            f"{row['length']:.1f}",
            duration(row["seconds"]),
            f"{row['generated_tokens']:,}",
        )
    console.print(table)
    console.print(f"All of it took {duration(seconds)}. The table as data: {summary}")
