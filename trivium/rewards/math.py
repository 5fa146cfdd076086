"""Verifiers of final answers: GSM8K-style numbers, and mathematics in general.

Both compare only the final answer; ``steps`` checks the steps. The general verifier is
`math-verify`, which runs in a separate process (``math_worker``).
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any

from trivium.rewards.answers import CURRENCIES, ascii_numbers, boxed_answer, readable_response

logger = logging.getLogger(__name__)

GSM8K_MARKERS = ("####", "A:")
_CURRENCY = rf"\\?[${CURRENCIES}]"
_NUMBER = re.compile(
    rf"\s*(?:(?:\*\*|__)\s*)*(?:(?P<sign>[-+])\s*)?(?:{_CURRENCY}\s*)?(?P<inner>-?)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?P<exponent>[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?"
    r"(?![.,:]?[0-9])(?!\s*[+^=×÷])(?!\s*[-*/x]\s*[0-9(])(?!\*\*[0-9])"
)
_TOO_LONG = "verification exceeded its limits"
_MAX_NUMBER_CHARS = 200


def read_number(text: str) -> Fraction | None:
    """Return the exact number at the start of a text, or None without an unambiguous number.

    Signs, currency signs, thousands commas, decimals and exponents are parsed, in digits of every
    script, and ``**`` around them is ignored. So are units, words and ``%`` after the number:
    ``50%`` is 50. A number that is part of a longer expression is rejected: ``1,23``, ``18 + 2``,
    ``1/5``, ``10:30``.
    """
    beginning = ascii_numbers(text[:_MAX_NUMBER_CHARS])
    match = _NUMBER.match(beginning)
    if not match or match.end() == len(beginning) < len(text):
        return None
    signs = (match["sign"] or "") + match["inner"]
    if len(signs) > 1:
        return None
    magnitude = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
    return -magnitude if signs == "-" else magnitude


def final_number(text: str, markers: Sequence[str] = GSM8K_MARKERS) -> Fraction | None:
    """Return the number after the last marker, on the same line, or None.

    A marker must be at the start of the text or follow white space or ``*``.
    """
    any_marker = "|".join(re.escape(marker) for marker in markers)
    ends = [match.end() for match in re.finditer(rf"(?<![^\s*])(?:{any_marker})", text)]
    return read_number(text[ends[-1] :].split("\n", 1)[0]) if ends else None


def _gold_number(answer: Any, markers: Sequence[str]) -> Fraction:
    if isinstance(answer, Real) and not isinstance(answer, bool):
        return Fraction(repr(answer) if isinstance(answer, float) else str(answer))
    if isinstance(answer, str):
        found = final_number(answer, markers)
        found = read_number(answer) if found is None else found
        if found is not None:
            return found
    raise ValueError(
        f"the data's answer {answer!r:.200} has no final number: write a number, or a solution "
        f"that ends in {' or '.join(f'{marker} n' for marker in markers)}"
    )


def gsm8k(
    responses: list[str], answer: list[Any], markers: Sequence[str] = GSM8K_MARKERS
) -> list[float]:
    """Return 1 if a response's final number equals the answer's, else 0 (Cobbe et al. 2021).

    The final number follows the last marker (``#### 18``, ``A: 18``); a response without one gets
    0. `answer` is a number, its text, or a whole solution with a marker.
    """
    is_list = isinstance(markers, list | tuple) and len(markers) > 0
    if not is_list or not all(isinstance(marker, str) and marker for marker in markers):
        raise ValueError(f"markers must be a list of texts such as ['####'], not {markers!r}")
    return [
        float(final_number(response, markers) == _gold_number(gold, markers))
        for response, gold in zip(responses, answer, strict=True)
    ]


class WorkerDied(Exception):
    """The verifier process has ended by itself; the message is its exit status."""


class _Worker:
    """A running verifier process."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("math_worker.py")
        self._process = subprocess.Popen(
            # -P: the script's folder has a math.py, which must not shadow the standard library's.
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        message = self._read()
        if message is None or "error" in message:
            self.close()
            reason = "it ended at once" if message is None else message["error"]
            raise RuntimeError(f"the verifier process could not start: {reason}")

    def _read(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None, "the worker's output is a pipe"
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def request(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the reply, or None if the process was killed after `seconds`.

        Raises:
            WorkerDied: the process has ended for another reason.
        """
        assert self._process.stdin is not None, "the worker's input is a pipe"
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        reply = None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply = self._read()
        except OSError:
            reply = None
        finally:
            timer.cancel()
        if reply is None and not expired.is_set():
            status = self._process.wait()
            raise WorkerDied(f"signal {-status}" if status < 0 else f"exit status {status}")
        return reply

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                continue


_idle: list[_Worker] = []


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()


def math(
    responses: list[str], answer: list[Any], boxed: bool = False, seconds: int = 3
) -> list[float]:
    r"""Return 1 for each response whose final answer equals `answer` mathematically, else 0.

    `math-verify` compares the answers. `answer` is an expression (LaTeX or plain), a number, or a
    solution that ends in ``#### …`` or ``\boxed{…}``; the contents of several boxes are one set.
    With `boxed`, only an answer in ``\boxed{…}`` counts. Parsing and comparing may each take
    `seconds`; a response that takes longer gets 0 and a logged warning, and so does one on which
    the verifier process dies twice.
    """
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 1:
        raise ValueError(f"seconds must be a whole number of at least 1, not {seconds!r}")
    if not isinstance(boxed, bool):
        raise ValueError(f"boxed must be true or false, not {boxed!r}")
    worker: _Worker | None = None
    scores = []
    try:
        for response, gold in zip(responses, answer, strict=True):
            expected = boxed_answer(_gold_text(gold))
            read = readable_response(response, expected)
            request = {"answer": expected, "response": read, "boxed": boxed, "seconds": seconds}
            worker, reply, fault = _ask(worker, request, 2 * seconds + 1)
            if reply is None or reply["out_of_time"]:
                logger.warning("%s; score is 0: %.200r", fault or _TOO_LONG, response)
            elif reply["verdict"] is None:
                raise ValueError(f"math-verify cannot parse the data's answer {gold!r:.200}")
            scores.append(float(reply is not None and reply["verdict"] is True))
    finally:
        if worker is not None:
            _idle.append(worker)
    return scores


def _ask(
    worker: _Worker | None, request: dict[str, Any], seconds: float
) -> tuple[_Worker | None, dict[str, Any] | None, str]:
    """Return the worker, if it still runs, and its reply, or None and why there is none.

    A worker that dies may have been killed from outside, so a new one gets the request once more.
    """
    fault = ""
    for is_new in (False, True):
        worker = worker or (_idle.pop() if _idle and not is_new else _Worker())
        try:
            reply = worker.request(request, seconds)
        except WorkerDied as death:
            fault = f"the verifier process died twice ({death})"
            worker.close()
            worker = None
            continue
        if reply is None:
            worker.close()
            return None, None, _TOO_LONG
        return worker, reply, ""
    return None, None, fault


def _gold_text(answer: Any) -> str:
    if isinstance(answer, str) or (isinstance(answer, Real) and not isinstance(answer, bool)):
        return str(answer)
    raise ValueError(f"the data's answer {answer!r:.200} is neither text nor a number")
