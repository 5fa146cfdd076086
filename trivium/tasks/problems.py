"""Word problems with a chain of operations, drawn from a seed and split by their arithmetic.

A problem reads "Max has 31 eggs, finds 9, finds 6. How many now?" and its steps are "31+9=40",
"40+6=46". Whether it is for training or held out is a function of its chain of numbers alone, so
that no set made for training, whatever its seed, shares a chain with a held-out one.
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
KINDS: tuple[Symbol, ...] = ("+", "-", "*")
KIND_WEIGHTS = (38, 50, 12)
STARTS = range(3, 41)
OPERANDS = range(3, 10)
MAXIMUM = 60
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Operation:
    """One clause of a problem: what happens to the running value."""

    symbol: Symbol
    operand: int
    verb: str

    @property
    def clause(self) -> str:
        """The words of the problem: "finds 9", "doubles them"."""
        return self.verb if self.symbol == "*" else f"{self.verb} {self.operand}"

    def apply(self, value: int) -> int:
        """The value after this operation."""
        return compute(value, self.symbol, self.operand)

    def line(self, value: int) -> str:
        """The step line that carries it out correctly: "31+9=40"."""
        return f"{value}{self.symbol}{self.operand}={self.apply(value)}"


@dataclass(frozen=True)
class Problem:
    """A start value and the operations on it, told with a name and a thing."""

    name: str
    thing: str
    start: int
    operations: tuple[Operation, ...]

    @property
    def prompt(self) -> str:
        """The text that the model is given, with its final newline."""
        clauses = ", ".join(operation.clause for operation in self.operations)
        return f"{self.name} has {self.start} {self.thing}, {clauses}. How many now?\n"

    @property
    def steps(self) -> list[str]:
        """The correct step lines, in order."""
        lines, value = [], self.start
        for operation in self.operations:
            lines.append(operation.line(value))
            value = operation.apply(value)
        return lines

    @property
    def answer(self) -> int:
        """The value after the last operation."""
        value = self.start
        for operation in self.operations:
            value = operation.apply(value)
        return value

    @property
    def split(self) -> Split:
        """Which side the problem's chain of numbers falls on; names and verbs have no say."""
        chain = f"{self.start}" + "".join(f" {o.symbol}{o.operand}" for o in self.operations)
        share = int.from_bytes(hashlib.sha256(chain.encode()).digest()[:8], "big") / 2**64
        return "test" if share < HELD_OUT_SHARE else "train"


def compute(value: int, symbol: str, operand: int) -> int:
    """The result of `value symbol operand` for the symbols +, - and *."""
    if symbol == "+":
        return value + operand
    return value - operand if symbol == "-" else value * operand


def generate(
    seed: int, count: int, operations: tuple[int, int] = (2, 4), split: Split = "train"
) -> list[Problem]:
    """Draws `count` problems, no two alike, of one split and from fewest to most operations.

    Raises DataError where the range of operations is empty or holds too few different problems.
    """
    fewest, most = operations
    if not 1 <= fewest <= most:
        raise DataError(f"operations = {operations}: write (fewest, most) with 1 <= fewest <= most")
    rng = random.Random(f"{split} {seed}")
    found: dict[str, Problem] = {}
    misses = 0
    while len(found) < count:
        problem = _draw(rng, rng.randint(fewest, most))
        if problem.split == split and problem.prompt not in found:
            found[problem.prompt] = problem
            misses = 0
            continue
        misses += 1
        if misses > 10_000:
            raise DataError(
                f"count = {count}: only {len(found)} different {split} problems were found with "
                f"{fewest} to {most} operations; ask for fewer, or allow more operations"
            )
    return list(found.values())


def _draw(rng: random.Random, count: int) -> Problem:
    start = value = rng.choice(STARTS)
    operations = []
    while len(operations) < count:
        operation = _operation(rng)
        if 0 <= operation.apply(value) <= MAXIMUM:
            operations.append(operation)
            value = operation.apply(value)
    return Problem(rng.choice(NAMES), rng.choice(THINGS), start, tuple(operations))


def _operation(rng: random.Random) -> Operation:
    symbol = rng.choices(KINDS, KIND_WEIGHTS)[0]
    if symbol == "*":
        factor = rng.choice(tuple(MULTIPLYING))
        return Operation(symbol, factor, MULTIPLYING[factor])
    return Operation(symbol, rng.choice(OPERANDS), rng.choice(ADDING if symbol == "+" else TAKING))
