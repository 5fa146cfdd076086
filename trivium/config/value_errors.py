"""Wording of pydantic's errors about one value: what was expected, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from trivium.config.yaml_source import format_value, parse_scalar

_SECTION_FORM = "a section of `key: value` lines"
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": _SECTION_FORM,
    "model_type": _SECTION_FORM,
    "none_required": "null",
    "too_short": "a list with at least one entry",
    "string_too_short": "text that is not empty",
}
"""Expected value by the type of pydantic's error."""

SHOW_DEFAULT = frozenset(
    {
        "greater_than",
        "greater_than_equal",
        "less_than",
        "less_than_equal",
        "too_short",
        "string_too_short",
        "string_pattern_mismatch",
        "too_long",
        "int_type",
        "float_type",
        "bool_type",
        "finite_number",
    }
)
"""Types of error whose message ends with the field's default and help text."""


def reason_of(detail: ErrorDetails) -> str:
    """Return why pydantic rejected a value, as a phrase that follows the value."""
    context = detail.get("ctx", {})
    if "error" in context:
        return str(context["error"])
    if detail["type"] in EXPECTED:
        return f"must be {EXPECTED[detail['type']]}"
    if "expected" in context:
        return f"must be {context['expected']}"
    message = detail["msg"].removeprefix("Input ")
    return message.replace("should be", "must be", 1).replace("should ", "must ", 1)


def suggestion(value: Any, details: Sequence[ErrorDetails]) -> str:
    """Return what to write instead, as a message's ending, if the value shows what was meant."""
    types = {detail["type"] for detail in details}
    if value is None:
        return "; write a value, or leave the key out if it has a default"
    if isinstance(value, float) and value.is_integer() and "int_type" in types:
        return f"; write {int(value)}"
    if isinstance(value, int | float) and types == {"string_type"}:
        return f'; write "{format_value(value)}", in quotes'
    if isinstance(value, str) and "literal_error" in types:
        choices = [c for d in details for c in d.get("ctx", {}).get("expected", "").split("'")]
        near = difflib.get_close_matches(value, choices, n=1)
        return f"; did you mean {near[0]}?" if near else ""
    if isinstance(value, str) and types & {"int_type", "float_type", "bool_type"}:
        is_text = isinstance(parse_scalar(value), str | None)
        return "" if is_text else f"; write {value}, not in quotes"
    return ""
