"""The demo: write the data, train the base, and compare the methods that start from it.

Every stage is an ordinary ``trivium`` command in its own process, so that a user can run each of
them by hand. This module does not train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trivium.compare.config import CompareConfig
from trivium.compare.run import compare, write
from trivium.compare.table import show
from trivium.demo.methods import FULL, QUICK, Budget, comparison_config, seed_directory, sft_job
from trivium.jobs.scheduler import run_jobs


def run(directory: Path, quick: bool = False, seeds: tuple[int, ...] = (0,)) -> Path:
    """Run the demo for every seed and return the path of ``summary.json``.

    Stages that a stopped demo has finished in ``directory`` are not repeated.
    """
    budget = QUICK if quick else FULL
    started = time.perf_counter()
    for seed in seeds:
        prepare(seed_directory(directory, seed), budget, seed)
    jobs = [sft_job(directory, budget, seed) for seed in seeds]
    seconds = run_jobs({job.name: job for job in jobs})
    result = compare(CompareConfig.model_validate(comparison_config(directory, budget, seeds)))
    written = write(directory, result)
    summary = directory / "summary.json"
    rows = summarize(
        result, {seed: seconds[job.name] for seed, job in zip(seeds, jobs, strict=True)}
    )
    summary.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    show(result, time.perf_counter() - started, [*written, summary])
    return summary


def summarize(result: Mapping[str, Any], base_seconds: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return one row for the base and one for each method, for every seed."""
    rows = []
    for seed in result["seeds"]:
        base = result["bases"][str(seed)]
        rows.append(_row("SFT, the base of all methods", seed, base, base_seconds[seed], 0.0))
        for method in result["methods"]:
            (entry,) = [r for r in method["runs"] if r["seed"] == seed]
            tokens = entry["spent"]["generated_tokens"]
            rows.append(_row(method["name"], seed, entry["final"], entry["total_seconds"], tokens))
    return rows


def _row(
    name: str, seed: int, measured: Mapping[str, Any], seconds: float, tokens: float
) -> dict[str, Any]:
    return {
        "method": name,
        "seed": seed,
        "n": int(measured["n"]),
        **{key: measured[key] for key in ("greedy", "greedy_low", "greedy_high", "sampled")},
        "kl": measured["kl"] or 0.0,
        "length": measured["length"],
        "seconds": round(seconds, 1),
        "generated_tokens": int(tokens),
    }


def prepare(directory: Path, budget: Budget, seed: int) -> None:
    """Write the data files, the tokenizer and the untrained base, unless they exist already."""
    done = directory / "data" / "done.json"
    inputs = json.loads(json.dumps({**asdict(budget), "seed": seed, "version": version("trivium")}))
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == inputs:
        return
    # Imported here: only needed if there is something to write.
    from trivium.tasks.files import write_base
    from trivium.tasks.writer import Sizes, write_files

    sizes = Sizes(budget.demonstrations, budget.problems, budget.held_out, budget.labels)
    paths = write_files(directory / "data", seed, sizes, operations=budget.operations)
    with paths["demonstrations"].open(encoding="utf-8") as file:
        write_base(directory / "base", [json.loads(line) for line in file], seed)
    done.write_text(json.dumps(inputs), encoding="utf-8")
