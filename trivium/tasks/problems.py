"""Word problems with a chain of operations, generated from a seed and split by their numbers.

The prompt of a problem is "Max has 31 eggs, finds 9, finds 6. How many now?" and its steps are
"31+9=40", "40+6=46". The chain of numbers alone assigns a problem to the training split or the
test split, so that training and held-out problems never share a chain, for any seeds.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

from trivium.errors import DataError

Split = Literal["train", "test"]
Symbol = Literal["+", "-", "*"]

NAMES = ("Max", "Ana", "Tom", "Mia", "Sam", "Eva", "Ben", "Zoe", "Leo", "Ida")
THINGS = ("eggs", "pens", "figs", "nuts", "cups", "toys", "keys", "caps")
ADDING = ("finds", "buys", "gets", "wins")
TAKING = ("loses", "eats", "sells", "gives away")
MULTIPLYING = {2: "doubles them", 3: "triples them"}
SYMBOLS: tuple[Symbol, ...] = ("+", "-", "*")
SYMBOL_WEIGHTS = (38, 50, 12)
STARTS = range(3, 41)
OPERANDS = range(3, 10)
MAXIMUM = 60
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Operation:
    """One clause of a problem: an operation on the current value."""

    symbol: Symbol
    operand: int
    verb: str

    @property
    def clause(self) -> str:
        """Text in the prompt: "finds 9", "doubles them"."""
        return self.verb if self.symbol == "*" else f"{self.verb} {self.operand}"

    def apply(self, value: int) -> int:
        """Return the value after this operation."""
        return compute(value, self.symbol, self.operand)

    def line(self, value: int) -> str:
        """Return the correct step line for this operation: "31+9=40"."""
        return f"{value}{self.symbol}{self.operand}={self.apply(value)}"


@dataclass(frozen=True)
class Problem:
    """A start value and the operations on it, with a name and a thing for the prompt."""

    name: str
    thing: str
    start: int
    operations: tuple[Operation, ...]

    @property
    def prompt(self) -> str:
        """Prompt of the problem, with its final newline."""
        clauses = ", ".join(operation.clause for operation in self.operations)
        return f"{self.name} has {self.start} {self.thing}, {clauses}. How many now?\n"

    @property
    def steps(self) -> list[str]:
        """Correct step lines, in order."""
        lines, value = [], self.start
        for operation in self.operations:
            lines.append(operation.line(value))
            value = operation.apply(value)
        return lines

    @property
    def answer(self) -> int:
        """Value after the last operation."""
        value = self.start
        for operation in self.operations:
            value = operation.apply(value)
        return value

    @property
    def split(self) -> Split:
        """Split of the problem; it depends on the chain of numbers, not on names or verbs."""
        chain = f"{self.start}" + "".join(f" {o.symbol}{o.operand}" for o in self.operations)
        share = int.from_bytes(hashlib.sha256(chain.encode()).digest()[:8], "big") / 2**64
        return "test" if share < HELD_OUT_SHARE else "train"


def compute(value: int, symbol: str, operand: int) -> int:
    """Return the result of `value symbol operand` for the symbols +, - and *."""
    if symbol == "+":
        return value + operand
    return value - operand if symbol == "-" else value * operand


def generate(
    seed: int, count: int, operations: tuple[int, int] = (2, 4), split: Split = "train"
) -> list[Problem]:
    """Return `count` distinct problems of one split.

    `operations` is the minimum and the maximum number of operations of a problem. Raises DataError
    if this range is empty or has too few distinct problems.
    """
    fewest, most = operations
    if not 1 <= fewest <= most:
        raise DataError(
            f"operations = {operations}: write (minimum, maximum) with 1 <= minimum <= maximum"
        )
    rng = random.Random(f"{split} {seed}")
    problems: dict[str, Problem] = {}
    misses = 0
    while len(problems) < count:
        problem = _sample_problem(rng, rng.randint(fewest, most))
        if problem.split == split and problem.prompt not in problems:
            problems[problem.prompt] = problem
            misses = 0
            continue
        misses += 1
        if misses > 10_000:
            raise DataError(
                f"count = {count}: only {len(problems)} different {split} problems were found with "
                f"{fewest} to {most} operations; lower the count, or allow more operations"
            )
    return list(problems.values())


def _sample_problem(rng: random.Random, count: int) -> Problem:
    start = value = rng.choice(STARTS)
    operations = []
    while len(operations) < count:
        operation = _sample_operation(rng)
        if 0 <= operation.apply(value) <= MAXIMUM:
            operations.append(operation)
            value = operation.apply(value)
    return Problem(rng.choice(NAMES), rng.choice(THINGS), start, tuple(operations))


def _sample_operation(rng: random.Random) -> Operation:
    symbol = rng.choices(SYMBOLS, SYMBOL_WEIGHTS)[0]
    if symbol == "*":
        factor = rng.choice(tuple(MULTIPLYING))
        return Operation(symbol, factor, MULTIPLYING[factor])
    return Operation(symbol, rng.choice(OPERANDS), rng.choice(ADDING if symbol == "+" else TAKING))
