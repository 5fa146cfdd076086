"""Reference of a configuration's fields, as ``trivium COMMAND --fields`` prints it.

The reference gives the name, type, default and help text of every field. Validation is left to
``config.base``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from trivium.config.base import Configuration, all_fields, help_text, sections_in
from trivium.config.option import Option
from trivium.config.yaml_source import format_value

_TYPE_NAMES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    NoneType: "null",
    Any: "any value",
}
_BOUNDS = {
    "gt": ">",
    "ge": ">=",
    "lt": "<",
    "le": "<=",
    "min_length": "of length >=",
    "max_length": "of length <=",
}


def describe(cls: type[Configuration]) -> str:
    """Return a reference of all fields: argument name, type, default and help text."""
    return "\n".join(_field_entry(*field) for field in all_fields(cls))


def _field_entry(name: str, field: FieldInfo, default: Any) -> str:
    options = [item.describe() for item in field.metadata if isinstance(item, Option)]
    kind = options[0] if options else _type_name(field.annotation)
    null = " or null" if kind.endswith(" or null") else ""
    text = f"{name}: {kind.removesuffix(null)}{_bounds(field.metadata)}{null}"
    if field.is_required():
        text += ", required"
    elif not isinstance(default, Configuration):
        text += f", default {format_value(to_jsonable_python(default))}"
    return "\n    ".join(part for part in (text, help_text(field)) if part)


def _type_name(annotation: Any) -> str:
    """Return a type in plain words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        details = [x.metadata if isinstance(x, FieldInfo) else [x] for x in arguments[1:]]
        return _type_name(arguments[0]) + _bounds([item for part in details for item in part])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    names = [_type_name(part) for part in arguments if part is not Ellipsis]
    if origin in (Union, UnionType):
        return " or ".join(names)
    if origin is tuple and Ellipsis not in arguments:
        return f"list of {len(names)}: {', '.join(names)}"
    if origin in (list, tuple):
        return f"list of {names[0]}"
    if origin is dict:
        return f"mapping from {names[0]} to {names[1]}"
    if sections_in(annotation):
        return "section"
    return _TYPE_NAMES.get(annotation) or str(annotation.__name__)


def _bounds(metadata: Sequence[Any]) -> str:
    found = [
        f"{sign} {getattr(item, name)}"
        for item in metadata
        for name, sign in _BOUNDS.items()
        if getattr(item, name, None) is not None
    ]
    return f" {' and '.join(found)}" if found else ""
