"""Worker process for `math-verify`: one JSON request per line, one JSON reply per line.

A response is untrusted text. To compare it with the answer, SymPy may compute a number that fills
the memory, or stay in one C call that no thread and no signal can interrupt. `math-verify` limits
its time with SIGALRM, which works only in a main thread. It therefore runs in the main thread of a
process that ``math`` can kill. The script imports nothing from Trivium, because that import takes
longer than a thousand verifications.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TextIO

MEMORY_LIMIT = 4 << 30


class Verifier:
    """`math-verify` with one extraction setting for answers and responses, and cached answers."""

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
        """Return whether the response's answer equals `answer`; None if `answer` is unreadable.

        `answer` is LaTeX in one ``\\boxed{…}``, the form that `math-verify` parses best.
        """
        gold = self._answer(answer, seconds)
        if not gold:
            return None
        if self._boxed and "\\boxed" not in response:
            return False
        parsed = self._parse(response, seconds)
        return bool(parsed) and self._library.verify(gold, parsed, timeout_seconds=seconds)


class _WarningRecorder(logging.Handler):
    """Handler that records warnings of the library, which warns only of exceeded time limits."""

    has_warning = False

    def emit(self, record: logging.LogRecord) -> None:
        self.has_warning = self.has_warning or record.levelno >= logging.WARNING


def serve(requests: TextIO, reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until the input ends."""
    try:
        verifiers = {boxed: Verifier(boxed) for boxed in (False, True)}
    except ImportError as error:
        reply({"error": f"math-verify cannot be imported: {error}"})
        return
    recorder = _WarningRecorder()
    logging.getLogger("math_verify").addHandler(recorder)
    reply({"ready": True})
    for line in requests:
        request = json.loads(line)
        recorder.has_warning = False
        verifier = verifiers[request["boxed"]]
        verdict = verifier.verdict(request["answer"], request["response"], request["seconds"])
        reply({"verdict": verdict, "out_of_time": recorder.has_warning})


def limit_memory() -> None:
    """Limit the memory of this process, so that a huge answer fails with a MemoryError."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):
        return


def main() -> None:
    """Serve on standard input and output; send the library's own prints to standard error."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    limit_memory()
    serve(sys.stdin, reply)


if __name__ == "__main__":
    main()
