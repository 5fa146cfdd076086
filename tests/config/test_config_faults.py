"""Faulty configurations: all faults are found, each with its place, reason and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.config_recipes import Recipe, RequiredFields, faults_of, load_text

from trivium.config.base import Configuration, Conflict, load_configuration
from trivium.config.yaml_source import format_value
from trivium.errors import ConfigurationError

Load = Callable[..., Any]
DEFAULT_RATE = "; the default is 1e-05 (Step size.)"


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return partial(load_text, tmp_path)


@pytest.fixture
def faults(tmp_path: Path) -> Load:
    return partial(faults_of, tmp_path)


def test_all_faults_are_reported_together_with_line_or_argument(faults: Load) -> None:
    text = "steps: many\nstep:\n  rate: -1\n  knd: sgd\nlabel: a\nlabel: b\n"
    assert faults(text, "seed=1.5", "nonsense") == [
        "recipe.yaml:6: `label` is given twice, first at recipe.yaml:5; keep one",
        "argument `nonsense`: not an assignment; write key=value",
        f"recipe.yaml:3: step.rate = -1: must be greater than 0{DEFAULT_RATE}",
        "recipe.yaml:4: `step.knd` is not a known key: did you mean `step.kind`?",
        'recipe.yaml:1: steps = "many": must be a whole number; '
        "the default is 10 (Number of steps.)",
        "argument `seed=1.5`: seed = 1.5: must be a whole number",
    ]


def test_unknown_key_is_reported_with_the_most_similar_key(faults: Load) -> None:
    assert faults("setps: {}") == [
        "recipe.yaml:1: `setps` is not a known key: did you mean `steps`?"
    ]
    assert faults("", "--steps=3") == [
        "argument `--steps=3`: `--steps` is not a known key: did you mean `steps`?"
    ]
    assert faults("rewards:\n- name: a\n  wieght: 2") == [
        "recipe.yaml:3: `rewards.0.wieght` is not a known key: did you mean `rewards.0.weight`?"
    ]


def test_unknown_key_that_begins_a_key_of_its_section_is_reported_with_that_key(
    faults: Load,
) -> None:
    class Inner(Configuration):
        steps: int = 0

    class Outer(Configuration):
        steps_per_iteration: int = 1
        inner: Inner = Inner()

    assert faults("steps: 3", cls=Outer) == [
        "recipe.yaml:1: `steps` is not a known key: did you mean `steps_per_iteration`?"
    ]


def test_unknown_key_of_another_section_is_reported_with_that_section(faults: Load) -> None:
    assert faults("rate: 1") == [
        "recipe.yaml:1: `rate` is not a known key: did you mean `step.rate`?"
    ]


def test_unknown_key_without_a_similar_key_is_reported_with_the_section_keys(faults: Load) -> None:
    assert faults("step: {zzz: 1}") == [
        "recipe.yaml:1: `step.zzz` is not a known key: the keys here are rate, decay, kind"
    ]


def test_missing_value_is_reported_with_its_help(faults: Load) -> None:
    assert faults("rewards:\n- weight: 2\n", cls=RequiredFields) == [
        "recipe.yaml:2: `rewards.0.name` is missing: it has no default; write a value for it "
        "(Name of the reward's function.)",
        "recipe.yaml: `steps` is missing: it has no default; write a value for it",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: 1e2", "steps = 100.0: must be a whole number; write 100"),
        ("steps: '3'", 'steps = "3": must be a whole number; write 3, not in quotes'),
        ("fast: 'true'", 'fast = "true": must be true or false; write true, not in quotes'),
        ("fast: yes", 'fast = "yes": must be true or false; the default is false'),
        ("label: 3", 'label = 3: must be text; write "3", in quotes'),
        ("steps: 0", "steps = 0: must be greater than 0; the default is 10 (Number of steps.)"),
        ("step: {rate: 2}", f"step.rate = 2: must be less than or equal to 1{DEFAULT_RATE}"),
        (
            "step: {kind: adma}",
            "step.kind = \"adma\": must be 'adam' or 'sgd'; did you mean adam?",
        ),
        ("limit: soon", 'limit = "soon": must be a number or \'auto\'; the default is "auto"'),
        ("stop: x", 'stop = "x": must be a list'),
        ("stop: [a, 3]", 'stop.1 = 3: must be text; write "3", in quotes'),
        ("step: 3", "step = 3: must be a section of `key: value` lines"),
        ("rewards: [3]", "rewards.0 = 3: must be a section of `key: value` lines"),
        (
            "steps:",
            "steps = null: must be a whole number; write a value, or leave the key out if it has "
            "a default",
        ),
        ("weights: {a: .nan}", "weights.a = NaN: must be a finite number"),
    ],
)
def test_wrong_value_is_shown_with_reason_and_remedy(faults: Load, text: str, fault: str) -> None:
    assert faults(text) == [f"recipe.yaml:1: {fault}"]


def test_fault_between_fields_names_section_and_arguments(faults: Load) -> None:
    reason = "steps is 101, too many for fast: lower it to 100"
    assert faults("steps: 101\nfast: true") == [f"recipe.yaml: {reason}"]
    assert faults("fast: true", "steps=101") == [f"recipe.yaml with argument `steps=101`: {reason}"]

    class Outer(Configuration):
        recipe: Recipe

    assert faults("\nrecipe:\n  fast: true\n  steps: 101", cls=Outer) == [
        f"recipe.yaml:2: recipe: {reason}"
    ]


def test_all_conflicts_of_all_sections_are_reported_with_their_lines(faults: Load) -> None:
    class Inner(Configuration):
        low: int = 0
        high: int = 1

        def conflicts(self) -> Iterator[Conflict]:
            if self.low > self.high:
                yield "low", f"above high, which is {self.high}: lower it"
            if self.low > 5:
                yield "", "too much altogether"

    class Outer(Configuration):
        one: Inner = Inner()
        several: tuple[Inner, ...] = ()

    text = "one:\n  low: 7\nseveral:\n- {high: 3}\n- low: 2\n"
    assert faults(text, "several.0.low=4", cls=Outer) == [
        "recipe.yaml:2: one.low = 7: above high, which is 1: lower it",
        "recipe.yaml:1: one: too much altogether",
        "argument `several.0.low=4`: several.0.low = 4: above high, which is 3: lower it",
        "recipe.yaml:5: several.1.low = 2: above high, which is 1: lower it",
    ]


def test_fault_of_an_overridden_value_names_the_argument(faults: Load) -> None:
    (fault,) = faults("step:\n  rate: 0.1\n", "step={rate: 2}")
    assert fault.startswith("argument `step={rate: 2}`: step.rate = 2:")


@pytest.mark.parametrize(
    ("argument", "fault"),
    [
        ("steps", "not an assignment; write key=value"),
        (".=3", "not an assignment; write key=value"),
        ("step.rate.x=1", "`step.rate` is 0.1, which has no keys; set `step.rate` itself"),
        (
            "rewards.1.weight=2",
            "`rewards` ends with `rewards.0`; to add an entry give the whole list, rewards=[...]",
        ),
        (
            "rewards.weight=2",
            "`rewards` is a list; address one entry by its index, as in `rewards.0`",
        ),
        (
            "stop.0=x",
            "`stop` is not set in recipe.yaml, so there is no entry 0 to change; give the whole "
            "list, stop=[...]",
        ),
        ("label=#### 3", "`#### 3` reads as a comment; put the value in quotes"),
        ("label=a #b", "`#b` reads as a comment; put the value in quotes"),
    ],
)
def test_argument_that_cannot_be_applied_is_refused(
    faults: Load, argument: str, fault: str
) -> None:
    text = "step: {rate: 0.1}\nrewards: [{name: a}]"
    assert faults(text, argument) == [f"argument `{argument}`: {fault}"]


def test_quoted_comment_sign_is_text(load: Load) -> None:
    assert load("", "label='#### 3'").label == "#### 3"


def test_argument_that_is_not_yaml_is_refused(faults: Load) -> None:
    (fault,) = faults("", "label=[0-9]+")
    assert fault.startswith("argument `label=[0-9]+`: not valid YAML: ")
    assert "in quotes" in fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: 3\nlabel: a: b\n", "recipe.yaml:2: not valid YAML: "),
        ("steps: 3\n\tlabel: a\n", "recipe.yaml:2: not valid YAML: "),
        ("steps: 3\n---\nsteps: 4\n", "recipe.yaml:2: not valid YAML: expected a single document"),
        ("label: \x07\n", "recipe.yaml: not valid YAML: "),
        ("[" * 1000, "recipe.yaml"),
        ("- 3\n", "recipe.yaml: holds [3], not a configuration"),
        ("label: &a [*a]\n", "recipe.yaml:1: values nest more than 50 deep"),
        ("label: !!python/object/apply:os.getcwd []\n", "recipe.yaml:1: the tag "),
        ("label: !!timestamp 2026-01-01\n", "recipe.yaml:1: the tag "),
        ("steps: !!int three\n", 'recipe.yaml:1: "three" is not of type int'),
        ("? [a]\n: 3\n", "recipe.yaml:1: a key must be a word"),
    ],
)
def test_file_that_is_not_plain_yaml_is_refused_with_its_line(
    faults: Load, text: str, fault: str
) -> None:
    assert faults(text)[0].startswith(fault)


def test_anchors_that_multiply_are_refused(faults: Load) -> None:
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (fault,) = faults("\n".join(lines))
    assert "more than 20000" in fault


def test_missing_file_is_reported_with_the_most_similar_name(load: Load, tmp_path: Path) -> None:
    load("")
    with pytest.raises(ConfigurationError, match=r"receipe\.yaml: there is no such file; did you"):
        load_configuration(Recipe, tmp_path / "receipe.yaml", [])
    with pytest.raises(ConfigurationError, match="check the path"):
        load_configuration(Recipe, tmp_path / "nowhere" / "x.yaml", [])


def test_directory_and_binary_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a directory"):
        load_configuration(Recipe, tmp_path, [])
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="is not UTF-8 text"):
        load_configuration(Recipe, tmp_path / "b.yaml", [])


def test_long_value_is_shortened_in_a_message() -> None:
    assert len(format_value("x" * 1000)) == 80
    assert format_value("x" * 1000).endswith("...")
    assert format_value("x\ny") == '"x\\ny"'
