"""Checked text, and helpers for error messages about data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from trivium.errors import DataError

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


def checked_text(value: Any, label: str) -> str:
    """Return `value`; raise DataError, which calls it `label`, if it is not valid Unicode text."""
    if not isinstance(value, str):
        raise DataError(
            f"{label} is {shortened(value)} ({type(value).__name__}), not text; put it in quotes "
            "or name another column"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{label} contains half of a surrogate pair at character {error.start}, which is not "
            "text; repair the escape (\\ud8.. to \\udf..) in the file"
        ) from None
    return value
