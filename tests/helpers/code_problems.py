"""Twenty small problems in the shapes of HumanEval, MBPP and LiveCodeBench, and native verdicts.

``native_verdicts`` runs each program with each test in one namespace, in a child process without a
sandbox, as the benchmarks' own harnesses do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROBLEMS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
FORMS = ("HumanEval", "MBPP", "LiveCodeBench calls", "LiveCodeBench input")


@dataclass(frozen=True)
class ProblemRow:
    """A program, and the tests of its problem in one shape."""

    program: str
    tests: list[Any]
    entry_point: str | None


def rows_of(form: str) -> list[ProblemRow]:
    """Return each problem in a shape, with a right, a wrong, an empty and a crashing program."""
    rows = []
    for problem in PROBLEMS:
        name = problem["name"]
        crashing = f"def {name}(*arguments):\n    raise RuntimeError('crash')"
        reads = (
            "\nimport json, sys\nprint(json.dumps("
            f"{name}(*map(json.loads, sys.stdin.read().splitlines()))))"
        )
        for program in (problem["right"], problem["wrong"], "", crashing):
            if form == "LiveCodeBench input" and program:
                program += reads
            is_call = form in ("HumanEval", "LiveCodeBench calls")
            rows.append(ProblemRow(program, _tests(form, problem), name if is_call else None))
    return rows


def _tests(form: str, problem: dict[str, Any]) -> list[Any]:
    name, cases = problem["name"], problem["cases"]
    if form == "HumanEval":
        lines = [f"    assert candidate(*{a!r}) == {e!r}\n" for a, e in cases]
        return [f"METADATA = {{'author': 'x'}}\n\n\ndef check(candidate):\n{''.join(lines)}"]
    if form == "MBPP":
        return [f"assert {name}({', '.join(map(repr, a))}) == {e!r}" for a, e in cases]
    kind = "functional" if form == "LiveCodeBench calls" else "stdin"
    return [
        {"input": "\n".join(map(json.dumps, a)), "output": json.dumps(e), "testtype": kind}
        for a, e in cases
    ]


_NATIVE = r"""
import io, json, os, sys

def passes(form, row, test):
    names = {"__name__": "__main__"}
    if form == "LiveCodeBench input":
        sys.stdin, sys.stdout = io.StringIO(test["input"]), io.StringIO()
    try:
        exec(row["program"], names)
        if form == "HumanEval":
            exec(test, names)
            names["check"](names[row["entry_point"]])
        elif form == "MBPP":
            exec(test, names)
        elif form == "LiveCodeBench calls":
            arguments = map(json.loads, test["input"].split("\n"))
            result = names[row["entry_point"]](*arguments)
            result = list(result) if isinstance(result, tuple) else result
            return result == json.loads(test["output"])
        else:
            return sys.stdout.getvalue().split() == test["output"].split()
    except BaseException:
        return False
    return True

def run(form, row, test):
    # A process for each test: a program may end its process, which is not a pass.
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        verdict = passes(form, row, test)
        os.write(write, b"1" if verdict else b"0")
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as pipe:
        return pipe.read() == b"1"

form, rows = json.load(sys.stdin)
print(json.dumps([[run(form, row, test) for test in row["tests"]] for row in rows]))
"""


def native_verdicts(form: str, rows: list[ProblemRow]) -> list[list[bool]]:
    """Return for each row whether its program passes each test without a sandbox."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", _NATIVE],
        input=json.dumps([form, [asdict(row) for row in rows]]),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)
