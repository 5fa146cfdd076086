"""Recipes are valid configurations of their commands, and the story openings are disjoint."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trivium.cli import main
from trivium.commands import COMMANDS
from trivium.config.base import load_configuration
from trivium.config.yaml_source import YamlSource
from trivium.errors import ConfigurationError
from trivium.pipelines.recipes import figures

REPOSITORY = Path(__file__).resolve().parent.parent
PLACES = (REPOSITORY / "recipes", REPOSITORY / "trivium" / "recipes")
STORIES = PLACES[0] / "stories"

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
    "verdicts/sparse.yaml": ("compare", []),
    "verdicts/dense.yaml": ("compare", []),
    "verdicts/fixed-pairs.yaml": ("compare", []),
    "verdicts/length-bias.yaml": ("compare", []),
    "verdicts/exploit.yaml": ("compare", []),
    "verdicts/bad-sampler.yaml": ("compare", []),
    "systems/grpo-family.yaml": ("compare", []),
    "systems/preferences.yaml": ("compare", []),
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
    "papers/simpo.yaml": ("dpo", [*MODEL, "data.path=a.jsonl"]),
    "dpo.yaml": ("run", []),
    "instructgpt.yaml": ("run", []),
    "deepseekmath.yaml": ("run", []),
    "dpo-online.yaml": ("run", []),
    "ipo.yaml": ("run", []),
    "dr-grpo.yaml": ("run", []),
    "dapo.yaml": ("run", []),
    "gspo.yaml": ("run", []),
    "cispo.yaml": ("run", []),
    "rloo.yaml": ("run", []),
    "reinforce-pp.yaml": ("run", []),
    "gdpo.yaml": ("run", []),
    "zephyr.yaml": ("run", []),
    "tulu2.yaml": ("run", []),
    "r1-zero.yaml": ("run", []),
    "r1.yaml": ("run", []),
    "math-shepherd.yaml": ("run", []),
}


def test_every_recipe_is_listed_here():
    names = [str(file.relative_to(place)) for place in PLACES for file in place.rglob("*.yaml")]
    assert sorted(names) == sorted(RECIPE_SETTINGS)


def path_of(name: str) -> Path:
    """Return the path of a recipe."""
    (path,) = (place / name for place in PLACES if (place / name).is_file())
    return path


@pytest.mark.parametrize("name", RECIPE_SETTINGS)
def test_recipe_loads_with_the_settings_its_user_adds(name):
    command, settings = RECIPE_SETTINGS[name]
    config_class = COMMANDS[command].config_class()
    load_configuration(config_class, path_of(name), settings)


@pytest.mark.parametrize("name", [n for n, (_, added) in RECIPE_SETTINGS.items() if added])
def test_recipe_alone_is_missing_exactly_those_settings(name):
    command, settings = RECIPE_SETTINGS[name]
    config_class = COMMANDS[command].config_class()
    with pytest.raises(ConfigurationError) as raised:
        load_configuration(config_class, path_of(name), [])
    faults = [line for line in str(raised.value).splitlines() if "missing" in line]
    assert len(faults) == len(settings)


@pytest.mark.parametrize("name", [n for n in RECIPE_SETTINGS if n.startswith("stories/")])
def test_paths_in_a_story_recipe_exist_relative_to_the_repository(name):
    text = path_of(name).read_text(encoding="utf-8")
    paths = [word.strip("{},") for word in text.split() if word.startswith("recipes/")]
    assert paths
    assert all((REPOSITORY / path).is_file() for path in paths)


# --- Recipes that come with the package -----------------------------------------------------------

PAPERS: dict[str, dict[str, Any]] = {
    # Rafailov et al. 2023, appendix B; the rate is constant after its warm-up.
    "dpo.yaml": {
        "stages.dpo.beta": 0.1,
        "stages.dpo.pairs_per_step": 64,
        "stages.dpo.optimizer.schedule": "constant",
    },
    # Ouyang et al. 2022, appendices C and E.
    "instructgpt.yaml": {
        "sampling.temperature": 1.0,
        "stages.sft.examples_per_step": 32,
        "stages.sft.optimizer.schedule": "cosine",
        "stages.sft.optimizer.min_lr_ratio": 0.1,
        "stages.comparisons.samples": 4,
        "stages.comparisons.pairs_per_prompt": None,
        "stages.reward-model.epochs": 1.0,
        "stages.reward-model.optimizer.schedule": "cosine",
        "stages.reward-model.optimizer.min_lr_ratio": 0.1,
        "stages.ppo.critic.model": {"path": "${reward-model}"},
        "stages.ppo.epochs": 1,
        "stages.ppo.beta": 0.02,
        "stages.ppo.gamma": 1.0,
        "stages.ppo.clip_low": 0.2,
        "stages.ppo.clip_high": 0.2,
    },
    # Shao et al. 2024, section 4.2.
    "deepseekmath.yaml": {
        "stages.grpo.epochs": 1,
        "stages.grpo.minibatches": 1,
        "stages.grpo.beta": 0.04,
        "stages.grpo.optimizer.schedule": "constant",
    },
    # Guo et al. 2024 print other sizes for another judge.
    "dpo-online.yaml": {},
    # Azar et al. 2024, eq. 17.
    "ipo.yaml": {"stages.dpo.loss": "ipo"},
    # Liu et al. 2025, section 3: the two biases, and no KL term.
    "dr-grpo.yaml": {
        "stages.grpo.scale": "none",
        "stages.grpo.aggregation": "fixed_length",
        "stages.grpo.beta": 0.0,
    },
    # Yu et al. 2025, section 3 and 4.1.
    "dapo.yaml": {
        "stages.grpo.rewards.0": {"function": "gsm8k", "weight": 2},
        "stages.grpo.clip_low": 0.2,
        "stages.grpo.clip_high": 0.28,
        "stages.grpo.aggregation": "token_mean",
        "stages.grpo.beta": 0.0,
    },
    # Zheng et al. 2025, section 5.1.
    "gspo.yaml": {
        "stages.grpo.surrogate": "gspo",
        "stages.grpo.clip_low": 3e-4,
        "stages.grpo.clip_high": 4e-4,
    },
    # MiniMax-M1 2025, section 3.1.
    "cispo.yaml": {"stages.grpo.surrogate": "cispo", "stages.grpo.aggregation": "token_mean"},
    # Ahmadian et al. 2024, section 2.
    "rloo.yaml": {
        "stages.grpo.advantage": "leave_one_out",
        "stages.grpo.scale": "none",
        "stages.grpo.aggregation": "fixed_length",
    },
    # Hu et al. 2025.
    "reinforce-pp.yaml": {"stages.grpo.scale": "batch_std"},
    # Liu et al. 2026, eq. 4 to 7.
    "gdpo.yaml": {"stages.grpo.reward_aggregation": "normalize_then_sum"},
    # Tunstall et al. 2023, section 4 and appendix.
    "zephyr.yaml": {
        "stages.dsft.optimizer.schedule": "cosine",
        "stages.dsft.optimizer.warmup_ratio": 0.1,
        "stages.feedback.samples": 4,
        "stages.feedback.pairing": "best_random",
        "stages.dpo.beta": 0.1,
        "stages.dpo.epochs": 3.0,
        "stages.dpo.pairs_per_step": 32,
        "stages.dpo.optimizer.schedule": "linear",
        "stages.dpo.optimizer.warmup_ratio": 0.1,
    },
    # Ivison et al. 2023, appendix B.
    "tulu2.yaml": {
        "stages.sft.optimizer.schedule": "linear",
        "stages.sft.optimizer.warmup_ratio": 0.03,
        "stages.dpo.beta": 0.1,
        "stages.dpo.epochs": 3.0,
        "stages.dpo.pairs_per_step": 32,
        "stages.dpo.optimizer.schedule": "linear",
        "stages.dpo.optimizer.warmup_ratio": 0.1,
    },
    # DeepSeek-AI 2025, methods.
    "r1-zero.yaml": {
        "sampling.temperature": 1.0,
        "stages.grpo.prompts_per_step": 32,
        "stages.grpo.responses_per_prompt": 16,
        "stages.grpo.epochs": 1,
        "stages.grpo.beta": 0.001,
    },
    "r1.yaml": {
        "sampling.temperature": 1.0,
        "stages.reasoning.prompts_per_step": 32,
        "stages.reasoning.responses_per_prompt": 16,
        "stages.reasoning.beta": 0.001,
        "stages.reasoning.clip_high": 10.0,
        "stages.sft.epochs": 2.0,
        "stages.grpo.sampling": {"temperature": 0.7},
    },
    # Wang et al. 2024, section 3.
    "math-shepherd.yaml": {"stages.label-steps.labels": "hard"},
    # Ouyang et al. 2022, appendix C: 256k episodes in batches of 512 and minibatches of 64, warm-up
    # over 10 iterations from a tenth of the peak, moving average 0.992, 8 pretraining examples for
    # each episode.
    "papers/instructgpt-ppo.yaml": {
        "sampling.temperature": 1.0,
        "steps": 256_000 // 512,
        "prompts_per_step": 512,
        "responses_per_prompt": 1,
        "epochs": 1,
        "minibatches": 512 // 64,
        "beta": 0.02,
        "gamma": 1.0,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "critic.model": {"path": "your/reward-model"},
        "critic.optimizer": {"learning_rate": 9e-6},
        "optimizer.warmup_steps": 10 * 512 // 64,
        "optimizer.warmup_start_ratio": 0.1,
        "ema_decay": 0.992,
        "pretraining.coefficient": 27.8,
        "pretraining.examples_per_step": 8 * 64,
    },
}
"""The published figures of every key that a recipe marks with `# paper`."""


@pytest.mark.parametrize("name", PAPERS)
def test_every_key_marked_as_the_paper_s_has_the_published_figure(name: str) -> None:
    found = {f.name: f.value for f in figures(path_of(name)) if f.kind == "paper"}
    assert found == PAPERS[name]


@pytest.mark.parametrize("name", [name for name in PAPERS if "/" not in name])
def test_every_number_of_a_pipeline_is_marked_and_the_file_is_short(name: str) -> None:
    text = path_of(name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    marked = [figure.name for figure in figures(path_of(name))]
    numbers = [
        dotted
        for dotted, value in leaves(YamlSource(path_of(name)).values["stages"], "stages")
        if isinstance(value, int | float) and not dotted.startswith("stages.evaluate.")
    ]
    assert numbers
    unmarked = [n for n in numbers if not any(n == m or n.startswith(f"{m}.") for m in marked)]
    assert unmarked == []


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{name}.{key}")


def test_recipes_command_lists_a_line_for_each_and_prints_the_file(capsys: Any) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [str(path.relative_to(PLACES[1])) for path in PLACES[1].rglob("*.yaml")]
    assert sorted(f"{line.split()[0]}.yaml" for line in lines) == sorted(names)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    (dpo,) = (line for line in lines if line.startswith("dpo "))
    assert dpo.endswith("SFT, pairs of the model's own responses, then DPO on them.")
    assert main(["recipes", "papers/dapo"]) == 0
    assert capsys.readouterr().out == path_of("papers/dapo.yaml").read_text(encoding="utf-8")


def test_recipes_command_names_the_nearest_recipe(capsys: Any) -> None:
    assert main(["recipes", "instructgtp"]) == 2
    assert "there is no such recipe: did you mean instructgpt?" in capsys.readouterr().err


# --- Stories --------------------------------------------------------------------------------------


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
