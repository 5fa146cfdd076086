"""Measure how often automatic step labels agree with the exact verifier, on the demo's task.

    trivium demo                                        # trains the base first
    python benchmarks/step_labels.py runs/demo/seed-0
    python benchmarks/step_labels.py runs/demo/seed-0 --rerank --solutions 4000 --completions 8

The demo's base writes one solution to each problem and completes every step N times
(``trivium label-steps``). A step is right for the verifier if its line is right; it can still lead
to the right answer if all lines up to it are right. The table has both agreements, with 95 %
intervals over solutions, and the shares of both kinds of errors.

With --rerank, a process reward model is trained on the labels, and one on the demo's exact labels.
Each chooses one of 16 responses to every held-out problem, by the minimum and the product over the
steps, and is compared with a majority vote.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist
from typing import Any

import trivium
from trivium.demo.methods import reward_model
from trivium.tasks.verifier import score_steps

CORRECT = "trivium.tasks.verifier:correct"


def label(directory: Path, solutions: int, completions: int, seed: int) -> Path:
    """Label the steps of one solution to each of the first problems."""
    config = {
        "model": {"path": str(directory / "sft" / "final")},
        "data": {"path": str(directory / "data" / "problems.jsonl"), "limit": solutions},
        "solutions": 1,
        "rewards": [{"function": CORRECT}],
        "completions": completions,
        "sampling": {"max_tokens": 48},
        "seed": seed,
        "output": str(directory / "step-labels" / f"{completions}.jsonl"),
        "overwrite": True,
    }
    return trivium.label_steps(trivium.LabelStepsConfig.model_validate(config))


def exact_labels(row: dict[str, Any]) -> tuple[list[bool], list[bool]]:
    """Return whether each step's line is right, and whether all lines up to it are."""
    text = "\n".join(row["completions"])
    rewards = {end: reward for (_, end), reward in score_steps(text, row["steps"])}
    ends = accumulate((len(step) + 1 for step in row["completions"]), initial=-1)
    lines = [rewards.get(end, 0.0) == 1 for end in list(ends)[1:]]
    return lines, list(accumulate(lines, lambda so_far, line: so_far and line))


def share(hits_and_counts: Sequence[tuple[int, int]]) -> str:
    """Return Σ hits / Σ counts with its interval; each solution is one observation."""
    n, total = len(hits_and_counts), sum(count for _, count in hits_and_counts)
    ratio = sum(hits for hits, _ in hits_and_counts) / total
    squares = sum((hits - ratio * count) ** 2 for hits, count in hits_and_counts)
    half = NormalDist().inv_cdf(0.975) * math.sqrt(squares * n / (n - 1)) / total
    return f"{100 * ratio:.1f} ± {100 * half:.1f} %"


def agreements(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the cells of one N: agreement with both labels, and the errors against the second."""
    found = [(row["labels"], *exact_labels(row)) for row in rows]
    for which in (2, 1):
        equal = [sum(a == b for a, b in zip(f[0], f[which], strict=True)) for f in found]
        yield share([(hits, len(f[0])) for hits, f in zip(equal, found, strict=True)])
    for wanted in (True, False):
        errors = [
            (
                sum(b == wanted and a != b for a, b in zip(f[0], f[2], strict=True)),
                f[2].count(wanted),
            )
            for f in found
        ]
        yield share(errors)


def train(directory: Path, labels: Path, name: str, seed: int) -> Path:
    """Train a process reward model on labeled steps, with the demo's settings."""
    config = {
        "model": {"path": str(directory / "sft" / "final")},
        "steps": {"path": str(labels)},
        **reward_model(learning_rate=1e-3),
        "run": {
            "directory": str(directory / "step-labels" / name),
            "seed": seed,
            "overwrite": True,
        },
    }
    run = trivium.reward_model(trivium.RewardModelConfig.model_validate(config))
    return run / "final"


def rerank(directory: Path, models: dict[str, Path], prompts: int) -> dict[str, Any]:
    """Return the accuracy of every way to choose one of 16 responses to the held-out problems."""
    config = {
        "model": {"path": str(directory / "sft" / "final")},
        "data": {"path": str(directory / "data" / "heldout.jsonl"), "limit": prompts},
        "rewards": [{"function": CORRECT}],
        "samples": 16,
        "max_tokens": 48,
        "vote": "number",
        "rerank": [
            {
                "function": "process_reward_model",
                "name": f"{name}, {aggregate}",
                "arguments": {"path": str(path), "aggregate": aggregate},
            }
            for name, path in models.items()
            for aggregate in ("minimum", "product")
        ],
    }
    return trivium.evaluate(trivium.EvaluateConfig.model_validate(config)).record()


def print_reranking(directory: Path, labels: Path, prompts: int, seed: int) -> None:
    """Train the models, and print the table of choices."""
    models = {
        "automatic labels": train(directory, labels, "automatic", seed),
        "exact labels": train(directory, directory / "data" / "labels.jsonl", "exact", seed),
    }
    record = rerank(directory, models, prompts)
    one = {"mean": record["sampled"], "low": record["sampled_low"], "high": record["sampled_high"]}
    print("| choice of 16 | right | 95 % interval |")
    print("|---|---|---|")
    for name, value in {"one at random": one, **record["selections"]}.items():
        interval = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
        print(f"| {name} | {100 * value['mean']:.1f} | {interval} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="a seed's directory of the demo")
    parser.add_argument("--solutions", type=int, default=1000)
    parser.add_argument("--completions", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rerank", action="store_true", help="also train models and rerank")
    parser.add_argument("--prompts", type=int, default=500, help="held-out problems to rerank")
    given = parser.parse_args()
    table = []
    for completions in given.completions:
        path = label(given.directory, given.solutions, completions, given.seed)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        counts = json.loads(path.with_suffix(".counts.json").read_text(encoding="utf-8"))
        cells = [*agreements(rows), f"{counts['generated_tokens']:,.0f}"]
        table.append(f"| {completions} | {' | '.join(cells)} | {counts['seconds']:.0f} |")
        right = sum(exact_labels(row)[1][-1] for row in rows) / len(rows)
        print(f"{len(rows)} solutions, {right:.1%} right throughout", file=sys.stderr)
    print("| N | all lines right so far | line right | missed right | missed wrong | tokens | s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(table))
    if given.rerank:
        print_reranking(given.directory, path, given.prompts, given.seed)


if __name__ == "__main__":
    main()
