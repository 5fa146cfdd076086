"""Predicted FLOPs of a command equal the count of its run, at the lengths of its responses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import World, rows

from trivium.commands import COMMANDS
from trivium.memory.flops import predict_flops
from trivium.memory.lengths import data_lengths
from trivium.runs.store import read_metrics

PAIRS = [{"prompt": "abc", "chosen": "a" * n, "rejected": "b" * n} for n in (4, 6, 8, 10)]
TEXTS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def settings_of(name: str, world: World) -> dict[str, Any]:
    """Return a configuration of a few steps."""
    shared = {"model": {"path": world.path}, "run": world.run()}
    learned = {"function": "reward_model", "arguments": {"path": world.reward_model()}}
    loop = {**world.on_policy(), "prompts_per_step": 4, "responses_per_prompt": 3}
    texts = world.rows("texts.jsonl", TEXTS)
    return {
        "sft": {**shared, "data": texts, "epochs": 3.0, "examples_per_step": 2},
        "reward-model": {
            **shared, "pairs": world.rows("pairs.jsonl", PAIRS), "epochs": 2.0,
            "examples_per_step": 2, "held_out_share": 0.0,
        },
        "dpo": {**shared, "data": world.rows("pairs.jsonl", PAIRS), "pairs_per_step": 2,
                "epochs": 3.0, "reference_free": True},
        "ppo": {**loop, "rewards": [learned], "steps": 3, "epochs": 2, "minibatches": 2,
                "pretraining": {"data": texts, "examples_per_step": 2}},
        "grpo": {**loop, "rewards": [learned], "steps_per_iteration": 3, "epochs": 2},
        "grpo-no-kl": {**loop, "rewards": [learned], "steps_per_iteration": 3, "beta": 0.0},
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["sft", "reward-model", "dpo", "ppo", "grpo", "grpo-no-kl"])
def test_predicted_flops_of_a_run_are_those_it_counts(name: str, world: World) -> None:
    command = COMMANDS[name.removesuffix("-no-kl")]
    kind = next(known for known, value in COMMANDS.items() if value is command)
    config: Any = command.config_class().model_validate(settings_of(name, world))
    lengths = data_lengths(kind, config)
    command.run(config)
    lines = read_metrics(Path(config.run.directory))
    if kind in ("ppo", "grpo"):
        mean = sum(line["length/mean"] for line in lines) / len(lines)
        lengths = replace(lengths, responses=(mean,))  # type: ignore[arg-type]
    work = predict_flops(kind, config, lengths)
    assert work.steps == len(lines)
    # Lengths vary around their mean, pieces of a last step are rounded up, and scores have no head.
    assert work.flops == pytest.approx(sum(line["flops"] for line in lines), rel=0.05)


def test_the_reference_scores_every_pair_of_a_file_once(world: World) -> None:
    settings = settings_of("dpo", world)
    flops = []
    for free in (True, False):
        config: Any = (
            COMMANDS["dpo"].config_class().model_validate({**settings, "reference_free": free})
        )
        flops.append(predict_flops("dpo", config, data_lengths("dpo", config)).flops)
    assert flops[1] / flops[0] == pytest.approx((3 * 3 + 1) / (3 * 3)), "three epochs of training"


def test_sampling_and_evaluating_count_every_response_once_for_each_pass(world: World) -> None:
    prompts = {"path": rows(world.directory / "p.jsonl", [{"prompt": "ab"}] * 5)}
    shared = {"model": {"path": world.path}, "data": prompts, "rewards": world.reward("letters")}
    sample = {**shared, "samples": 4, "sampling": {"max_tokens": 6}, "output": "x.jsonl"}
    evaluate = {**shared, "samples": 3, "max_tokens": 6}
    flops = {}
    for name, settings in (("sample", sample), ("evaluate", evaluate)):
        config = COMMANDS[name].config_class().model_validate(settings)
        flops[name] = predict_flops(name, config, data_lengths(name, config)).flops
    assert flops["sample"] == pytest.approx(flops["evaluate"]), "one greedy and three sampled"
    reference = {**evaluate, "reference": {"path": world.path}}
    config = COMMANDS["evaluate"].config_class().model_validate(reference)
    more = predict_flops("evaluate", config, data_lengths("evaluate", config)).flops
    three = {**sample, "samples": 3}
    config = COMMANDS["sample"].config_class().model_validate(three)
    once = predict_flops("sample", config, data_lengths("sample", config)).flops
    assert more == pytest.approx(flops["evaluate"] + 2 * once), "both models score the samples"


def test_counts_are_kept_for_the_whole_data_and_lengths_for_its_beginning(world: World) -> None:
    data = {"path": rows(world.directory / "many.jsonl", TEXTS * 100)}
    settings = {"model": {"path": world.path}, "data": data}
    lengths = data_lengths("sft", COMMANDS["sft"].config_class().model_validate(settings))
    assert lengths.count == 400 and len(lengths.prompts) == 256
    assert json.loads(Path(data["path"]).read_text().splitlines()[0]) == TEXTS[0]
