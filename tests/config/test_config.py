"""Configurations: the meaning of values, files with arguments, and writing them back."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.config_recipes import Inner, Recipe, Step, load_text
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from trivium.config.base import Configuration, dump, load_configuration
from trivium.config.field_reference import describe
from trivium.config.yaml_source import dump_yaml, parse_scalar

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return partial(load_text, tmp_path)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"steps": "3"},
        {"steps": 3.0},
        {"steps": True},
        {"steps": 1.5},
        {"label": 3},
        {"fast": 1},
        {"fast": "true"},
        {"stop": [1]},
        {"weights": {"a": "1"}},
        {"weights": {"a": True}},
        {"limit": True},
        {"step": {"rate": "0.1"}},
        {"step": {"rate": math.nan}},
        {"weights": {"a": math.inf}},
        {"rewards": [{"name": "a", "weight": "2"}]},
    ],
)
def test_no_value_is_silently_converted(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe(**given)


def test_lossless_conversions_are_made() -> None:
    recipe = Recipe(limit=3, directory="a/b", stop=["x"], weights={"a": 1}, seed=4)  # type: ignore[arg-type]
    assert (recipe.limit, type(recipe.limit)) == (3.0, float)
    assert recipe.directory == Path("a/b")
    assert recipe.stop == ("x",)
    assert recipe.weights == {"a": 1.0}


def test_default_that_looks_like_a_schema_is_unchanged() -> None:
    class Named(Configuration):
        kinds: dict[str, str] = Field(default={"type": "int"})

    assert Named().kinds == {"type": "int"}


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Recipe().steps = 3  # type: ignore[misc]


def test_default_out_of_its_own_bounds_is_refused() -> None:
    class Wrong(Configuration):
        steps: int = Field(default=-1, gt=0)

    with pytest.raises(ValidationError):
        Wrong()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2e+3", -2000.0),
        ("1.e2", 100.0),
        (".5", 0.5),
        ("1_000.5", 1000.5),
        ("1_000", 1000),
        ("0x1F", 31),
        ("+7", 7),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("e5", "e5"),
        ("1e", "1e"),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    parsed = parse_scalar(text)
    assert (parsed, type(parsed)) == (value, type(value))


def test_exponent_without_point_is_a_number_in_file_and_argument(load: Load) -> None:
    assert load("step: {rate: 3e-4}").step.rate == 3e-4
    assert load("", "step.rate=3e-4").step.rate == 3e-4
    assert load("", "weights={a: 1e-2}").weights == {"a": 0.01}


def test_text_that_looks_like_a_number_stays_text_in_quotes(load: Load) -> None:
    assert load("label: '3e-4'").label == "3e-4"
    assert load("", "label='010'").label == "010"


def test_word_no_is_text(load: Load) -> None:
    assert load("label: no").label == "no"


# --- Files and arguments --------------------------------------------------------------------------


def test_empty_file_gives_the_defaults(load: Load) -> None:
    assert load("") == load("# nothing\n") == Recipe()


def test_argument_overrides_the_file_and_the_last_argument_wins(load: Load) -> None:
    recipe = load("steps: 3\nstep: {rate: 0.1}", "steps=4", "step.decay=0.5", "steps=5")
    assert (recipe.steps, recipe.step.rate, recipe.step.decay) == (5, 0.1, 0.5)


def test_argument_may_hold_an_equals_sign_and_spaces(load: Load) -> None:
    assert load("", "label=a = b").label == "a = b"


def test_argument_replaces_a_list_or_changes_one_entry(load: Load) -> None:
    text = "rewards:\n- {name: a}\n- {name: b}\n"
    changed = load(text, "rewards.1.weight=2").rewards
    assert [(r.name, r.weight) for r in changed] == [("a", 1.0), ("b", 2.0)]
    replaced = load(text, "rewards=[{name: c, weight: 3}]").rewards
    assert [(r.name, r.weight) for r in replaced] == [("c", 3.0)]


def test_argument_sets_a_key_in_a_section_that_the_file_leaves_empty(load: Load) -> None:
    assert load("step:\n", "step.rate=0.1").step.rate == 0.1


def test_values_repeated_by_an_anchor_are_separate_copies(load: Load) -> None:
    recipe = load("rewards:\n- &r {name: a}\n- *r\n", "rewards.1.weight=2")
    assert [r.weight for r in recipe.rewards] == [1.0, 2.0]


def test_partial_section_takes_the_other_keys_from_the_field_default(load: Load) -> None:
    expected = Step(rate=1e-5, decay=1.0)
    assert load("step: {decay: 1.0}").step == expected
    assert load("", "step.decay=1").step == expected
    assert Recipe(step={"decay": 1.0}).step == expected  # type: ignore[arg-type]
    inner = load("inner: {step: {kind: sgd}}").inner
    assert inner == Inner(depth=7, step=Step(rate=0.125, decay=0.0, kind="sgd"))


def test_section_given_as_an_object_is_not_merged_with_the_default() -> None:
    assert Recipe(step=Step(decay=1.0)).step.rate == 1e-3


# --- Writing --------------------------------------------------------------------------------------


def test_dump_contains_the_defaults_and_loads_to_an_equal_configuration(load: Load) -> None:
    recipe = load("stop: ['#### ', no, '3e-4', '']\ndirectory: a/b", "step.rate=1e-7", "seed=3")
    text = dump(recipe)
    assert load(text) == recipe
    assert yaml.safe_load(text)["inner"] == {
        "step": {"rate": 0.125, "decay": 0.0, "kind": "adam"},
        "depth": 7,
    }


def test_shared_values_are_written_twice_without_an_anchor() -> None:
    shared_list = [1, 2]
    assert dump_yaml({"a": shared_list, "b": shared_list}) == dump_yaml({"a": [1, 2], "b": [1, 2]})


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(["3e-4", "1e5", "no", "0o7", "010", "1:30", "=", "<<", "~", "- a", "a: b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1.e-"), inner),
    max_leaves=8,
)


class Holder(Configuration):
    value: Any


@settings(max_examples=150, deadline=None)
@given(value=_VALUES)
def test_written_values_load_exactly(value: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "holder.yaml"
    path.write_text(dump_yaml({"value": value}), encoding="utf-8")
    loaded = load_configuration(Holder, path).value
    assert repr(loaded) == repr(value)


def test_field_reference_gives_name_type_default_and_help() -> None:
    lines = describe(Recipe).splitlines()
    reference = dict(zip(lines, [*lines[1:], ""], strict=True))
    assert reference["step: section"] == "    Size of each update."
    assert reference["step.rate: number > 0 and <= 1, default 1e-05"] == "    Step size."
    assert reference['step.kind: adam | sgd, default "adam"'] == "    Update rule."
    assert "inner.step.rate: number > 0 and <= 1, default 0.125" in lines
    assert "inner.depth: whole number, default 7" in lines
    assert 'limit: number > 0 or auto, default "auto"' in lines
    assert "seed: whole number >= 0 or null, default null" in lines
    assert "betas: list of 2: number, number, default [0.9, 0.99]" in lines
    assert "extra: mapping from text to any value, default {}" in lines
    assert "directory: path or null, default null" in lines
    assert "stop: list of text, default []" in lines
    assert "weights: mapping from text to number, default {}" in lines
    assert "rewards.0.name: text, required" in lines
    assert "fast: true or false, default false" in lines
