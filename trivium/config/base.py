"""Base class of all configuration sections, and loading one from a YAML file and arguments.

A configuration is one YAML file, which `key=value` arguments override. All mistakes in it are
reported together, before a model is loaded. The sections themselves are defined beside the code
that uses them and validate their own fields; this module knows no particular section.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import (
    CoreSchema,
    ErrorDetails,
    InitErrorDetails,
    PydanticCustomError,
    to_jsonable_python,
)

from trivium.config.option import DefaultByChoice, Option
from trivium.config.renamed import RENAMED_KEYS
from trivium.config.value_errors import EXPECTED, SHOW_DEFAULT, reason_of, suggestion
from trivium.config.yaml_source import Keys, YamlSource, dotted, dump_yaml, format_value
from trivium.errors import ConfigurationError, one_line

_SCALAR_TYPES = frozenset({"int", "float", "bool", "str"})
_NON_SCHEMA_KEYS = frozenset({"default", "metadata", "serialization"})


def _make_scalars_strict(schema: Any) -> None:
    """Turn on strict mode for the schema's scalars alone; pydantic's own applies to lists too."""
    if isinstance(schema, list | tuple):
        for item in schema:
            _make_scalars_strict(item)
    elif isinstance(schema, dict):
        if schema.get("type") in _SCALAR_TYPES:
            schema["strict"] = True
        for key, item in schema.items():
            if key not in _NON_SCHEMA_KEYS:
                _make_scalars_strict(item)


class Configuration(BaseModel):
    """Base of every configuration section: frozen, no unknown key, no silent coercion.

    A quoted number is not a number and 1.5 is not an integer. An integer is accepted as a float,
    text as a path, and a list as a tuple. The docstring under a field is its help text. A section
    that sets some of its keys takes the others from the default of its field.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    is_template: ClassVar[bool] = False
    """Whether paths may hold ``${…}``, so that they cannot be checked before it is filled in."""

    def inputs(self) -> Iterator[Path]:
        """Yield the files and directories that this section and its subsections read."""
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
        _make_scalars_strict(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _fill_partial_sections(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: _fill_from_default(cls.model_fields.get(name), values[name]) for name in values
        }

    def conflicts(self) -> Iterator[Conflict]:
        """Yield the fields whose values are valid alone but not together. Sections override it."""
        yield from ()

    @model_validator(mode="after")
    def _raise_conflicts(self) -> Self:
        errors = [_conflict_error(self, key, reason) for key, reason in self.conflicts()]
        if errors:
            raise ValidationError.from_exception_data(type(self).__name__, errors)
        return self


def _conflict_error(section: Configuration, key: str, reason: str) -> InitErrorDetails:
    value: Any = section
    for name in filter(None, key.split(".")):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    if isinstance(value, dict):
        value = list(value)  # keys only: the values may be secrets
    error = PydanticCustomError("conflict", "{error}", {"error": reason})
    loc = tuple(filter(None, key.split(".")))
    return InitErrorDetails(type=error, loc=loc, input=value)


Conflict = tuple[str, str]
"""Dotted name of the field (empty for the whole section), and the reason with the remedy."""
ConfigurationT = TypeVar("ConfigurationT", bound=Configuration)


def load_configuration(
    cls: type[ConfigurationT], path: Path | None, overrides: Sequence[str] = ()
) -> ConfigurationT:
    """Read a YAML file, apply `key.sub=value` arguments to it, and validate the result.

    An argument's value is YAML. A list entry is addressed by its index, as in
    `rewards.0.weight=2`. If two arguments set the same key, the last one wins. If `path` is None,
    the arguments are the whole configuration. The validation context holds the file's directory as
    `directory`, for sections that look for files.

    Raises:
        ConfigurationError: lists every fault with its line or argument.
    """
    source = YamlSource(None if path is None else Path(path))
    for argument in overrides:
        source.override(argument)
    faults = source.faults
    try:
        config = cls.model_validate(source.values, context={"directory": source.directory})
    except ValidationError as error:
        faults = [*faults, *validation_messages(error, cls, source.values, source.origin)]
    else:
        if not faults:
            return config
    faults = [*map(one_line, faults)]
    if len(faults) == 1:
        raise ConfigurationError(faults[0])
    raise ConfigurationError("\n  - ".join([f"{source}: found {len(faults)} faults:", *faults]))


def dump(config: Configuration) -> str:
    """Return the configuration as YAML, defaults included. It loads to an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


# --- Sections within sections ---------------------------------------------------------------------


def sections_of(config: Configuration, name: str = "") -> Iterator[tuple[str, Configuration]]:
    """Yield the configuration and all sections in it, with their dotted names."""
    yield name, config
    for field in type(config).model_fields:
        value, dotted_name = getattr(config, field), f"{name}.{field}" if name else field
        if isinstance(value, Configuration):
            yield from sections_of(value, dotted_name)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Configuration):
                    yield from sections_of(item, f"{dotted_name}.{index}")


def sections_in(annotation: Any) -> list[type[Configuration]]:
    """Return the configuration classes that occur in a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, Configuration):
        return [annotation]
    return [section for member in get_args(annotation) for section in sections_in(member)]


def _default_value(field: FieldInfo) -> Any:
    if isinstance(field.default_factory, DefaultByChoice):
        return field.default_factory.otherwise
    if field.default_factory_takes_validated_data:
        return None
    return field.get_default(call_default_factory=True)


def _fill_from_default(field: FieldInfo | None, value: Any) -> Any:
    """Return a partial section with its missing keys taken from the field's default."""
    if field is None or not isinstance(value, dict):
        return value
    default = _default_value(field)
    if not isinstance(default, Configuration) or sections_in(field.annotation) != [type(default)]:
        return value
    return _merge(default, value)


def _merge(default: Configuration, values: dict[str, Any]) -> dict[str, Any]:
    merged = {name: getattr(default, name) for name in type(default).model_fields}
    for name, value in values.items():
        inner = getattr(default, str(name), None)
        if isinstance(inner, Configuration) and isinstance(value, dict):
            value = _merge(inner, value)
        merged[name] = value
    return merged


def all_fields(
    cls: type[Configuration], default: Configuration | None = None, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, Any]]:
    """Yield the dotted name, field and default of every field, a section before its own fields.

    A list of sections is represented by its entry 0. A field without a default yields
    PydanticUndefined.
    """
    for name, field in cls.model_fields.items():
        value = _default_value(field) if default is None else getattr(default, name)
        yield prefix + name, field, value
        types = _union_members(field.annotation)
        is_list = any(get_origin(member) in (list, tuple) for member in types)
        for section in sections_in(field.annotation):
            inner = value if type(value) is section else None
            yield from all_fields(section, inner, f"{prefix}{name}." + ("0." if is_list else ""))


def _union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def help_text(field: FieldInfo) -> str:
    """Return a field's help text. A section without one uses its class docstring."""
    sections = sections_in(field.annotation)
    text = field.description or (sections[0].__doc__ if sections else "") or ""
    return " ".join(text.split("\n\n")[0].split())


# --- Error messages -------------------------------------------------------------------------------


def validation_messages(
    error: ValidationError, cls: type[Configuration], values: Any, origin: Callable[[Keys], str]
) -> Iterator[str]:
    """Yield one message per key at fault; the errors of a union's members are merged.

    Args:
        error: what the validation of ``values`` as a ``cls`` raised.
        origin: returns where the value at some keys was written.
    """
    places: dict[Keys, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":
            continue  # a default that depends on another field follows from that field's fault
        keys = _input_keys(detail["loc"], values)
        if detail["type"] == "missing":
            keys = (*keys, detail["loc"][-1])
        elif detail["type"] == "conflict":
            keys, written = detail["loc"], _input_keys(detail["loc"], values)
            if written == keys:  # show the value as the file has it: 0, not 0.0
                detail["input"] = _value_at(keys, values)
        places.setdefault(keys, []).append(detail)
    for keys, details in places.items():
        if details[0]["type"] == "too_short" and any(k[: len(keys)] == keys != k for k in places):
            continue  # pydantic counts valid entries only, so this follows from another error
        where = origin(keys)
        match details[0]["type"]:
            case "missing":
                yield f"{where}: {_missing_message(keys, cls)}"
            case "extra_forbidden":
                yield f"{where}: {_unknown_key_message(keys, cls)}"
            case _:
                hint = suggestion(details[0]["input"], details)
                if not hint and any(detail["type"] in SHOW_DEFAULT for detail in details):
                    hint = _default_and_help(keys, cls)
                yield f"{where}: {_wrong_value_message(keys, details)}{hint}"


def _input_keys(loc: Sequence[int | str], values: Any) -> Keys:
    """Return pydantic's location without its type tags: the keys that exist in the values."""
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
    """Return the configuration classes that may be at `keys` below `cls`."""
    sections = [cls]
    for key in keys:
        fields = [s.model_fields[key] for s in sections if key in s.model_fields]
        if fields:
            sections = [s for field in fields for s in sections_in(field.annotation)]
    return sections


def _missing_message(keys: Keys, cls: type[Configuration]) -> str:
    fields = (s.model_fields.get(keys[-1]) for s in _sections_at(keys[:-1], cls))
    helps = [help_text(field) for field in fields if field is not None]
    meaning = f" ({helps[0]})" if helps and helps[0] else ""
    return f"`{dotted(keys)}` is missing: it has no default; write a value for it{meaning}"


def _default_and_help(keys: Keys, cls: type[Configuration]) -> str:
    """Return the default and the help text of the field at `keys`, as a message's ending."""
    while keys and not isinstance(keys[-1], str):
        keys = keys[:-1]
    name = dotted(tuple(0 if isinstance(key, int) else key for key in keys))
    for field_name, field, default in all_fields(cls):
        if field_name == name:
            meaning = f" ({help_text(field)})" if help_text(field) else ""
            default = None if field.is_required() else to_jsonable_python(default)
            if default is None or default in ("", [], {}):
                return meaning
            return f"; the default is {format_value(default)}{meaning}"
    return ""


def _unknown_key_message(keys: Keys, cls: type[Configuration]) -> str:
    sections = _sections_at(keys[:-1], cls)
    names = list(dict.fromkeys(name for s in sections for name in s.model_fields))
    everywhere = [name for name, _, _ in all_fields(cls)]
    new_name = _new_name(keys, names, everywhere)
    if new_name is not None:
        return f"`{dotted(keys)}` is now `{new_name}`: write that instead"
    near = difflib.get_close_matches(str(keys[-1]), names, n=1)
    near = near or [name for name in names if name.startswith(f"{keys[-1]}_")]
    elsewhere = [name for name in everywhere if name.split(".")[-1] == keys[-1]]
    if near:
        hint = f"did you mean `{dotted((*keys[:-1], near[0]))}`?"
    elif elsewhere:
        hint = f"did you mean `{elsewhere[0]}`?"
    elif names:
        hint = f"the keys here are {', '.join(names)}"
    else:
        hint = "remove it"
    return f"`{dotted(keys)}` is not a known key: {hint}"


def _new_name(keys: Keys, names: Sequence[str], everywhere: Sequence[str]) -> str | None:
    """Return the current dotted name of a renamed key, or None if it has none here.

    The same section (`names`) is searched first. A key that is still in use in another section of
    the configuration (`everywhere`) counts as misplaced, not as renamed.
    """
    renamed = RENAMED_KEYS.get(str(keys[-1]))
    if renamed in names:
        return dotted((*keys[:-1], renamed))
    last_parts = [name.split(".")[-1] for name in everywhere]
    if renamed not in last_parts or keys[-1] in last_parts:
        return None
    return everywhere[last_parts.index(renamed)]


def _wrong_value_message(keys: Keys, details: Sequence[ErrorDetails]) -> str:
    value = details[0]["input"]
    reasons = list(dict.fromkeys(reason_of(detail) for detail in details))
    expected = [r.removeprefix("must be ") for r in reasons if r.startswith("must be ")]
    others = [r for r in reasons if not r.startswith("must be ")]
    reason = "; ".join(([f"must be {' or '.join(expected)}"] if expected else []) + others)
    is_section = isinstance(value, dict | Configuration) and details[0]["type"] not in EXPECTED
    place = dotted(keys) if is_section else f"{dotted(keys)} = {format_value(value)}"
    return f"{place}: {reason}" if keys else reason
