"""Structured inputs from a fuzzer's bytes: numbers, texts, JSON values, rows of data.

Every byte string gives a valid input. A fuzzer that only mutates bytes can therefore change one
part of a row and keep the rest, and a finding is a file that can be replayed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

WORDS = [
    *("", " ", "\n", "a", "the answer is 4.", "Step 1: 31+9=40.", "é✓", "\u2028", "\ufeff", "\0"),
    *("\x1b[31m", "\ud800", "\udfff", "\U0001f600", "{", "}", "{{", "{question}", "{prompt}"),
    *("<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n\nAssistant:", "\n\nHuman: hi", "\r"),
]
NUMBERS = [0, 1, -1, 0.5, 1.0, -0.0, 2**63, -(2**64), 10**400, 1e308, 5e-324]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
ROLES = ["user", "assistant", "system", "tool", "", "\x1b"]
COLUMNS = ["prompt", "completion", "messages", "text", "chosen", "rejected", "completions"]
COLUMNS += ["labels", "question", "answer", "Prompt", "a\nb", "\x1b[1m", "", "{x}"]

_DEEP_KEY = "(nested lists)"
_DEEP_PATTERN = re.compile(rf'\{{"{re.escape(_DEEP_KEY)}": (\d+)\}}')


class Feed:
    """Choices determined by the bytes, in order. After the last byte, every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1] if self._position <= len(self._data) else 0

    def below(self, count: int) -> int:
        return self.byte() % count

    def chance(self, out_of_256: int) -> bool:
        return self.byte() > 255 - out_of_256

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def rest(self) -> bytes:
        rest, self._position = self._data[self._position :], len(self._data)
        return rest

    def text(self) -> str:
        """Return a few words, or raw characters."""
        if self.chance(64):
            raw = bytes(self.byte() for _ in range(self.below(20)))
            return raw.decode("utf-8", "surrogateescape")
        return "".join(self.pick(WORDS) for _ in range(1 + self.below(4)))

    def scalar(self) -> Any:
        kind = self.below(8)
        if kind < 4:
            return self.text()
        return (None, True, False)[self.below(3)] if kind < 6 else self.pick(NUMBERS)

    def value(self, depth: int = 3) -> Any:
        """Return any JSON value, sometimes a very deeply nested one."""
        kind = self.below(16)
        if kind == 15:
            return {_DEEP_KEY: 1 + self.byte() * 4}
        if depth == 0 or kind < 8:
            return self.scalar()
        if kind < 12:
            return [self.value(depth - 1) for _ in range(self.below(4))]
        return {self.pick([*COLUMNS, "role", "content"]): self.value(depth - 1) for _ in range(2)}

    def messages(self) -> Any:
        """Return a chat that is mostly well formed."""
        chat = []
        for _ in range(self.below(5)):
            message = {"role": self.pick(ROLES[:2]), "content": self.text()}
            if self.chance(32):
                message["role"] = self.pick(ROLES)
            if self.chance(32):
                message[self.pick(["role", "content", "tool_calls", "x"])] = self.value()
            chat.append(message if self.chance(240) else self.value())
        return chat

    def row(self, columns: Sequence[str]) -> Any:
        """Return a row of these columns, mostly of valid types, sometimes with extra columns."""
        row = {name: self._column_value(name) for name in columns if self.chance(240)}
        while self.chance(64):
            row[self.pick(COLUMNS)] = self.value()
        return row if self.chance(250) else self.value()

    def _column_value(self, name: str) -> Any:
        if self.chance(24):
            return self.value()
        if name == "completions":
            return [self.text() for _ in range(self.below(4))]
        if name == "labels":
            return [self.pick([True, False, 0.5, 1, *NUMBERS]) for _ in range(self.below(4))]
        if name == "messages" or (name != "text" and self.chance(64)):
            return self.messages()
        return self.text()


def to_json(row: Any) -> str:
    """Return the row as JSON, with the deeply nested lists written out."""

    def nested(match: re.Match[str]) -> str:
        return "[" * int(match[1]) + "]" * int(match[1])

    return _DEEP_PATTERN.sub(nested, json.dumps(row))
