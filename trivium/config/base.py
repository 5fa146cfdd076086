"""Strict configurations: what every section inherits, and how a file and arguments fill one.

A configuration is written once, in YAML, and corrected on the command line; a mistake in it must
be found before a model is loaded, and all mistakes together. The sections themselves live beside
the code that reads them, and check what their own fields mean; nothing here knows a section.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import (
    CoreSchema,
    ErrorDetails,
    InitErrorDetails,
    PydanticCustomError,
    to_jsonable_python,
)

from trivium.config.option import Option
from trivium.config.renamed import RENAMED_KEYS
from trivium.config.yaml_source import Keys, YamlSource, dotted, dump_yaml, parse_scalar, shown
from trivium.errors import ConfigurationError, one_line

_EXACT_TYPES = frozenset({"int", "float", "bool", "str"})
_NOT_SCHEMAS = frozenset({"default", "metadata", "serialization"})


def _make_exact(schema: Any) -> None:
    """Make a schema's scalars strict, which pydantic offers only along with paths and lists."""
    if isinstance(schema, list | tuple):
        for item in schema:
            _make_exact(item)
    elif isinstance(schema, dict):
        if schema.get("type") in _EXACT_TYPES:
            schema["strict"] = True
        for key, item in schema.items():
            if key not in _NOT_SCHEMAS:
                _make_exact(item)


class Configuration(BaseModel):
    """Base of every configuration section: frozen, no unknown key, no silent coercion.

    A number in quotes is not a number and 1.5 is not an integer, but an integer is a float, text
    is a path and a list is a tuple. The sentence under a field is its help. A section given in
    part keeps, for the rest, what the default of its field says.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def inputs(self) -> Iterator[Path]:
        """The files and directories that this section, and those within it, read."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            for option in field.metadata:
                if isinstance(option, Option):
                    yield from option.inputs(value)
            for item in value if isinstance(value, list | tuple) else (value,):
                if isinstance(item, Configuration):
                    yield from item.inputs()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _make_exact(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _complete_partial_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: _complete(cls.model_fields.get(name), values[name]) for name in values}

    def conflicts(self) -> Iterator[Conflict]:
        """Yield what the fields, each right by itself, cannot be together; for sections to say."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> Self:
        found = [_line_error(self, key, reason) for key, reason in self.conflicts()]
        if found:
            raise ValidationError.from_exception_data(type(self).__name__, found)
        return self


def _line_error(section: Configuration, key: str, reason: str) -> InitErrorDetails:
    value: Any = section
    for name in filter(None, key.split(".")):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    if isinstance(value, dict):
        value = list(value)  # what a mapping holds may be a secret
    error = PydanticCustomError("contradiction", "{error}", {"error": reason})
    loc = tuple(filter(None, key.split(".")))
    return InitErrorDetails(type=error, loc=loc, input=value)


Conflict = tuple[str, str]
"""The field at fault by its dotted name (empty: the section), and why, with the remedy."""
C = TypeVar("C", bound=Configuration)


def load_configuration(cls: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply `key.sub=value` arguments to it, and check the result.

    An argument's value is YAML; an entry of a list is named by its number, `rewards.0.weight=2`;
    of two arguments for the same key the last holds. Without a file the arguments are all. Sections
    that look for files learn the file's directory as `directory` in the validation context. Raises
    ConfigurationError that lists every fault with its line or argument.
    """
    source = YamlSource(None if path is None else Path(path))
    for argument in overrides:
        source.override(argument)
    faults = source.faults
    try:
        config = cls.model_validate(source.values, context={"directory": source.directory})
    except ValidationError as error:
        faults = [*faults, *_explain(error, cls, source)]
    else:
        if not faults:
            return config
    faults = [*map(one_line, faults)]
    if len(faults) == 1:
        raise ConfigurationError(faults[0])
    raise ConfigurationError("\n  - ".join([f"{source}: found {len(faults)} faults:", *faults]))


def dump(config: Configuration) -> str:
    """Return the whole configuration, defaults included, as YAML that loads to an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


# --- Sections within sections ---------------------------------------------------------------------


def sections_in(annotation: Any) -> list[type[Configuration]]:
    """Return the configuration classes that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Configuration):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def _default_of(field: FieldInfo) -> Any:
    if field.default_factory_takes_validated_data:
        return None
    return field.get_default(call_default_factory=True)


def _complete(field: FieldInfo | None, value: Any) -> Any:
    """Return a section that is given in part together with what its field's default sets."""
    if field is None or not isinstance(value, dict):
        return value
    default = _default_of(field)
    if not isinstance(default, Configuration) or sections_in(field.annotation) != [type(default)]:
        return value
    return _over(default, value)


def _over(default: Configuration, values: dict[str, Any]) -> dict[str, Any]:
    merged = {name: getattr(default, name) for name in type(default).model_fields}
    for name, value in values.items():
        inner = getattr(default, str(name), None)
        if isinstance(inner, Configuration) and isinstance(value, dict):
            value = _over(inner, value)
        merged[name] = value
    return merged


def all_fields(
    cls: type[Configuration], default: Configuration | None = None, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield the dotted name, field and default of every field, a section before its own fields.

    A list of sections is shown by its first entry. What has no default yields PydanticUndefined.
    """
    for name, field in cls.model_fields.items():
        value = _default_of(field) if default is None else getattr(default, name)
        yield prefix + name, field, value
        listed = any(get_origin(part) in (list, tuple) for part in _parts(field.annotation))
        for section in sections_in(field.annotation):
            inner = value if type(value) is section else None
            yield from all_fields(section, inner, f"{prefix}{name}." + ("0." if listed else ""))


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def sentence(field: FieldInfo) -> str:
    """Return a field's help, which for a section without one is what its class says of itself."""
    sections = sections_in(field.annotation)
    text = field.description or (sections[0].__doc__ if sections else "") or ""
    return " ".join(text.split("\n\n")[0].split())


# --- Faults ---------------------------------------------------------------------------------------

_SECTION = "a section of `key: value` lines"
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": _SECTION,
    "model_type": _SECTION,
    "none_required": "null",
    "too_short": "a list with at least one entry",
    "string_too_short": "text that is not empty",
}
_USUAL = frozenset(
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


def _explain(error: ValidationError, cls: type[Configuration], source: YamlSource) -> Iterator[str]:
    """Yield one message per wrong place; the alternatives of a union share theirs."""
    places: dict[Keys, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        keys = _keys_of(detail["loc"], source.values)
        if detail["type"] == "missing":
            keys = (*keys, detail["loc"][-1])
        elif detail["type"] == "contradiction":
            keys, written = detail["loc"], _keys_of(detail["loc"], source.values)
            if written == keys:  # shown as it was written: 0, not 0.0
                detail["input"] = _value_at(keys, source.values)
        places.setdefault(keys, []).append(detail)
    for keys, details in places.items():
        if details[0]["type"] == "too_short" and any(k[: len(keys)] == keys != k for k in places):
            continue  # pydantic does not count the entries that are wrong
        origin = source.origin(keys)
        match details[0]["type"]:
            case "missing":
                yield f"{origin}: {_missing(keys, cls)}"
            case "extra_forbidden":
                yield f"{origin}: {_unknown(keys, cls)}"
            case _:
                remedy = _remedy(details[0]["input"], details)
                if not remedy and any(detail["type"] in _USUAL for detail in details):
                    remedy = _usual(keys, cls)
                yield f"{origin}: {_wrong(keys, details)}{remedy}"


def _keys_of(loc: Sequence[int | str], values: Any) -> Keys:
    """Return the part of pydantic's location that leads through the values, without type tags."""
    keys: list[int | str] = []
    for part in loc:
        if isinstance(values, list) and part in range(len(values)):
            values = values[int(part)]
        elif isinstance(values, dict) and part in values:
            values = values[part]
        else:
            continue
        keys.append(part)
    return tuple(keys)


def _value_at(keys: Keys, values: Any) -> Any:
    for key in keys:
        values = values[key]
    return values


def _sections_at(keys: Keys, cls: type[Configuration]) -> list[type[Configuration]]:
    """Return the configuration classes that may stand at `keys` below `cls`."""
    sections = [cls]
    for key in keys:
        fields = [s.model_fields[key] for s in sections if key in s.model_fields]
        if fields:
            sections = [s for field in fields for s in sections_in(field.annotation)]
    return sections


def _missing(keys: Keys, cls: type[Configuration]) -> str:
    fields = (s.model_fields.get(keys[-1]) for s in _sections_at(keys[:-1], cls))
    helps = [sentence(field) for field in fields if field is not None]
    meaning = f" ({helps[0]})" if helps and helps[0] else ""
    return f"`{dotted(keys)}` is missing: it has no default; write a value for it{meaning}"


def _usual(keys: Keys, cls: type[Configuration]) -> str:
    """Return what a value that is out of bounds usually is, and what it means."""
    while keys and not isinstance(keys[-1], str):
        keys = keys[:-1]
    name = dotted(tuple(0 if isinstance(key, int) else key for key in keys))
    for known, field, default in all_fields(cls):
        if known == name:
            meaning = f" ({sentence(field)})" if sentence(field) else ""
            default = None if field.is_required() else to_jsonable_python(default)
            if default is None or default in ("", [], {}):
                return meaning
            return f"; the default is {shown(default)}{meaning}"
    return ""


def _unknown(keys: Keys, cls: type[Configuration]) -> str:
    renamed = RENAMED_KEYS.get(str(keys[-1]))
    if renamed is not None:
        return f"`{dotted(keys)}` is now `{dotted((*keys[:-1], renamed))}`: write that instead"
    sections = _sections_at(keys[:-1], cls)
    names = list(dict.fromkeys(name for s in sections for name in s.model_fields))
    near = difflib.get_close_matches(str(keys[-1]), names, n=1)
    everywhere = [name for name, _, _ in all_fields(cls)]
    elsewhere = [name for name in everywhere if name.split(".")[-1] == keys[-1]]
    if near:
        remedy = f"did you mean `{dotted((*keys[:-1], near[0]))}`?"
    elif elsewhere:
        remedy = f"did you mean `{elsewhere[0]}`?"
    elif names:
        remedy = f"the keys here are {', '.join(names)}"
    else:
        remedy = "remove it"
    return f"`{dotted(keys)}` is not a known key: {remedy}"


def _wrong(keys: Keys, details: Sequence[ErrorDetails]) -> str:
    value = details[0]["input"]
    reasons = list(dict.fromkeys(_reason(detail) for detail in details))
    expected = [r.removeprefix("must be ") for r in reasons if r.startswith("must be ")]
    others = [r for r in reasons if not r.startswith("must be ")]
    reason = "; ".join(([f"must be {' or '.join(expected)}"] if expected else []) + others)
    whole = isinstance(value, dict | Configuration) and details[0]["type"] not in _EXPECTED
    place = dotted(keys) if whole else f"{dotted(keys)} = {shown(value)}"
    return f"{place}: {reason}" if keys else reason


def _reason(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if "error" in context:
        return str(context["error"])
    if detail["type"] in _EXPECTED:
        return f"must be {_EXPECTED[detail['type']]}"
    if "expected" in context:
        return f"must be {context['expected']}"
    message = detail["msg"].removeprefix("Input ")
    return message.replace("should be", "must be", 1).replace("should ", "must ", 1)


def _remedy(value: Any, details: Sequence[ErrorDetails]) -> str:
    """Return what to write instead, where the value tells."""
    wanted = {detail["type"] for detail in details}
    if value is None:
        return "; write a value, or leave the key out if it has a default"
    if isinstance(value, float) and value.is_integer() and "int_type" in wanted:
        return f"; write {int(value)}"
    if isinstance(value, int | float) and wanted == {"string_type"}:
        return f'; write "{shown(value)}", in quotes'
    if isinstance(value, str) and "literal_error" in wanted:
        choices = [c for d in details for c in d.get("ctx", {}).get("expected", "").split("'")]
        near = difflib.get_close_matches(value, choices, n=1)
        return f"; did you mean {near[0]}?" if near else ""
    if isinstance(value, str) and wanted & {"int_type", "float_type", "bool_type"}:
        return (
            "" if isinstance(parse_scalar(value), str | None) else f"; write {value}, not in quotes"
        )
    return ""
