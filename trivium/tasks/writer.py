"""The writer of demonstrations: careful, or careless in ways that a person is.

A careless writer slips for a reason that the problem shows: a borrow to remember, a carry, a clause
to overlook, a verb to misread. The slips carry over into later steps, and sometimes cancel. What a
model learns from such demonstrations is wrong for an honest reason, with the right way in its
samples. The files written here have the formats of a user's own data.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.tasks.problems import MAXIMUM, Operation, Problem, compute, generate
from trivium.tasks.verifier import judge


@dataclass(frozen=True)
class Habits:
    """How often the writer is careless, and how often a careless one slips where it can."""

    careless: float = 0.75
    """Share of demonstrations from the careless writer."""
    forgets_borrow: float = 0.97
    """40-6=44: when a subtraction needs a borrow."""
    drops_carry: float = 0.25
    """31+9=30: when an addition or a multiplication needs a carry."""
    skips_clause: float = 0.05
    """No line for a clause; at least one line is written."""
    misreads: float = 0.05
    """Takes for + what is -, and the reverse; adds instead of multiplying."""


@dataclass(frozen=True)
class Sizes:
    """How many rows each file gets."""

    demonstrations: int = 30_000
    problems: int = 8_000
    heldout: int = 1_000
    labels: int = 12_000


def write(problem: Problem, rng: random.Random, habits: Habits = Habits()) -> str:
    """One demonstration: step lines that go on from whatever was written, then "#### answer"."""
    careless = rng.random() < habits.careless
    lines, value = [], problem.start
    for i, operation in enumerate(problem.operations):
        slip = _slip(operation, value, rng, habits) if careless else None
        rest = problem.operations[i + 1 :]
        if slip is None or not _possible(slip[1], rest) or not (slip[0] or lines or rest):
            slip = operation.line(value), operation.apply(value)
        line, value = slip
        lines += [line] if line else []
    return "\n".join([*lines, f"#### {value}"])


def _slip(
    operation: Operation, value: int, rng: random.Random, habits: Habits
) -> tuple[str, int] | None:
    """The (line, value) of a slip, with an empty line for a skipped clause; None for no slip."""
    if rng.random() < habits.skips_clause:
        return "", value
    symbol = operation.symbol
    if rng.random() < habits.misreads:
        symbol = "-" if symbol == "+" else "+"
        result = compute(value, symbol, operation.operand)
    elif rng.random() < (habits.forgets_borrow if symbol == "-" else habits.drops_carry):
        result = digitwise(value, symbol, operation.operand)
    else:
        return None
    return f"{value}{symbol}{operation.operand}={result}", result


def digitwise(value: int, symbol: str, operand: int) -> int:
    """The result with the unit digit right and no carry or borrow into the tens."""
    tens, units = divmod(value, 10)
    kept_tens = tens * operand if symbol == "*" else tens
    return 10 * kept_tens + compute(units, symbol, operand) % 10


def _possible(value: int, operations: Iterable[Operation]) -> bool:
    """Whether a correct continuation stays in range: the writer notices an absurd number."""
    for operation in operations:
        if not 0 <= value <= MAXIMUM:
            return False
        value = operation.apply(value)
    return 0 <= value <= MAXIMUM


def demonstrations(
    problems: Sequence[Problem], seed: int, habits: Habits = Habits()
) -> list[dict[str, Any]]:
    """One row {"prompt", "completion"} per problem."""
    rng = random.Random(f"writer {seed}")
    return [{"prompt": p.prompt, "completion": write(p, rng, habits)} for p in problems]


def questions(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """One row {"prompt", "answer", "steps", "operations"} per problem."""
    return [
        {
            "prompt": p.prompt,
            "answer": str(p.answer),
            "steps": p.steps,
            "operations": len(p.operations),
        }
        for p in problems
    ]


def labeled(problems: Sequence[Problem], written: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row {"prompt", "completions", "labels"} per demonstration: is each line right?"""
    rows = []
    for problem, row in zip(problems, written, strict=True):
        judged = judge(row["completion"], problem.steps)
        lines = [row["completion"][start:end].strip("\n") for (start, end), _ in judged]
        labels = [value == 1 for _, value in judged]
        rows.append({"prompt": problem.prompt, "completions": lines, "labels": labels})
    return rows


def write_files(
    directory: Path,
    seed: int,
    sizes: Sizes = Sizes(),
    habits: Habits = Habits(),
    operations: tuple[int, int] = (2, 4),
) -> dict[str, Path]:
    """Writes demonstrations, problems, heldout and labels (.jsonl); returns their paths by stem."""
    shown = generate(2 * seed, sizes.demonstrations, operations)
    asked = generate(2 * seed + 1, sizes.problems, operations)
    heldout = generate(seed, sizes.heldout, operations, split="test")
    written = demonstrations(shown, seed, habits)
    rows = {
        "demonstrations": written,
        "labels": labeled(shown[: sizes.labels], written[: sizes.labels]),
        "problems": questions(asked),
        "heldout": questions(heldout),
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = {stem: directory / f"{stem}.jsonl" for stem in rows}
    for stem, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[stem]), encoding="utf-8")
    return paths
