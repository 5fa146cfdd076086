"""The process in which `math-verify` runs: one JSON request a line, one JSON reply a line.

A response is untrusted text. To compare it with the answer, SymPy may compute a number that fills
the memory, or sit in one C call that no thread and no signal can interrupt, and `math-verify`
guards itself with SIGALRM, which works on a main thread only. So it gets a main thread, and a
process that ``math`` can end. It is run as a script and imports nothing of Trivium, because
importing that takes longer than the verifier needs for a thousand answers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TextIO

MEMORY_LIMIT = 4 << 30
_DELIMITED = re.compile(r"\s*(?:\$\$?(.*?)\$\$?|\\\((.*)\\\)|\\\[(.*)\\\])\s*", re.DOTALL)


def as_boxed(answer: str) -> str:
    r"""Return a data row's answer in the form that `math-verify` reads best, ``\boxed{…}``.

    Accepts a bare expression, one between ``$``, or a solution that ends in ``#### …`` or holds a
    ``\boxed{…}``, of which the last counts.
    """
    if "\\boxed" in answer:
        return answer[answer.rindex("\\boxed") :]
    final = answer.rpartition("####")[2].strip()
    delimited = _DELIMITED.fullmatch(final)
    inner = next((g for g in delimited.groups() if g is not None), "") if delimited else final
    inner = re.sub(r"(?<!\\)[%$]", r"\\\g<0>", inner.strip())
    return f"\\boxed{{{inner}}}" if inner else ""


class Verifier:
    """`math-verify` with one extraction setting for answers and responses, and answers cached."""

    def __init__(self, boxed: bool) -> None:
        import math_verify

        latex = math_verify.LatexExtractionConfig(
            try_extract_without_anchor=not boxed, boxed_match_priority=0 if boxed else 50
        )
        self._configs = [latex] if boxed else [latex, math_verify.ExprExtractionConfig()]
        self._boxed = boxed
        self._library = math_verify
        self._answer = lru_cache(maxsize=1 << 16)(self._parse)

    def _parse(self, text: str, seconds: int) -> list[Any]:
        return self._library.parse(text, self._configs, parsing_timeout=seconds)

    def verdict(self, answer: str, response: str, seconds: int) -> bool | None:
        """Return whether the response's answer equals `answer`; None: `answer` is unreadable."""
        gold = self._answer(as_boxed(answer), seconds)
        if not gold:
            return None
        if self._boxed and "\\boxed" not in response:
            return False
        found = self._parse(response, seconds)
        return bool(found) and self._library.verify(gold, found, timeout_seconds=seconds)


class _Warned(logging.Handler):
    """Notes that the library warned; the one thing it warns of is a time limit that ran out."""

    seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen = self.seen or record.levelno >= logging.WARNING


def serve(requests: TextIO, reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until the other side closes."""
    try:
        verifiers = {boxed: Verifier(boxed) for boxed in (False, True)}
    except ImportError as error:
        reply({"error": f"math-verify cannot be imported: {error}"})
        return
    warned = _Warned()
    logging.getLogger("math_verify").addHandler(warned)
    reply({"ready": True})
    for line in requests:
        asked = json.loads(line)
        warned.seen = False
        verifier = verifiers[asked["boxed"]]
        verdict = verifier.verdict(asked["answer"], asked["response"], asked["seconds"])
        reply({"verdict": verdict, "out_of_time": warned.seen})


def limit_memory() -> None:
    """Let an answer too large for memory fail here, not take the machine's memory with it."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):
        return


def main() -> None:
    """Serve on standard input and output, which parsers' own prints must not reach."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    limit_memory()
    serve(sys.stdin, reply)


if __name__ == "__main__":
    main()
