"""Running test code against a program: two sandboxed processes and the messages between them.

The program's process and the tests' process exchange nothing but calls and plain values, which this
process relays; ``child`` and ``checker`` are their ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.rewards.sandbox.host import Limits, RunningProgram, Sandbox


@dataclass(frozen=True)
class Verdict:
    """Result of running test code against a program.

    Attributes:
        passed: whether the test code ran to its end without an error.
        failure: reason why it did not pass.
        test_error: reason why the test code itself cannot be run; None if it can.
        seconds: CPU time of the program.
    """

    passed: bool
    failure: str | None
    test_error: str | None
    seconds: float


def run_test_code(
    candidate: tuple[Sandbox, str],
    tester: tuple[Sandbox, str],
    entry_point: str | None,
    limits: Limits,
) -> Verdict:
    """Run test code against a program, each in its own sandbox, and relay their messages.

    The sandboxes must stay separate: a sandbox that has held tests must never run a program.
    """
    (program_sandbox, program), (test_sandbox, tests) = candidate, tester
    program_run = program_sandbox.start(
        {"mode": "serve", "source": program}, limits, with_channel=True
    )
    job = {"mode": "test", "source": tests, "entry_point": entry_point}
    test_run = test_sandbox.start(job, limits, with_channel=True)
    try:
        verdict = _relay(program_run, test_run, limits)
    finally:
        outcome, _ = program_run.stop(), test_run.stop()
    test_error = verdict.get("test_error")
    reason = outcome.reason if outcome.reason != "stopped" else None
    ended_early = f"the program ended before its tests, with status {outcome.status}"
    failure = (
        verdict.get("failure") or reason or outcome.error.strip().rpartition("\n")[2] or ended_early
    )
    passed = verdict.get("passed") is True
    return Verdict(passed, None if passed else failure, test_error, outcome.seconds)


def probe_test_code(
    sandbox: Sandbox, tests: Sequence[tuple[str, str | None]], limits: Limits
) -> dict[tuple[int, int], dict[str, Any]]:
    """Run test code, with its entry point, against two programs that are certainly wrong.

    Returns the verdict of each test (by its number) on program 0, which defines nothing, and on
    program 1, whose functions return objects that cannot be compared. A test that ends its process
    or exceeds a limit has no verdict, and the tests after it have none.
    """
    sources = [{"source": source, "entry_point": entry_point} for source, entry_point in tests]
    run = sandbox.start({"mode": "probe", "tests": sources}, limits, with_channel=True)
    verdicts = {}
    try:
        with contextlib.suppress(OSError, ValueError):
            for line in _lines(run, limits.output << 20):
                verdict = json.loads(line)
                verdicts[verdict["test"], verdict["program"]] = verdict
    finally:
        run.stop()
    return verdicts


def _relay(program_run: RunningProgram, test_run: RunningProgram, limits: Limits) -> dict[str, Any]:
    """Relay requests and replies until the tests send a verdict or a side ends; return it."""
    assert program_run.channel is not None and test_run.channel is not None, "both have a channel"
    max_bytes = limits.output << 20
    lines = {run: _lines(run, max_bytes) for run in (program_run, test_run)}
    with contextlib.suppress(OSError, TypeError, ValueError, StopIteration):
        while True:
            message = dict(json.loads(next(lines[test_run])))
            if "request" not in message:
                return message
            program_run.channel.sendall(json.dumps(message["request"]).encode() + b"\n")
            line = next(lines[program_run], None)
            if line is None:  # the program has ended: end the tests' wait for a reply
                test_run.channel.shutdown(socket.SHUT_WR)
                continue
            test_run.channel.sendall(line)
    return {}


def _lines(run: RunningProgram, max_bytes: int) -> Iterator[bytes]:
    """Yield the lines that a program sends, up to `max_bytes` in total."""
    assert run.channel is not None, "the program has a channel"
    waiting, total = [b""], 0
    while total <= max_bytes:
        piece = run.channel.recv(1 << 16)
        if not piece:
            return
        total += len(piece)
        if b"\n" not in piece:
            waiting.append(piece)
            continue
        *lines, rest = b"".join([*waiting, piece]).split(b"\n")
        waiting = [rest]
        yield from (line + b"\n" for line in lines)
