"""Trivium beside TRL: both sides of every case in turn, on one core, and what comes out.

    python run.py --theirs PYTHON --theirs-ppo PYTHON [--quick] [--only CASE,CASE] [--curves]
                  [--repetitions N] [--core N]

Each repetition runs both sides in processes of their own, one after the other, the one that begins
alternating. A ratio is theirs over ours: of processor seconds per step, of seconds per generated
token, or of peak memory over the loaded models. Results are written after every case, to
``benchmarks/results.json`` and ``results.md`` beside it; cases of earlier calls stay in them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import CASES, CURVES, QUICK, Case
from worlds import SIZES, S, write_world

HERE = Path(__file__).resolve().parent
WORLDS = HERE / ".worlds"
RESULTS = HERE.parent / "results.json"
Report = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where the sides run."""

    ours: str
    theirs: str
    theirs_ppo: str
    core: int
    results: Path

    def run(self, case: Case, side: str) -> Report:
        """One side of a case; its report. Ends the program where the side fails."""
        python = self.ours
        if side == "theirs":
            python = self.theirs_ppo if case.method == "ppo" else self.theirs
        with tempfile.TemporaryDirectory() as place:
            task = json.dumps(asdict(case))
            command = [python, str(HERE / f"{side}.py"), task, str(world_of(case)), place]
            done = self._on_core(command)
            report = Path(place) / "report.json"
            if done.returncode or not report.exists():
                tail = done.stderr.decode(errors="replace")[-3000:]
                sys.exit(f"{case.name}: {side} failed with status {done.returncode}:\n{tail}")
            return json.loads(report.read_text())

    def limit(self) -> float:
        """The core's best rate, in FLOPs per second."""
        return float(self._on_core([self.ours, str(HERE / "limit.py")]).stdout)

    def _on_core(self, command: list[str]) -> subprocess.CompletedProcess[bytes]:
        pinned = ["taskset", "-c", str(self.core), *command]
        quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        return subprocess.run(pinned, env=os.environ | quiet, capture_output=True, check=False)


def world_of(case: Case) -> Path:
    """The directory of a case's models and data, written where it is not there yet."""
    size = SIZES[case.size] if case.size in SIZES else replace(S, vocabulary=int(case.size))
    place = WORLDS / f"{case.size}-{case.prompt}-{case.response}"
    if not place.exists():
        fresh = place.with_name(f"{place.name}.{os.getpid()}")
        write_world(fresh, size, prompt_tokens=case.prompt, response_tokens=case.response)
        fresh.rename(place)
    return place


def seconds(case: Case, report: Report) -> float:
    """Processor seconds of a step, or of a generated token."""
    marks = report["marks"]
    taken = marks[-1] - marks[case.warm_up - 1]
    if case.method == "generation":
        return taken / sum(report["tokens"][case.warm_up :])
    return taken / case.steps


def compare(bench: Bench, case: Case, repetitions: int) -> dict[str, Any]:
    """The record of a case: ratios over all repetitions, and what they are made of."""
    rates, reports = [], []
    for i in range(repetitions):
        order = ("ours", "theirs") if i % 2 == 0 else ("theirs", "ours")
        rates.append(bench.limit())
        reports.append({side: bench.run(case, side) for side in order})
        print(f"  {case.name}: {i + 1} of {repetitions}", file=sys.stderr, flush=True)
    found = {side: [report[side] for report in reports] for side in ("ours", "theirs")}
    record: dict[str, Any] = {"case": case.name, "minimum": case.minimum}
    if case.memory:
        values = {side: [r["peak_bytes"] for r in x] for side, x in found.items()}
        unit = "bytes"
    else:
        values = {side: [seconds(case, r) for r in x] for side, x in found.items()}
        unit = "seconds_per_token" if case.method == "generation" else "seconds_per_step"
    ratios = [t / o for o, t in zip(values["ours"], values["theirs"], strict=True)]
    record |= {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "unit": unit,
        "ours": statistics.median(values["ours"]),
        "theirs": statistics.median(values["theirs"]),
        "repetitions": repetitions,
        "steps": case.steps,
    }
    return record | distances(case, found, rates, values) | tokens(case, found)


def distances(
    case: Case,
    found: dict[str, list[Report]],
    rates: list[float],
    values: dict[str, list[float]],
) -> dict[str, Any]:
    """How many times as long both take as this core needs for the products alone."""
    if case.memory:
        return {"limit_distance": None, "their_limit_distance": None}
    needed = statistics.median(
        sum(r["flops"][case.warm_up :])
        / (sum(r["tokens"][case.warm_up :]) if case.method == "generation" else case.steps)
        for r in found["ours"]
    )
    least = needed / statistics.median(rates)
    stages: dict[str, float] = {}
    for report in found["ours"]:
        for name, times in report.get("stages", {}).items():
            stages[name] = stages.get(name, 0.0) + sum(times[case.warm_up :])
    whole = sum(stages.values())
    return {
        "limit_distance": statistics.median(values["ours"]) / least,
        "their_limit_distance": statistics.median(values["theirs"]) / least,
        "core_gflops": statistics.median(rates) / 1e9,
        "stages": {name.removeprefix("time/"): t / whole for name, t in stages.items() if whole},
    }


def tokens(case: Case, found: dict[str, list[Report]]) -> dict[str, Any]:
    """Response tokens of a step on both sides, where they are known."""
    means = {}
    for side, reports in found.items():
        counts = [n for r in reports for n in r.get("tokens", [])[case.warm_up :]]
        means[f"{side}_tokens"] = statistics.fmean(counts) if counts else None
    return means


def keep(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a record among the results, in place of an earlier one of its case."""
    held = json.loads(path.read_text()) if path.exists() else []
    names = [case.name for case in [*CASES, *(c for curve in CURVES.values() for c in curve)]]
    records = [r for r in held if r["case"] != record["case"]] + [record]
    records.sort(key=lambda r: names.index(r["case"]))
    path.write_text(json.dumps(records, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(records))
    return records


def table(records: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| case | ratio | from – to | at least | Trivium | TRL | distance from the limit | TRL's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        limits = (r["limit_distance"], r["their_limit_distance"])
        far = ["–" if limit is None else f"{limit:.1f}×" for limit in limits]
        least = "–" if r["minimum"] is None else f"{r['minimum']}×"
        ours, theirs = (amount(r["unit"], r[side]) for side in ("ours", "theirs"))
        spread = f"{r['ratio_low']:.2f} – {r['ratio_high']:.2f}"
        lines.append(
            f"| {r['case']} | **{r['ratio']:.2f}×** | {spread} | {least} | {ours} | {theirs} | "
            f"{far[0]} | {far[1]} |"
        )
    return "\n".join(lines) + "\n"


def amount(unit: str, value: float) -> str:
    """A measured amount for people."""
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    if unit == "seconds_per_token":
        return f"{1 / value:,.0f} tokens/s"
    return f"{value:.3f} s/step"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", required=True, help="Python of an environment with trl 1.16")
    parser.add_argument("--theirs-ppo", help="and of one with trl 1.9")
    parser.add_argument("--quick", action="store_true", help="the main cases of the small model")
    parser.add_argument("--curves", action="store_true", help="the scaling curves instead")
    parser.add_argument("--only", help="names of cases, with commas between them")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    cases = [c for curve in CURVES.values() for c in curve] if given.curves else CASES
    if given.quick:
        cases = [case for case in CASES if case.name in QUICK]
    if given.only:
        wanted = given.only.split(",")
        every = [*CASES, *(c for curve in CURVES.values() for c in curve)]
        unknown = sorted(set(wanted) - {case.name for case in every})
        if unknown:
            sys.exit(f"no such cases: {', '.join(unknown)}; known: {[c.name for c in every]}")
        cases = [case for case in every if case.name in wanted]
    bench = Bench(
        sys.executable, given.theirs, given.theirs_ppo or given.theirs, given.core, given.results
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", file=sys.stderr)
    records: list[dict[str, Any]] = []
    for case in cases:
        repetitions = 1 if case.memory else given.repetitions
        records.append(compare(bench, case, repetitions))
        keep(given.results, records[-1])
        print(table(records[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(records), flush=True)


if __name__ == "__main__":
    main()
