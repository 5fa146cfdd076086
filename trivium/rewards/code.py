"""A reward for programs: the share of a data row's tests that a response's program passes.

The program runs sealed (``sandbox``), and the verdict is reached where it cannot: its output is
compared here, and test code runs in a process of its own that the program never enters. Reading a
row's tests, finding the program and sharing the work out to the cores is what this module adds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from trivium.rewards.functions import PastLimit, deadline
from trivium.rewards.sandbox.host import ISOLATION, Limits, Sandbox, examine, require_isolation

logger = logging.getLogger(__name__)

_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "py", "python3")
_EXTRACTS = ("block", "response")
_SCORES = ("share", "all")
_FORMS = (
    "a list of {input: …, output: …}, {inputs: […], outputs: […]}, a list of assert statements, or "
    "test code as one text; each may be given as JSON"
)


# --- Reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """One test: an input and its output, or test code and the entry point that it checks."""

    code: str | None = None
    entry_point: str | None = None
    input: str = ""
    output: str = ""


def find_program(response: str, extract: str = "block") -> str | None:
    """Return a response's program: its last closed Python block, or all of it; None without one.

    A block without a language counts where no block is marked as Python.
    """
    if extract == "response":
        return response
    blocks = [(match[1].lower(), match[2]) for match in _FENCE.finditer(response)]
    marked = [body for language, body in blocks if language in _PYTHON]
    plain = [body for language, body in blocks if not language]
    return (marked or plain or [None])[-1]


def read_tests(tests: Any, entry_point: Any = None) -> list[Test]:
    """Return a data row's tests; raises ValueError where there are none, or in no form known."""
    if entry_point is not None and not (
        isinstance(entry_point, str) and entry_point.isidentifier()
    ):
        raise ValueError(
            f"the data's entry_point {entry_point!r:.80} is not the name of a function"
        )
    if isinstance(tests, str):
        try:
            parsed = json.loads(tests)
        except ValueError:
            return [_code(tests, entry_point)]
        return read_tests(parsed, entry_point)
    if isinstance(tests, dict) and set(tests) >= {"inputs", "outputs"}:
        tests = _pairs(tests["inputs"], tests["outputs"])
    if isinstance(tests, list | tuple) and tests:
        return [_one(test, entry_point) for test in tests]
    raise ValueError(f"the data's tests {tests!r:.120} are no tests: write {_FORMS}")


def _pairs(inputs: Any, outputs: Any) -> list[dict[str, Any]]:
    listed = isinstance(inputs, list) and isinstance(outputs, list)
    if not listed or len(inputs) != len(outputs):
        raise ValueError(
            "the data's tests need as many 'inputs' as 'outputs', each a list of texts"
        )
    return [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]


def _one(test: Any, entry_point: str | None) -> Test:
    if isinstance(test, str):
        return _code(test, entry_point)
    if isinstance(test, dict) and "output" in test:
        given, expected = test.get("input", ""), test["output"]
        if isinstance(given, str) and isinstance(expected, str):
            return Test(input=given, output=expected)
    raise ValueError(f"the data's test {test!r:.120} is no test: write {_FORMS}")


def _code(text: str, entry_point: str | None) -> Test:
    """Return test code; where it only defines ``check(candidate)``, the call is added."""
    if not text.strip():
        raise ValueError("the data's tests are an empty text: every program would pass them")
    defines = re.search(r"^def check\(", text, re.MULTILINE)
    if entry_point and defines and not re.search(r"^check\(", text, re.MULTILINE):
        text = f"{text}\n\ncheck({entry_point})\n"
    return Test(code=text, entry_point=entry_point)


def same_output(written: str, expected: str) -> bool:
    """Whether two outputs are equal but for white space at the ends of lines and of the whole."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().splitlines()]

    return lines(written) == lines(expected)


# --- Scoring -------------------------------------------------------------------------------------


class _Bench:
    """Two sandboxes that work on one response at a time: one for programs, one for tests."""

    def __init__(self) -> None:
        self._programs = Sandbox()
        self._tests: Sandbox | None = None

    def passes(self, program: str, test: Test, limits: Limits) -> tuple[bool, float]:
        """Return whether a program passes a test, and the processor time that it took."""
        if test.code is None:
            outcome = self._programs.run(program, limits, test.input)
            ended_well = outcome.status == 0 and outcome.reason is None
            written = outcome.output.decode("utf-8", "replace")
            return ended_well and same_output(written, test.output), outcome.seconds
        self._tests = self._tests or Sandbox()
        examiner = (self._tests, test.code)
        verdict = examine((self._programs, program), examiner, test.entry_point, limits)
        if verdict.unfit:
            raise ValueError(f"the data's test {test.code!r:.120} cannot be run: {verdict.unfit}")
        return verdict.passed, verdict.seconds

    def share(self, program: str, tests: Sequence[Test], limits: Limits, until: float) -> float:
        """Return the share of tests that a program passes, all of them within one set of limits.

        Raises PastLimit where the time of the whole call is over first: that is no verdict.
        """
        passed, cpu, ends = 0, limits.seconds, time.monotonic() + limits.wall
        for test in tests:
            now = time.monotonic()
            if now >= until:
                raise PastLimit
            if cpu <= 0 or now >= ends:
                break
            left = replace(limits, seconds=cpu, wall=min(ends, until) - now)
            good, used = self.passes(program, test, left)
            if not good and time.monotonic() >= until:
                raise PastLimit
            passed, cpu = passed + good, cpu - used
        return passed / len(tests)

    def close(self) -> None:
        self._programs.close()
        if self._tests is not None:
            self._tests.close()


def code(
    responses: list[str],
    tests: list[Any],
    entry_point: list[Any] | None = None,
    extract: str = "block",
    score: str = "share",
    seconds: float = 5,
    memory: int = 512,
    output: int = 1,
    threads: int = 16,
    workers: int | None = None,
    accept_missing: Sequence[str] = (),
) -> list[float]:
    """The share of its row's `tests` that the Python program in a response passes, run sealed.

    A row's tests are pairs of input and output, assert statements, or test code, where a HumanEval
    ``check(candidate)`` is called with the row's `entry_point`. `extract` takes the last ``python``
    block or the whole ``response``; without a program the score is 0. `score: all` gives 1 for all
    tests passed, else 0. All tests of a response together get `seconds` of processor time (and
    twice that and a second by the clock), `memory` and `output` in megabytes, and `threads`; a
    program can start no process. `workers` responses run at once, one per core by default.
    ``accept_missing`` names isolation (files, network, processes) to go without where this machine
    cannot enforce it. docs/sandbox.md says what the seal keeps out.
    """
    _check(extract, score, accept_missing, seconds)
    for name, value, least in (
        ("memory", memory, 64),
        ("output", output, 1),
        ("threads", threads, 1),
        *([("workers", workers, 1)] if workers is not None else []),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    require_isolation(tuple(accept_missing))
    names = entry_point if entry_point is not None else [None] * len(responses)
    read = [read_tests(row, name) for row, name in zip(tests, names, strict=True)]
    programs = [find_program(response, extract) for response in responses]
    limits = Limits(seconds, 2 * seconds + 1, memory, output, threads)
    shares = _shares(programs, read, limits, workers or _cores())
    return shares if score == "share" else [float(share == 1) for share in shares]


def _check(extract: Any, score: Any, accept_missing: Any, seconds: Any) -> None:
    for name, value, known in (("extract", extract, _EXTRACTS), ("score", score, _SCORES)):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(known)}, not {value!r}")
    listed = isinstance(accept_missing, list | tuple)
    if not listed or not all(way in ISOLATION for way in accept_missing):
        raise ValueError(
            f"accept_missing must be a list of {', '.join(ISOLATION)}, not {accept_missing!r}"
        )
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number, not {seconds!r}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _shares(
    programs: Sequence[str | None], tests: Sequence[Sequence[Test]], limits: Limits, workers: int
) -> list[float]:
    """Return every program's share, worked out on `workers` benches; the first error ends all."""
    until = deadline() or math.inf
    shares = [0.0] * len(programs)
    waiting = iter([index for index, program in enumerate(programs) if program is not None])
    lock, failed = threading.Lock(), threading.Event()

    def next_one() -> int | None:
        with lock:
            return None if failed.is_set() else next(waiting, None)

    def work() -> None:
        bench = _Bench()
        try:
            while (index := next_one()) is not None:
                program = programs[index]
                assert program is not None, "responses without a program do not wait"
                shares[index] = bench.share(program, tests[index], limits, until)
        except BaseException:
            failed.set()
            raise
        finally:
            bench.close()

    count = sum(program is not None for program in programs)
    with ThreadPoolExecutor(max(1, min(workers, count)), "trivium code") as pool:
        benches = [pool.submit(work) for _ in range(min(workers, count))]
        try:
            for bench in benches:
                bench.result()
        finally:
            failed.set()  # an interrupted call shall wait for what runs, not for the whole batch
    return shares
