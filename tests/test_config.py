"""Configurations: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from trivium.config import Configuration, describe, dump, load_configuration
from trivium.errors import ConfigurationError
from trivium.yaml_source import dump_yaml, parse_scalar, shown


class Step(Configuration):
    """How far each update goes."""

    rate: float = Field(default=1e-3, gt=0, le=1)
    """Step size."""
    decay: float = 0.0
    kind: Literal["adam", "sgd"] = "adam"
    """Update rule."""


class Reward(Configuration):
    """One reward."""

    name: str
    """Where the reward's function is."""
    weight: float = 1.0


class Inner(Configuration):
    step: Step = Step(rate=0.5, decay=0.25)
    depth: int = 1


class Recipe(Configuration):
    step: Step = Step(rate=1e-5)
    inner: Inner = Inner(depth=7, step=Step(rate=0.125))
    rewards: list[Reward] = Field(default=[Reward(name="exact")], min_length=1)
    """What is rewarded."""
    steps: int = Field(default=10, gt=0)
    """How many steps."""
    limit: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    seed: int | None = Field(default=None, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    extra: dict[str, Any] = Field(default={})
    label: str = ""
    directory: Path | None = None
    fast: bool = False
    stop: tuple[str, ...] = ()
    weights: dict[str, float] = Field(default={})

    @model_validator(mode="after")
    def _short_enough(self) -> Recipe:
        if self.steps > 100 and self.fast:
            raise ValueError(f"steps is {self.steps}, too many for fast: lower it to 100")
        return self


class Needy(Configuration):
    rewards: list[Reward]
    """What is rewarded."""
    steps: int


Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads YAML text as a file named recipe.yaml, with arguments."""

    def _load(text: str, *arguments: str, cls: type[Configuration] = Recipe) -> Configuration:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return load_configuration(cls, path, arguments)

    return _load


@pytest.fixture
def faults(load: Load, tmp_path: Path) -> Load:
    """The faults of YAML text and arguments, with the file as recipe.yaml."""

    def _faults(text: str, *arguments: str, cls: type[Configuration] = Recipe) -> list[str]:
        with pytest.raises(ConfigurationError) as caught:
            load(text, *arguments, cls=cls)
        message = str(caught.value).replace(f"{tmp_path}/", "")
        head, *rest = message.split("\n  - ")
        if rest:
            assert head == f"recipe.yaml: found {len(rest)} faults:"
        return rest or [head]

    return _faults


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
def test_no_value_is_silently_turned_into_another(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe(**given)


def test_exact_conversions_are_made() -> None:
    recipe = Recipe(limit=3, directory="a/b", stop=["x"], weights={"a": 1}, seed=4)  # type: ignore[arg-type]
    assert (recipe.limit, type(recipe.limit)) == (3.0, float)
    assert recipe.directory == Path("a/b")
    assert recipe.stop == ("x",)
    assert recipe.weights == {"a": 1.0}


def test_default_that_looks_like_a_schema_is_left_as_it_is() -> None:
    class Named(Configuration):
        kinds: dict[str, str] = Field(default={"type": "int"})

    assert Named().kinds == {"type": "int"}


def test_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Recipe().steps = 3  # type: ignore[misc]


def test_default_that_breaks_its_own_rule_is_refused() -> None:
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
def test_plain_scalars_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
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


def test_argument_changes_the_file_and_the_last_one_holds(load: Load) -> None:
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


def test_argument_opens_a_section_that_the_file_left_empty(load: Load) -> None:
    assert load("step:\n", "step.rate=0.1").step.rate == 0.1


def test_anchor_repeats_values_that_change_separately(load: Load) -> None:
    recipe = load("rewards:\n- &r {name: a}\n- *r\n", "rewards.1.weight=2")
    assert [r.weight for r in recipe.rewards] == [1.0, 2.0]


def test_partial_section_keeps_the_rest_of_its_fields_default(load: Load) -> None:
    expected = Step(rate=1e-5, decay=1.0)
    assert load("step: {decay: 1.0}").step == expected
    assert load("", "step.decay=1").step == expected
    assert Recipe(step={"decay": 1.0}).step == expected  # type: ignore[arg-type]
    inner = load("inner: {step: {kind: sgd}}").inner
    assert inner == Inner(depth=7, step=Step(rate=0.125, decay=0.0, kind="sgd"))


def test_section_given_as_an_object_is_taken_as_it_is() -> None:
    assert Recipe(step=Step(decay=1.0)).step.rate == 1e-3


# --- Faults ---------------------------------------------------------------------------------------


def test_all_faults_are_reported_together_with_line_or_argument(faults: Load) -> None:
    text = "steps: many\nstep:\n  rate: -1\n  knd: sgd\nlabel: a\nlabel: b\n"
    found = faults(text, "seed=1.5", "nonsense")
    assert found == [
        "recipe.yaml:6: `label` is given twice, first at recipe.yaml:5; keep one",
        "argument `nonsense`: not an assignment; write key=value",
        "recipe.yaml:3: step.rate = -1: must be greater than 0",
        "recipe.yaml:4: `step.knd` is not a known key: did you mean `step.kind`?",
        'recipe.yaml:1: steps = "many": must be a whole number',
        "argument `seed=1.5`: seed = 1.5: must be a whole number",
    ]


def test_unknown_key_is_told_the_nearest_name(faults: Load) -> None:
    assert faults("setps: {}") == [
        "recipe.yaml:1: `setps` is not a known key: did you mean `steps`?"
    ]
    assert faults("", "--steps=3") == [
        "argument `--steps=3`: `--steps` is not a known key: did you mean `steps`?"
    ]
    assert faults("rewards:\n- name: a\n  wieght: 2") == [
        "recipe.yaml:3: `rewards.0.wieght` is not a known key: did you mean `rewards.0.weight`?"
    ]


def test_unknown_key_that_exists_elsewhere_is_told_where(faults: Load) -> None:
    assert faults("rate: 1") == [
        "recipe.yaml:1: `rate` is not a known key: did you mean `step.rate`?"
    ]


def test_unknown_key_unlike_any_is_told_the_keys(faults: Load) -> None:
    assert faults("step: {zzz: 1}") == [
        "recipe.yaml:1: `step.zzz` is not a known key: the keys here are rate, decay, kind"
    ]


def test_missing_value_is_named_with_its_meaning(faults: Load) -> None:
    assert faults("rewards:\n- weight: 2\n", cls=Needy) == [
        "recipe.yaml:2: `rewards.0.name` is missing: it has no default; write a value for it "
        "(Where the reward's function is.)",
        "recipe.yaml: `steps` is missing: it has no default; write a value for it",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: 1e2", "steps = 100.0: must be a whole number; write 100"),
        ("steps: '3'", 'steps = "3": must be a whole number; write 3, not in quotes'),
        ("fast: 'true'", 'fast = "true": must be true or false; write true, not in quotes'),
        ("fast: yes", 'fast = "yes": must be true or false'),
        ("label: 3", 'label = 3: must be text; write "3", in quotes'),
        ("steps: 0", "steps = 0: must be greater than 0"),
        ("step: {rate: 2}", "step.rate = 2: must be less than or equal to 1"),
        (
            "step: {kind: adma}",
            "step.kind = \"adma\": must be 'adam' or 'sgd'; did you mean adam?",
        ),
        ("limit: soon", "limit = \"soon\": must be a number or 'auto'"),
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


def test_changed_value_is_no_longer_the_files(faults: Load) -> None:
    (fault,) = faults("step:\n  rate: 0.1\n", "step={rate: 2}")
    assert fault.startswith("argument `step={rate: 2}`: step.rate = 2:")


@pytest.mark.parametrize(
    ("argument", "fault"),
    [
        ("steps", "not an assignment; write key=value"),
        (".=3", "not an assignment; write key=value"),
        ("step.rate.x=1", "`step.rate` is 0.1, which has no parts to set; set `step.rate` itself"),
        (
            "rewards.1.weight=2",
            "`rewards` ends with `rewards.0`; to add an entry give the whole list, rewards=[...]",
        ),
        (
            "rewards.weight=2",
            "`rewards` is a list; name one entry by its number, as in `rewards.0`",
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
def test_file_that_is_no_plain_yaml_is_refused_with_its_line(
    faults: Load, text: str, fault: str
) -> None:
    assert faults(text)[0].startswith(fault)


def test_anchors_that_multiply_are_refused(faults: Load) -> None:
    lines = ["a0: &a0 [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (fault,) = faults("\n".join(lines))
    assert "more than 20000" in fault


def test_missing_file_is_told_the_nearest_name(load: Load, tmp_path: Path) -> None:
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


def test_long_value_is_shown_shortened() -> None:
    assert len(shown("x" * 1000)) == 80
    assert shown("x" * 1000).endswith("...")
    assert shown("x\ny") == '"x\\ny"'


# --- Writing --------------------------------------------------------------------------------------


def test_dump_holds_the_defaults_and_loads_to_an_equal_configuration(load: Load) -> None:
    recipe = load("stop: ['#### ', no, '3e-4', '']\ndirectory: a/b", "step.rate=1e-7", "seed=3")
    text = dump(recipe)
    assert load(text) == recipe
    assert yaml.safe_load(text)["inner"] == {
        "step": {"rate": 0.125, "decay": 0.0, "kind": "adam"},
        "depth": 7,
    }


def test_values_that_occur_twice_are_written_twice() -> None:
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
def test_written_values_read_back_exactly(value: Any, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "holder.yaml"
    path.write_text(dump_yaml({"value": value}), encoding="utf-8")
    back = load_configuration(Holder, path).value
    assert repr(back) == repr(value)


def test_description_gives_name_type_default_and_sentence() -> None:
    lines = describe(Recipe).splitlines()
    reference = dict(zip(lines, [*lines[1:], ""], strict=True))
    assert reference["step: section"] == "    How far each update goes."
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
