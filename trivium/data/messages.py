"""Helpers for error messages about data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_MAX_SHOWN = 60


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, or None if no known name is close."""
    return next(iter(difflib.get_close_matches(name, [*map(str, known)], n=1)), None)


def shortened(value: Any) -> str:
    """Return the value's repr, shortened to fit into a message."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def first_line(error: Exception) -> str:
    """Return the first line of the error's message, or the error's type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
