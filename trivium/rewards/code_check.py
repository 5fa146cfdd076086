"""Check of the reward `code` before a run: do a row's tests tell right programs from wrong ones?

Tests that check nothing reward every response, and tests that refuse the right program reward none;
a run shows neither. So each row's tests run against programs that are certainly wrong and, where
the row has one, against its reference solution. An input with its output needs no program: it
accepts a wrong one only if the output is blank.
"""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from trivium.config.functions import printable
from trivium.data.rows import Row, RowsConfig, read_rows
from trivium.errors import DataError
from trivium.rewards.code import SandboxPair, code, cores, find_program
from trivium.rewards.code_tests import Test, read_tests
from trivium.rewards.functions import match_columns
from trivium.rewards.reward_config import RewardConfig
from trivium.rewards.sandbox.host import Limits, Sandbox
from trivium.rewards.sandbox.relay import probe_test_code

MAX_ROWS = 20_000
"""Number of rows that are checked before a run."""
_MAX_FAULTS = 10
_COLUMNS = ("tests", "entry_point", "test_setup")


@dataclass(frozen=True)
class CheckedRow:
    """Tests of a row, and its reference solution, if any."""

    where: str
    tests: Sequence[Test]
    reference: Any = None
    prompt: Any = None


def data_faults(config: RewardConfig, data: RowsConfig, max_rows: int = MAX_ROWS) -> Iterator[str]:
    """Yield the faults of the rows' tests, each with its file and line, up to ten."""
    rows: list[CheckedRow | str] = []
    for row in _first(read_rows(data), max_rows):
        if not isinstance(row, DataError):
            try:
                rows.append(_read(config, row))
            except ValueError as error:
                rows.append(f"{row.where}: {error}")
    for count, fault in enumerate(_checked(rows, config.arguments), 1):
        yield printable(fault, 600)
        if count == _MAX_FAULTS:
            yield f"checking stopped after {_MAX_FAULTS} rows; there may be more"
            return


def _first(rows: Iterable[Row | DataError], count: int) -> Iterator[Row | DataError]:
    for _, row in zip(range(count), rows, strict=False):
        yield row


def _read(config: RewardConfig, row: Row) -> CheckedRow:
    """Return a row's tests; raise ValueError if they cannot be parsed."""
    column_of, _ = match_columns(code, config.arguments, config.columns, row.columns)
    values = {name: row.columns.get(column) for name, column in column_of.items()}
    tests = read_tests(*(values.get(name, config.arguments.get(name)) for name in _COLUMNS))
    prompt = row.columns.get("prompt")
    return CheckedRow(row.where, tests, values.get("reference_solution"), prompt)


# --- Running the checks --------------------------------------------------------------------------


class _Checker:
    """Sandboxes that check one row at a time."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tests: Sandbox | None = None
        self._pair = SandboxPair()

    def faults(self, row: CheckedRow) -> str | None:
        """Return why a row's tests are not usable, with its line, or None."""
        fault = self._accepts_wrong(row.tests)
        if fault is None and row.reference is not None:
            fault = self._refuses_right(row)
        return None if fault is None else f"{row.where}: {fault}"

    def _accepts_wrong(self, tests: Sequence[Test]) -> str | None:
        for number, test in enumerate(tests, 1):
            if test.code is None and not test.output.strip():
                return (
                    f"test {number} of {len(tests)} expects no output, so a program that does "
                    "nothing passes it: give it an output, or remove it"
                )
        sources = [(test.code, test.entry_point) for test in tests if test.code is not None]
        if not sources:
            return None
        self._tests = self._tests or Sandbox()
        verdicts = probe_test_code(self._tests, sources, self._limits)
        for (number, _), verdict in verdicts.items():
            if "test_error" in verdict:
                return (
                    f"test {number + 1} of {len(tests)} {_quoted(sources[number][0])} cannot be "
                    f"run: {verdict['test_error']}"
                )
        passed = [{n for (n, p), v in verdicts.items() if p == k and v["passed"]} for k in (0, 1)]
        if passed[0]:
            number = min(passed[0])
            return (
                f"test {number + 1} of {len(tests)} {_quoted(sources[number][0])} passes a program "
                "that defines nothing, so it checks nothing: write asserts that call the program"
            )
        if len(passed[1]) == len(tests):
            return (
                f"the tests {_quoted(sources[0][0])} pass a program whose functions return a wrong "
                "value, so they check no result: compare the results with assert"
            )
        return None

    def _refuses_right(self, row: CheckedRow) -> str | None:
        programs = list(_reference_programs(row))
        if not programs:
            return f"its reference_solution {_quoted(str(row.reference))} is not a Python program"
        failed = [self._failed_test(program, row.tests) for program in programs]
        if None in failed:
            return None
        number = failed[0] or 0
        return (
            f"test {number + 1} of {len(row.tests)} {_quoted(str(row.tests[number]))} refuses the "
            "row's reference_solution: correct the test or the solution"
        )

    def _failed_test(self, program: str, tests: Sequence[Test]) -> int | None:
        for number, test in enumerate(tests):
            if not self._pair.run_test(program, test, self._limits)[0]:
                return number
        return None

    def close(self) -> None:
        self._pair.close()
        if self._tests is not None:
            self._tests.close()


def _checked(rows: Sequence[CheckedRow | str], arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield the faults of rows, in their order; a row that is a text is its own fault."""
    limits = _limits(arguments)
    checkers: SimpleQueue[_Checker] = SimpleQueue()
    count = max(1, min(arguments.get("workers") or cores(), len(rows)))
    for _ in range(count):
        checkers.put(_Checker(limits))

    def check(row: CheckedRow | str) -> str | None:
        if isinstance(row, str):
            return row
        checker = checkers.get()
        try:
            return checker.faults(row)
        except ValueError as error:  # a test cannot be run
            return f"{row.where}: {error}"
        finally:
            checkers.put(checker)

    pool = ThreadPoolExecutor(count, "trivium code check")
    try:
        yield from (fault for fault in pool.map(check, rows) if fault is not None)
    finally:
        pool.shutdown(cancel_futures=True)
        while not checkers.empty():
            checkers.get().close()


def _limits(arguments: Mapping[str, Any]) -> Limits:
    """Return the limits of one test: those of a response."""
    given = {n: arguments[n] for n in ("seconds", "memory", "output", "threads") if n in arguments}
    limits = Limits(**given)
    return replace(limits, wall=2 * limits.seconds + 1)


def _reference_programs(row: CheckedRow) -> Iterator[str]:
    """Yield the programs that a reference solution can mean: itself, or after the prompt.

    HumanEval's solution is the body of a function that its prompt begins. Of a list of solutions
    (APPS), the first is used.
    """
    solution = row.reference
    if isinstance(solution, str) and solution.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):
            solution = json.loads(solution)
    if isinstance(solution, list) and solution:
        solution = solution[0]
    if not isinstance(solution, str):
        return
    prompt = row.prompt if isinstance(row.prompt, str) else ""
    for program in (find_program(solution), solution, prompt + solution if prompt else None):
        if program is not None and _is_python(program):
            yield program


def _is_python(program: str) -> bool:
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _quoted(text: str | None) -> str:
    return f"{text!r:.100}"
