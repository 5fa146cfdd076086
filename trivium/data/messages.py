"""How messages about data show what they are about."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_LONGEST_SHOWN = 60


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, if one is close."""
    return next(iter(difflib.get_close_matches(name, [*map(str, known)], n=1)), None)


def shortened(value: Any) -> str:
    """Return the value as a message can show it."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
