"""Properties of every command's configuration, on random values for its fields."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from trivium.commands import COMMANDS
from trivium.config.base import Configuration, dump, load_configuration
from trivium.config.yaml_source import _Loader, dump_yaml
from trivium.errors import ConfigurationError

PER_COMMAND = settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
Keys = tuple[str | int, ...]
WORDS = st.sampled_from(
    [
        "2e-5",
        "no",
        "1.5",
        "0x1F",
        "1_0",
        "a",
        "null",
        "x y",
        "é✓",
        "#1",
        "- a",
        "{a: b}",
        "'",
        "\\",
        "",
    ]
)
TEXT = WORDS | st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=6)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(TEXT.filter(bool), inner, max_size=2)
    ),
    max_leaves=3,
)


# --- Random configurations ------------------------------------------------------------------------


@cache
def command(name: str) -> tuple[type[Configuration], str]:
    """Return a command's configuration class and the example in its help."""
    return COMMANDS[name].config_class(), COMMANDS[name].example


def bounds(metadata: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        for name in ("gt", "ge", "lt", "le", "min_length"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    return found


def values_of_type(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy of values that a file may have for a field of this type."""
    origin, arguments, limits = get_origin(annotation), get_args(annotation), bounds(metadata)
    if origin is Annotated:
        inner = [
            x for a in arguments[1:] for x in (a.metadata if isinstance(a, FieldInfo) else [a])
        ]
        return values_of_type(arguments[0], [*metadata, *inner])
    if origin in (Union, UnionType):
        return st.one_of([values_of_type(part, metadata) for part in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and Ellipsis not in arguments:
        return st.tuples(*[values_of_type(part, []) for part in arguments]).map(list)
    if origin in (list, tuple):
        smallest = limits.get("min_length", 0)
        return st.lists(values_of_type(arguments[0], []), min_size=smallest, max_size=smallest + 2)
    if origin is dict:
        return st.dictionaries(TEXT.filter(bool), values_of_type(arguments[1], []), max_size=2)
    if annotation in (int, float):
        return number(annotation, limits)
    if isinstance(annotation, type) and issubclass(annotation, Configuration):
        return section(annotation)
    return {bool: st.booleans(), str: TEXT, Path: TEXT.filter(bool), NoneType: st.none()}.get(
        annotation, ANY
    )


def number(kind: type, limits: dict[str, Any]) -> st.SearchStrategy[Any]:
    low = limits.get("ge", limits.get("gt", -3))
    high = limits.get("le", limits.get("lt", low + 50))
    whole = st.integers(math.ceil(low), math.floor(high))
    return whole if kind is int else whole | st.floats(low, high) | st.sampled_from([1e-6, 3e-4])


def section(cls: type[Configuration]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {n: values_of_type(f.annotation, f.metadata) for n, f in cls.model_fields.items()}
    needed = {n: s for n, s in fields.items() if cls.model_fields[n].is_required()}
    return st.fixed_dictionaries(needed, optional={n: fields[n] for n in fields.keys() - needed})


def is_valid(cls: type[Configuration], values: Any) -> bool:
    try:
        cls.model_validate(values)
    except ValidationError:
        return False
    return True


@cache
def field_values(cls: type[Configuration], keys: Keys) -> st.SearchStrategy[Any]:
    field = dict(all_keys(cls))[keys]
    return values_of_type(field.annotation, field.metadata)


def all_keys(cls: type[Configuration], keys: Keys = ()) -> Iterator[tuple[Keys, FieldInfo]]:
    """Yield the keys of every field, through sections but not through lists, and the field."""
    for name, field in cls.model_fields.items():
        yield (*keys, name), field
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Configuration):
            yield from all_keys(annotation, (*keys, name))


def with_value(values: dict[str, Any], keys: Keys, value: Any) -> dict[str, Any]:
    """Return a copy of the values in which the key at the end of `keys` is set."""
    first, *rest = keys
    if rest:
        section = values.get(str(first))
        value = with_value(section if isinstance(section, dict) else {}, tuple(rest), value)
    return {**values, str(first): value}


@st.composite
def configurations(draw: Any, name: str) -> tuple[dict[str, Any], list[tuple[Keys, Any]]]:
    """Draw a command's example with some fields changed, still valid, and the changes."""
    cls, example = command(name)
    values = yaml.load(example, _Loader)
    known = [keys for keys, _ in all_keys(cls)]
    changed: dict[Keys, Any] = {}
    for keys in draw(st.lists(st.sampled_from(known), min_size=1, max_size=8, unique=True)):
        value = draw(field_values(cls, keys))
        overlaps = any(k[: len(keys)] == keys or keys[: len(k)] == k for k in changed)
        if not overlaps and is_valid(cls, with_value(values, keys, value)):
            values = with_value(values, keys, value)
            changed[keys] = value
    return values, list(changed.items())


# --- Properties -----------------------------------------------------------------------------------


def load(path: Path, cls: type[Configuration], values: Any, *arguments: str) -> Configuration:
    path.write_text(values if isinstance(values, str) else dump_yaml(values), encoding="utf-8")
    return load_configuration(cls, path, arguments)


def at(config: Any, keys: Keys) -> Any:
    for key in keys:
        config = getattr(config, str(key), None)
    return config


def matches(actual: Any, given: Any) -> bool:
    """Return whether a configuration has the given value: a list may be a tuple, text a path."""
    if isinstance(actual, Configuration):
        return all(matches(getattr(actual, name), value) for name, value in given.items())
    if isinstance(given, list):
        pairs = zip(actual, given, strict=True)
        return isinstance(actual, list | tuple) and all(matches(a, b) for a, b in pairs)
    if isinstance(given, dict):
        return actual.keys() == given.keys() and all(matches(actual[k], given[k]) for k in given)
    if isinstance(actual, Path):
        return isinstance(given, str) and actual == Path(given)
    if isinstance(actual, float) and type(given) is int:
        return actual == given
    return type(actual) is type(given) and actual == given


@PER_COMMAND
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_written_configuration_loads_to_an_equal_one(tmp_path: Path, name: str, data: Any) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    config = load(tmp_path / "a.yaml", cls, values)
    written = dump(config)
    again = load(tmp_path / "b.yaml", cls, written)
    assert again == config
    assert dump(again) == written


@PER_COMMAND
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_values_are_kept_as_given(tmp_path: Path, name: str, data: Any) -> None:
    cls, _ = command(name)
    values, changes = data.draw(configurations(name))
    config = load(tmp_path / "a.yaml", cls, values)
    for keys, value in changes:
        assert matches(at(config, keys), value), (keys, value, at(config, keys))


@PER_COMMAND
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_change_of_one_key_leaves_the_others_unchanged(
    tmp_path: Path, name: str, data: Any
) -> None:
    cls, example = command(name)
    values, changes = data.draw(configurations(name))
    before, after = (load(tmp_path / "a.yaml", cls, v) for v in (example, values))
    changed = [keys for keys, _ in changes]
    for keys, _ in all_keys(cls):
        if any(k[: len(keys)] == keys or keys[: len(k)] == k for k in changed):
            continue
        sections = at(before, keys[:-1]), at(after, keys[:-1])
        if all(isinstance(section, Configuration) for section in sections):
            assert at(after, keys) == at(before, keys), keys


@PER_COMMAND
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_equal_the_same_keys_in_the_file(tmp_path: Path, name: str, data: Any) -> None:
    cls, example = command(name)
    values, changes = data.draw(configurations(name))
    arguments = [
        f"{'.'.join(map(str, keys))}={json.dumps(value, ensure_ascii=False)}"
        for keys, value in changes
    ]
    order = data.draw(st.permutations(arguments))
    expected = load(tmp_path / "a.yaml", cls, values)
    assert load(tmp_path / "b.yaml", cls, yaml.load(example, _Loader), *order) == expected


def line_of(text: str, keys: Keys) -> int:
    """Return the line of the key according to PyYAML's own parser."""
    node, line = yaml.compose(text), 0
    for key in keys:
        pairs = {k.value: (k, v) for k, v in node.value}  # type: ignore[union-attr]
        key_node, node = pairs[str(key)]
        line = key_node.start_mark.line + 1
    return line


def only_fault(path: Path, cls: type[Configuration], values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(path, cls, values)
    assert "\n" not in str(caught.value), "one wrong key gives one fault"
    return str(caught.value)


@PER_COMMAND
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_key_is_one_fault_that_names_the_key_and_line(
    tmp_path: Path, name: str, data: Any
) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    known = [keys for keys, _ in all_keys(cls)]
    sibling = data.draw(
        st.sampled_from([k for k in known if isinstance(_value_at(values, k[:-1]), dict)])
    )
    key = data.draw(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=12))
    keys = (*sibling[:-1], key)
    assume(keys not in known and is_valid(cls, values))
    values = with_value(values, keys, data.draw(ANY))
    message = only_fault(tmp_path / "a.yaml", cls, values)
    place = f"{tmp_path / 'a.yaml'}:{line_of(dump_yaml(values), keys)}: "
    assert message.startswith(f"{place}`{'.'.join(map(str, keys))}` is not a known key")


def _value_at(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


OTHER_TYPES = [True, "3", 3.0, 1, "true", 3, 2.5, "text", [1], ["1"], None, math.inf]
TYPE_ERRORS = {
    "int_type",
    "float_type",
    "bool_type",
    "string_type",
    "path_type",
    "list_type",
    "dict_type",
}
TYPE_ERRORS |= {"tuple_type", "model_type", "literal_error", "none_required", "finite_number"}


@settings(PER_COMMAND, max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_value_of_another_type_is_kept_as_given_or_is_one_fault_at_its_line(
    tmp_path: Path, name: str, data: Any
) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    keys, _ = data.draw(st.sampled_from(list(all_keys(cls))))
    new_value = data.draw(st.sampled_from(OTHER_TYPES))
    values = with_value(values, keys, new_value)
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        assume({detail["type"] for detail in error.errors()} <= TYPE_ERRORS)
        # Skip faults of list entries, which have their own location; a union adds type tags.
        assume({tuple(d["loc"])[: len(keys)] for d in error.errors()} == {keys})
        assume(not any(isinstance(d["loc"][-1], int) for d in error.errors()))
    else:
        assert matches(at(config, keys), new_value)
        return
    message = only_fault(tmp_path / "a.yaml", cls, values)
    assert message.startswith(f"{tmp_path / 'a.yaml'}:{line_of(dump_yaml(values), keys)}: ")
    assert ".".join(map(str, keys)) in message
    assert "must be" in message


@PER_COMMAND
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_all_faults_are_reported_together(tmp_path: Path, name: str, data: Any) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    keys = data.draw(st.lists(st.sampled_from("zzq zzr zzs zzt".split()), min_size=2, unique=True))
    text = dump_yaml(values) + "".join(f"{key}: 1\n" for key in keys)
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path / "a.yaml", cls, text)
    first, *faults = str(caught.value).split("\n  - ")
    assert first == f"{tmp_path / 'a.yaml'}: found {len(keys)} faults:"
    assert [fault.split("`")[1] for fault in faults] == keys
