"""Demonstrations of the task with human-like mistakes, and the data files.

A careless demonstration contains mistakes that depend on the problem: a forgotten borrow, a dropped
carry, a skipped clause, a misread verb. A mistake propagates to later steps, and two mistakes may
cancel. A model trained on such demonstrations makes systematic mistakes, and still samples correct
responses. The files have the formats of a user's own data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.tasks.problems import MAXIMUM, Operation, Problem, compute, generate
from trivium.tasks.verifier import score_steps


@dataclass(frozen=True)
class ErrorRates:
    """Share of careless demonstrations, and probabilities of their mistakes."""

    careless: float = 0.75
    """Share of demonstrations that may contain mistakes."""
    forgets_borrow: float = 0.97
    """Probability of 40-6=44, for a subtraction that needs a borrow."""
    drops_carry: float = 0.25
    """Probability of 31+9=30, for an addition or a multiplication that needs a carry."""
    skips_clause: float = 0.05
    """Probability of a clause without a line; every demonstration has at least one line."""
    misreads: float = 0.05
    """Probability of + instead of - or *, and of - instead of +."""


@dataclass(frozen=True)
class Sizes:
    """Number of rows in each file."""

    demonstrations: int = 30_000
    problems: int = 8_000
    heldout: int = 1_000
    labels: int = 12_000


def write_demonstration(
    problem: Problem, rng: random.Random, rates: ErrorRates = ErrorRates()
) -> str:
    """Return step lines, each from the result of the line before, and "#### answer"."""
    careless = rng.random() < rates.careless
    lines, value = [], problem.start
    for i, operation in enumerate(problem.operations):
        step = _mistake(operation, value, rng, rates) if careless else None
        rest = problem.operations[i + 1 :]
        if step is None or not _stays_in_range(step[1], rest) or not (step[0] or lines or rest):
            step = operation.line(value), operation.apply(value)
        line, value = step
        lines += [line] if line else []
    return "\n".join([*lines, f"#### {value}"])


def _mistake(
    operation: Operation, value: int, rng: random.Random, rates: ErrorRates
) -> tuple[str, int] | None:
    """Return the (line, value) of a mistake, with an empty line for a skipped clause, or None."""
    if rng.random() < rates.skips_clause:
        return "", value
    symbol = operation.symbol
    if rng.random() < rates.misreads:
        symbol = "-" if symbol == "+" else "+"
        result = compute(value, symbol, operation.operand)
    elif rng.random() < (rates.forgets_borrow if symbol == "-" else rates.drops_carry):
        result = compute_without_carry(value, symbol, operation.operand)
    else:
        return None
    return f"{value}{symbol}{operation.operand}={result}", result


def compute_without_carry(value: int, symbol: str, operand: int) -> int:
    """Return the result with a correct unit digit and no carry or borrow into the tens."""
    tens, units = divmod(value, 10)
    result_tens = tens * operand if symbol == "*" else tens
    return 10 * result_tens + compute(units, symbol, operand) % 10


def _stays_in_range(value: int, operations: Iterable[Operation]) -> bool:
    """Whether all values of a correct continuation are in range."""
    for operation in operations:
        if not 0 <= value <= MAXIMUM:
            return False
        value = operation.apply(value)
    return 0 <= value <= MAXIMUM


def demonstration_rows(
    problems: Sequence[Problem], seed: int, rates: ErrorRates = ErrorRates()
) -> list[dict[str, Any]]:
    """Return one row {"prompt", "completion"} per problem."""
    rng = random.Random(f"writer {seed}")
    return [
        {"prompt": p.prompt, "completion": write_demonstration(p, rng, rates)} for p in problems
    ]


def problem_rows(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return one row {"prompt", "answer", "steps", "operations"} per problem."""
    return [
        {
            "prompt": p.prompt,
            "answer": str(p.answer),
            "steps": p.steps,
            "operations": len(p.operations),
        }
        for p in problems
    ]


def step_label_rows(
    problems: Sequence[Problem], demonstrations: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return one row {"prompt", "completions", "labels"} per demonstration.

    A label is whether the line is correct.
    """
    rows = []
    for problem, row in zip(problems, demonstrations, strict=True):
        spans = score_steps(row["completion"], problem.steps)
        lines = [row["completion"][start:end].strip("\n") for (start, end), _ in spans]
        labels = [reward == 1 for _, reward in spans]
        rows.append({"prompt": problem.prompt, "completions": lines, "labels": labels})
    return rows


def write_files(
    directory: Path,
    seed: int,
    sizes: Sizes = Sizes(),
    rates: ErrorRates = ErrorRates(),
    operations: tuple[int, int] = (2, 4),
) -> dict[str, Path]:
    """Write demonstrations, problems, heldout and labels (.jsonl); return their paths by stem."""
    demonstrated = generate(2 * seed, sizes.demonstrations, operations)
    problems = generate(2 * seed + 1, sizes.problems, operations)
    heldout = generate(seed, sizes.heldout, operations, split="test")
    demonstrations = demonstration_rows(demonstrated, seed, rates)
    rows = {
        "demonstrations": demonstrations,
        "labels": step_label_rows(demonstrated[: sizes.labels], demonstrations[: sizes.labels]),
        "problems": problem_rows(problems),
        "heldout": problem_rows(heldout),
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = {stem: directory / f"{stem}.jsonl" for stem in rows}
    for stem, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[stem]), encoding="utf-8")
    return paths
