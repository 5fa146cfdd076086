"""Every command's configuration, drawn from its fields: what is written is what is meant."""

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

EACH = settings(
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


# --- drawing configurations -----------------------------------------------------------------------


@cache
def command(name: str) -> tuple[type[Configuration], str]:
    """A command's configuration class and the example that its help shows."""
    return COMMANDS[name].config_class(), COMMANDS[name].example


def bounds(metadata: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        for name in ("gt", "ge", "lt", "le", "min_length"):
            if getattr(item, name, None) is not None:
                found[name] = getattr(item, name)
    return found


def of_type(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values as a file may give them for a field of this type."""
    origin, arguments, limits = get_origin(annotation), get_args(annotation), bounds(metadata)
    if origin is Annotated:
        inner = [
            x for a in arguments[1:] for x in (a.metadata if isinstance(a, FieldInfo) else [a])
        ]
        return of_type(arguments[0], [*metadata, *inner])
    if origin in (Union, UnionType):
        return st.one_of([of_type(part, metadata) for part in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and Ellipsis not in arguments:
        return st.tuples(*[of_type(part, []) for part in arguments]).map(list)
    if origin in (list, tuple):
        smallest = limits.get("min_length", 0)
        return st.lists(of_type(arguments[0], []), min_size=smallest, max_size=smallest + 2)
    if origin is dict:
        return st.dictionaries(TEXT.filter(bool), of_type(arguments[1], []), max_size=2)
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
    fields = {n: of_type(f.annotation, f.metadata) for n, f in cls.model_fields.items()}
    needed = {n: s for n, s in fields.items() if cls.model_fields[n].is_required()}
    return st.fixed_dictionaries(needed, optional={n: fields[n] for n in fields.keys() - needed})


def is_valid(cls: type[Configuration], values: Any) -> bool:
    try:
        cls.model_validate(values)
    except ValidationError:
        return False
    return True


@cache
def drawn(cls: type[Configuration], keys: Keys) -> st.SearchStrategy[Any]:
    field = dict(places(cls))[keys]
    return of_type(field.annotation, field.metadata)


def places(cls: type[Configuration], keys: Keys = ()) -> Iterator[tuple[Keys, FieldInfo]]:
    """Every field, by the keys that lead to it through sections, but not through lists."""
    for name, field in cls.model_fields.items():
        yield (*keys, name), field
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Configuration):
            yield from places(annotation, (*keys, name))


def put(values: dict[str, Any], keys: Keys, value: Any) -> dict[str, Any]:
    """The values with one more, in the section that the keys lead to."""
    first, *rest = keys
    held = values.get(str(first))
    inner = value if not rest else put(held if isinstance(held, dict) else {}, tuple(rest), value)
    return {**values, str(first): inner}


@st.composite
def configurations(draw: Any, name: str) -> tuple[dict[str, Any], list[tuple[Keys, Any]]]:
    """A command's example with fields changed, while it stays valid; and the last changes."""
    cls, example = command(name)
    values = yaml.load(example, _Loader)
    known = [keys for keys, _ in places(cls)]
    changed: dict[Keys, Any] = {}
    for keys in draw(st.lists(st.sampled_from(known), min_size=1, max_size=8, unique=True)):
        value = draw(drawn(cls, keys))
        overlaps = any(k[: len(keys)] == keys or keys[: len(k)] == k for k in changed)
        if not overlaps and is_valid(cls, put(values, keys, value)):
            values = put(values, keys, value)
            changed[keys] = value
    return values, list(changed.items())


# --- what must hold -------------------------------------------------------------------------------


def load(path: Path, cls: type[Configuration], values: Any, *arguments: str) -> Configuration:
    path.write_text(values if isinstance(values, str) else dump_yaml(values), encoding="utf-8")
    return load_configuration(cls, path, arguments)


def at(config: Any, keys: Keys) -> Any:
    for key in keys:
        config = getattr(config, str(key), None)
    return config


def same(held: Any, given: Any) -> bool:
    """Whether a configuration holds what was given: a list may be a tuple, text a path."""
    if isinstance(held, Configuration):
        return all(same(getattr(held, name), value) for name, value in given.items())
    if isinstance(given, list):
        pairs = zip(held, given, strict=True)
        return isinstance(held, list | tuple) and all(same(a, b) for a, b in pairs)
    if isinstance(given, dict):
        return held.keys() == given.keys() and all(same(held[k], given[k]) for k in given)
    if isinstance(held, Path):
        return isinstance(given, str) and held == Path(given)
    if isinstance(held, float) and type(given) is int:
        return held == given
    return type(held) is type(given) and held == given


@EACH
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_a_configuration_that_is_written_reads_back_equal(
    tmp_path: Path, name: str, data: Any
) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    config = load(tmp_path / "a.yaml", cls, values)
    written = dump(config)
    again = load(tmp_path / "b.yaml", cls, written)
    assert again == config
    assert dump(again) == written


@EACH
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_no_value_is_rewritten(tmp_path: Path, name: str, data: Any) -> None:
    cls, _ = command(name)
    values, changes = data.draw(configurations(name))
    config = load(tmp_path / "a.yaml", cls, values)
    for keys, value in changes:
        assert same(at(config, keys), value), (keys, value, at(config, keys))


@EACH
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_a_change_moves_nothing_else(tmp_path: Path, name: str, data: Any) -> None:
    cls, example = command(name)
    values, changes = data.draw(configurations(name))
    before, after = (load(tmp_path / "a.yaml", cls, v) for v in (example, values))
    changed = [keys for keys, _ in changes]
    for keys, _ in places(cls):
        if any(k[: len(keys)] == keys or keys[: len(k)] == k for k in changed):
            continue
        sections = at(before, keys[:-1]), at(after, keys[:-1])
        if all(isinstance(section, Configuration) for section in sections):
            assert at(after, keys) == at(before, keys), keys


@EACH
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_mean_what_the_file_s_lines_mean(tmp_path: Path, name: str, data: Any) -> None:
    cls, example = command(name)
    values, changes = data.draw(configurations(name))
    arguments = [
        f"{'.'.join(map(str, keys))}={json.dumps(value, ensure_ascii=False)}"
        for keys, value in changes
    ]
    order = data.draw(st.permutations(arguments))
    given_in_file = load(tmp_path / "a.yaml", cls, values)
    assert load(tmp_path / "b.yaml", cls, yaml.load(example, _Loader), *order) == given_in_file


def line_of(text: str, keys: Keys) -> int:
    """Where the key stands, by YAML's own parser."""
    node, line = yaml.compose(text), 0
    for key in keys:
        pairs = {k.value: (k, v) for k, v in node.value}  # type: ignore[union-attr]
        found, node = pairs[str(key)]
        line = found.start_mark.line + 1
    return line


def only_fault(path: Path, cls: type[Configuration], values: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(path, cls, values)
    assert "\n" not in str(caught.value), "one mistake makes one fault"
    return str(caught.value)


@EACH
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_key_is_one_fault_that_names_key_and_line(
    tmp_path: Path, name: str, data: Any
) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    known = [keys for keys, _ in places(cls)]
    beside = data.draw(
        st.sampled_from([k for k in known if isinstance(_held(values, k[:-1]), dict)])
    )
    key = data.draw(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=12))
    keys = (*beside[:-1], key)
    assume(keys not in known and is_valid(cls, values))
    values = put(values, keys, data.draw(ANY))
    message = only_fault(tmp_path / "a.yaml", cls, values)
    place = f"{tmp_path / 'a.yaml'}:{line_of(dump_yaml(values), keys)}: "
    assert message.startswith(f"{place}`{'.'.join(map(str, keys))}` is not a known key")


def _held(values: Any, keys: Keys) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


OTHERS = [True, "3", 3.0, 1, "true", 3, 2.5, "text", [1], ["1"], None, math.inf]
TYPES = {
    "int_type",
    "float_type",
    "bool_type",
    "string_type",
    "path_type",
    "list_type",
    "dict_type",
}
TYPES |= {"tuple_type", "model_type", "literal_error", "none_required", "finite_number"}


@settings(EACH, max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_a_value_of_another_type_is_kept_as_it_is_or_one_fault_at_its_line(
    tmp_path: Path, name: str, data: Any
) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    keys, _ = data.draw(st.sampled_from(list(places(cls))))
    given_value = data.draw(st.sampled_from(OTHERS))
    values = put(values, keys, given_value)
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        assume({detail["type"] for detail in error.errors()} <= TYPES)
        # Not a list's wrong entry, which has a place of its own; a union adds its parts' names.
        assume({tuple(d["loc"])[: len(keys)] for d in error.errors()} == {keys})
        assume(not any(isinstance(d["loc"][-1], int) for d in error.errors()))
    else:
        assert same(at(config, keys), given_value)
        return
    message = only_fault(tmp_path / "a.yaml", cls, values)
    assert message.startswith(f"{tmp_path / 'a.yaml'}:{line_of(dump_yaml(values), keys)}: ")
    assert ".".join(map(str, keys)) in message
    assert "must be" in message


@EACH
@given(data=st.data())
@pytest.mark.parametrize("name", COMMANDS)
def test_all_mistakes_are_told_at_once(tmp_path: Path, name: str, data: Any) -> None:
    cls, _ = command(name)
    values, _ = data.draw(configurations(name))
    keys = data.draw(st.lists(st.sampled_from("zzq zzr zzs zzt".split()), min_size=2, unique=True))
    text = dump_yaml(values) + "".join(f"{key}: 1\n" for key in keys)
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path / "a.yaml", cls, text)
    first, *faults = str(caught.value).split("\n  - ")
    assert first == f"{tmp_path / 'a.yaml'}: found {len(keys)} faults:"
    assert [fault.split("`")[1] for fault in faults] == keys
