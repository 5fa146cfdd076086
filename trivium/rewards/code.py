"""Code reward: fraction of a data row's tests that a response's program passes.

The program runs in a sandbox (``sandbox``) and cannot influence the verdict: this process compares
its output, and test code runs in a second process without any of the program's code. This module
extracts the program from the response and distributes the work over cores; ``code_tests`` parses a
row's tests, and ``code_check`` checks them before a run.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from trivium.rewards.code_tests import Test, read_tests
from trivium.rewards.functions import CallTimeout, deadline
from trivium.rewards.sandbox.host import (
    ISOLATION,
    Limits,
    Sandbox,
    require_isolation,
)
from trivium.rewards.sandbox.relay import run_test_code

logger = logging.getLogger(__name__)

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "py", "python3")
_EXTRACTS = ("block", "response")
_SCORES = ("share", "all")


def find_program(response: str, extract: str = "block") -> str | None:
    """Return the last closed Python block of a response, or None without one.

    A block without a language counts if no block is marked as Python. With ``extract="response"``,
    return the whole response.
    """
    if extract == "response":
        return response
    blocks = [(match[1].lower(), match[2]) for match in _FENCE.finditer(response)]
    marked = [body for language, body in blocks if language in _PYTHON]
    unmarked = [body for language, body in blocks if not language]
    return (marked or unmarked or [None])[-1]


def same_output(written: str, expected: str) -> bool:
    """Return whether two outputs are equal except for white space at the end of lines or text."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(written) == lines(expected)


# --- Scoring -------------------------------------------------------------------------------------


class SandboxPair:
    """Two sandboxes that process one response at a time: one for programs, one for test code."""

    def __init__(self) -> None:
        self._programs = Sandbox()
        self._tests: Sandbox | None = None

    def run_test(self, program: str, test: Test, limits: Limits) -> tuple[bool, float]:
        """Return whether a program passes a test, and its CPU time in seconds."""
        if test.code is None:
            outcome = self._programs.run(program, limits, test.input)
            ended_well = outcome.status == 0 and outcome.reason is None
            written = outcome.output.decode("utf-8", "replace")
            return ended_well and same_output(written, test.output), outcome.seconds
        self._tests = self._tests or Sandbox()
        tester = (self._tests, test.code)
        verdict = run_test_code((self._programs, program), tester, test.entry_point, limits)
        if verdict.test_error:
            raise ValueError(
                f"the data's test {test.code!r:.120} cannot be run: {verdict.test_error}"
            )
        return verdict.passed, verdict.seconds

    def pass_rate(
        self, program: str, tests: Sequence[Test], limits: Limits, call_deadline: float
    ) -> float:
        """Return the fraction of tests that a program passes; all tests share the limits.

        Raises CallTimeout if the deadline of the reward call comes first.
        """
        passed, cpu, end = 0, limits.seconds, time.monotonic() + limits.wall
        for test in tests:
            now = time.monotonic()
            if now >= call_deadline:
                raise CallTimeout
            if cpu <= 0 or now >= end:
                break
            left = replace(limits, seconds=cpu, wall=min(end, call_deadline) - now)
            passed_test, cpu_used = self.run_test(program, test, left)
            if not passed_test and time.monotonic() >= call_deadline:
                raise CallTimeout
            passed, cpu = passed + passed_test, cpu - cpu_used
        return passed / len(tests)

    def close(self) -> None:
        self._programs.close()
        if self._tests is not None:
            self._tests.close()


def code(
    responses: list[str],
    tests: list[Any],
    entry_point: list[Any] | None = None,
    test_setup: list[Any] | None = None,
    reference_solution: list[Any] | None = None,
    extract: str = "block",
    score: str = "share",
    seconds: float = 5,
    memory: int = 512,
    output: int = 1,
    threads: int = 16,
    workers: int | None = None,
    accept_missing: Sequence[str] = (),
) -> list[float]:
    """Return the fraction of the row's `tests` that each response's Python program passes.

    The programs run in a sandbox; docs/sandbox.md describes what it isolates. A row's tests are
    pairs of input and output, assert statements, calls of a function, or test code; a HumanEval
    ``check(candidate)`` is called with the row's `entry_point`, and `test_setup` comes before each
    test code. The check before a run also runs the tests on each `reference_solution`. `extract`
    takes the last ``python`` block or the whole ``response``; without a program the score is 0.
    `score: all` gives 1 if all tests pass, else 0. All tests of a response share `seconds` of CPU
    time (and 2 `seconds` + 1 of wall time), `memory` and `output` in megabytes, and `threads`. A
    program cannot start a process. `workers` responses run in parallel, by default one per core.
    ``accept_missing`` lists isolation (files, network, processes) that may be missing if this
    machine cannot enforce it.
    """
    _check_arguments(extract, score, accept_missing, seconds)
    for name, value, minimum in (
        ("memory", memory, 64),
        ("output", output, 1),
        ("threads", threads, 1),
        *([("workers", workers, 1)] if workers is not None else []),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} must be a whole number of at least {minimum}, not {value!r}")
    require_isolation(tuple(accept_missing))
    missing: list[Any] = [None] * len(responses)
    tests_per_response = [
        read_tests(*row)
        for row in zip(tests, entry_point or missing, test_setup or missing, strict=True)
    ]
    programs = [find_program(response, extract) for response in responses]
    limits = Limits(seconds, 2 * seconds + 1, memory, output, threads)
    pass_rates = _pass_rates(programs, tests_per_response, limits, workers or cores())
    return pass_rates if score == "share" else [float(pass_rate == 1) for pass_rate in pass_rates]


def _check_arguments(extract: Any, score: Any, accept_missing: Any, seconds: Any) -> None:
    for name, value, known in (("extract", extract, _EXTRACTS), ("score", score, _SCORES)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, not {value!r}")
    is_list = isinstance(accept_missing, list | tuple)
    if not is_list or not all(kind in ISOLATION for kind in accept_missing):
        raise ValueError(
            f"accept_missing must be a list of {', '.join(ISOLATION)}, not {accept_missing!r}"
        )
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, not {seconds!r}")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _pass_rates(
    programs: Sequence[str | None], tests: Sequence[Sequence[Test]], limits: Limits, workers: int
) -> list[float]:
    """Return every program's pass rate; `workers` threads compute them, and an error stops all."""
    call_deadline = deadline() or math.inf
    pass_rates = [0.0] * len(programs)
    pending = iter([index for index, program in enumerate(programs) if program is not None])
    lock, failed = threading.Lock(), threading.Event()

    def next_index() -> int | None:
        with lock:
            return None if failed.is_set() else next(pending, None)

    def work() -> None:
        pair = SandboxPair()
        try:
            while (index := next_index()) is not None:
                program = programs[index]
                assert program is not None, "only responses with a program are pending"
                pass_rates[index] = pair.pass_rate(program, tests[index], limits, call_deadline)
        except BaseException:
            failed.set()
            raise
        finally:
            pair.close()

    count = sum(program is not None for program in programs)
    with ThreadPoolExecutor(max(1, min(workers, count)), "trivium code") as pool:
        futures = [pool.submit(work) for _ in range(min(workers, count))]
        try:
            for future in futures:
                future.result()
        finally:
            failed.set()  # an interrupted call waits for running programs, not for the whole batch
    return pass_rates
