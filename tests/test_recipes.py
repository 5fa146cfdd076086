"""Recipes are valid configurations of their commands, and the story openings are disjoint."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from trivium.commands import COMMANDS
from trivium.config.base import load_configuration
from trivium.errors import ConfigurationError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
STORIES = RECIPES / "stories"

# Command of each recipe, and the settings that its user must add.
MODEL = ["model.path=a-checkpoint"]
RECIPE_SETTINGS = {
    "stories/grpo.yaml": ("grpo", MODEL),
    "stories/hacking.yaml": ("grpo", MODEL),
    "stories/ppo.yaml": ("ppo", MODEL),
    "stories/dpo.yaml": ("dpo", MODEL),
    "stories/evaluate.yaml": ("evaluate", MODEL),
    "stories/compare.yaml": ("compare", MODEL),
    "demo/compare.yaml": ("compare", []),
    "gsm8k/sft.yaml": ("sft", [*MODEL, "data.path=a.jsonl", "validation.path=b.jsonl"]),
    "gsm8k/pairs.yaml": ("pairs", ["data.path=a.jsonl"]),
    "gsm8k/reward-model.yaml": ("reward-model", MODEL),
    "gsm8k/grpo.yaml": ("grpo", [*MODEL, "data.path=a.jsonl", "evaluation.data.path=b.jsonl"]),
    "hh/reward-model.yaml": ("reward-model", [*MODEL, "pairs.path=a.jsonl"]),
    "papers/deepseekmath-grpo.yaml": ("grpo", [*MODEL, "data.path=a.jsonl"]),
    "papers/dr-grpo.yaml": ("grpo", [*MODEL, "data.path=a.jsonl"]),
    "papers/dapo.yaml": ("grpo", [*MODEL, "data.path=a.jsonl"]),
    "papers/instructgpt-ppo.yaml": (
        "ppo",
        [*MODEL, "data.path=a.jsonl", "pretraining.data.path=b.jsonl"],
    ),
    "papers/zephyr-dpo.yaml": ("dpo", [*MODEL, "data.path=a.jsonl"]),
    "papers/simpo.yaml": ("dpo", [*MODEL, "data.path=a.jsonl"]),
}


def test_every_recipe_is_listed_here():
    names = {str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml")}
    assert names == set(RECIPE_SETTINGS)


@pytest.mark.parametrize("name", RECIPE_SETTINGS)
def test_recipe_loads_with_the_settings_its_user_adds(name):
    command, settings = RECIPE_SETTINGS[name]
    config_class = COMMANDS[command].config_class()
    load_configuration(config_class, RECIPES / name, settings)


@pytest.mark.parametrize("name", [n for n, (_, added) in RECIPE_SETTINGS.items() if added])
def test_recipe_alone_is_missing_exactly_those_settings(name):
    command, settings = RECIPE_SETTINGS[name]
    config_class = COMMANDS[command].config_class()
    with pytest.raises(ConfigurationError) as raised:
        load_configuration(config_class, RECIPES / name, [])
    faults = [line for line in str(raised.value).splitlines() if "missing" in line]
    assert len(faults) == len(settings)


@pytest.mark.parametrize("name", [n for n in RECIPE_SETTINGS if n.startswith("stories/")])
def test_paths_in_a_story_recipe_exist_relative_to_the_repository(name):
    text = (RECIPES / name).read_text(encoding="utf-8")
    paths = [word.strip("{},") for word in text.split() if word.startswith("recipes/")]
    assert paths
    assert all((RECIPES.parent / path).is_file() for path in paths)


def openings(file: str) -> list[str]:
    lines = (STORIES / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def test_held_out_openings_share_no_prompt_name_or_sentence_with_training():
    script = runpy.run_path(str(STORIES / "openings.py"))
    training, held_out = script["TRAINING"], script["HELD_OUT"]
    assert not set(training["names"]) & set(held_out["names"])
    assert not set(training["openings"]) & set(held_out["openings"])
    assert not set(openings("prompts.jsonl")) & set(openings("heldout.jsonl"))


def test_opening_files_match_the_output_of_their_script():
    script = runpy.run_path(str(STORIES / "openings.py"))
    for file, parts in (("prompts.jsonl", "TRAINING"), ("heldout.jsonl", "HELD_OUT")):
        assert openings(file) == [row["prompt"] for row in script["rows"](**script[parts])]


@pytest.fixture(scope="module")
def story_rewards():
    pytest.importorskip("vaderSentiment")
    return runpy.run_path(str(STORIES / "sentiment.py"))


def test_happy_story_scores_above_a_sad_one_and_the_cap_applies(story_rewards):
    texts = ["They were happy and loved the party.", "It was sad, and he cried.", "He sat."]
    happy, sad, plain = story_rewards["sentiment"](["", "", ""], texts)
    assert happy > 0.7 and sad < -0.4 and plain == 0
    assert story_rewards["sentiment"](["", "", ""], texts, cap=0.3) == [0.3, sad, 0]


def test_repetition_is_the_share_of_repeated_word_pairs(story_rewards):
    # happy friend, friend happy, happy friend, friend happy: 2 of 4 are repeats.
    texts = ["Happy friend happy, friend happy!", "one two three", "one", ""]
    assert story_rewards["repetition"]([""] * 4, texts) == [0.5, 0.0, 0.0, 0.0]
    assert story_rewards["distinct"]([""] * 4, texts) == [0.4, 1.0, 1.0, 0.0]
