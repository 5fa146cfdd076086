"""Check of what a reward function returns for one response: a number, steps or nothing."""

from __future__ import annotations

import math
import operator
from decimal import Decimal
from numbers import Real
from typing import Any

from trivium.config.functions import printable

Step = tuple[int, float]  # end of the step in the response's text, and its value
Value = float | list[Step] | None
"""A response's value: a number, its steps, or None where the reward does not apply to it."""


def _to_float(value: Any) -> float:
    """Return a value as a finite float, or raise ValueError with the reason."""
    try:
        if callable(getattr(value, "tolist", None)) and getattr(value, "ndim", 0) == 0:
            value = value.tolist()
        number = float(value) if isinstance(value, Real | Decimal) else None
    except OverflowError:
        raise ValueError("is too large a number") from None
    except Exception as error:
        raise ValueError(
            f"is {describe_value(value)}, which raises {type(error).__name__}"
        ) from None
    if number is None:
        raise ValueError(f"is {describe_value(value)}, not a number")
    if not math.isfinite(number):
        raise ValueError(f"is {number}, not a finite number")
    return number


def describe_value(value: Any, limit: int = 60) -> str:
    """Return a value's type and the start of its repr, also if its ``__repr__`` raises."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"(its repr raises {type(error).__name__})"
    return f"{type(value).__name__} {printable(text, limit)}"


def _to_index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _check_step(entry: Any, previous_end: int, text_length: int) -> tuple[int, float]:
    """Return the end and the value of a step, or raise ValueError with the reason."""
    try:
        (start, end), value = entry
        start, end = _to_index(start), _to_index(end)
    except Exception:
        raise ValueError(f"is {describe_value(entry)}, not ((start, end), number)") from None
    if end <= start:
        raise ValueError(f"has the span ({start}, {end}), which is empty: end must be after start")
    if start < 0 or end > text_length:
        raise ValueError(
            f"has the span ({start}, {end}), outside the response's {text_length} characters"
        )
    if start < previous_end:
        raise ValueError(
            f"has the span ({start}, {end}), which begins before the end of the previous step "
            f"({previous_end}): steps must be in order and must not overlap"
        )
    return end, _to_float(value)


def check_value(value: Any, text: str) -> Value:
    """Check a function's value for one response; return a number, a list of steps or None.

    Raises ValueError with a reason that follows "response 3 of 8 …" in the message.
    """
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        try:
            return _to_float(value)
        except ValueError as error:
            raise ValueError(f"its value {error}") from None
    results: list[Step] = []
    for index, entry in enumerate(value):
        try:
            results.append(_check_step(entry, results[-1][0] if results else 0, len(text)))
        except ValueError as error:
            raise ValueError(f"step {index} {error}") from None
    return results
