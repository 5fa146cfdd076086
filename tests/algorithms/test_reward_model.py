"""Reward models on a tiny base: the losses, what is held out, and what they learn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import STILL, World, letters_tokenizer, metrics_of
from transformers import AutoModelForSequenceClassification

from trivium.algorithms import reward_model
from trivium.algorithms.reward_model import load_data
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.hf.model_config import ModelConfig
from trivium.models.reward_model import RewardModel

PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "efgh"},
    {"prompt": "b", "chosen": "fghij.a", "rejected": "f"},
    {"prompt": "aaaa", "chosen": "c", "rejected": "cd"},
    {"prompt": "ij", "chosen": "abcdefgh", "rejected": "a.a.a."},
]
STEPS = [
    {"prompt": "abc", "completions": ["de", "f", "ghi"], "labels": [1, 0.5, 0]},
    {"prompt": "b", "completions": ["f"], "labels": [0]},
    {"prompt": "aaaa", "completions": ["c", "cccccc"], "labels": [True, True]},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def config_of(world: World, **options: Any) -> RewardModelConfig:
    given = {
        "model": {"path": world.reward_model()}, "run": world.run(), "optimizer": STILL,
        "held_out_share": 0.0,
    }  # fmt: skip
    if "steps" not in options:
        given["pairs"] = world.rows("pairs.jsonl", PAIRS)
    return RewardModelConfig(**(given | options))


def logit(model: Any, text: str) -> float:
    ids = torch.tensor([letters_tokenizer().encode(text)])
    return float(model(input_ids=ids).logits[0, 0].detach())


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("center", [0.0, 0.3])
def test_pair_loss_is_bradley_terrys_by_plain_transformers(world: World, center: float) -> None:
    run = reward_model.train(config_of(world, center=center, tokens_per_micro_batch=25))
    plain = AutoModelForSequenceClassification.from_pretrained(world.reward_model())
    losses, right = [], 0
    for pair in PAIRS:
        w = logit(plain, pair["prompt"] + pair["chosen"] + "<eos>")
        l = logit(plain, pair["prompt"] + pair["rejected"] + "<eos>")  # noqa: E741
        losses.append(math.log(1 + math.exp(l - w)) + center * (w + l) ** 2)
        right += w > l
    (line,) = metrics_of(run)
    assert line["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert line["accuracy"] == right / 4


def test_step_loss_is_the_cross_entropy_at_the_steps_ends_by_plain_transformers(
    world: World,
) -> None:
    steps = world.rows("steps.jsonl", STEPS) | {"separator": "."}
    run = reward_model.train(config_of(world, steps=steps, tokens_per_micro_batch=15))
    plain = AutoModelForSequenceClassification.from_pretrained(world.reward_model())
    losses = []
    for row in STEPS:
        text = row["prompt"]
        for step, label in zip(row["completions"], row["labels"], strict=True):
            text += step
            p = 1 / (1 + math.exp(-logit(plain, text)))
            losses.append(-label * math.log(p) - (1 - label) * math.log(1 - p))
            text += "."
    (line,) = metrics_of(run)
    assert len(losses) == 6
    assert line["loss"] == pytest.approx(sum(losses) / 6, abs=1e-5)


def test_outcome_model_learns_which_response_is_better(world: World, tmp_path: Path) -> None:
    chosen, rejected = ["aab", "caa", "aaaa", "ada", "daa"], ["bcb", "ccd", "bd", "cdb", "db"]
    rows = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p in "efgh"
        for c, r in zip(chosen, rejected, strict=True)
    ]
    run = reward_model.train(
        config_of(
            world, model={"path": world.path}, pairs=world.rows("many.jsonl", rows),
            held_out_share=0.25, epochs=12.0, examples_per_step=15, center=0.01,
            optimizer={"learning_rate": 0.003},
        )
    )  # fmt: skip
    (result,) = events(run, "evaluation")
    assert result["n"] == 5
    assert result["accuracy"] == 1.0
    assert result["accuracy_low"] < 1.0
    assert result["loss"] < 0.3
    model = RewardModel.load(ModelConfig(path=str(run / "final")))
    batch = Batch.of([Group([9], [[1, 1, 4, 0], [2, 4, 3, 0]])])
    better, worse = model.scores(batch).tolist()
    assert better > worse + 1.0


def test_process_model_learns_which_steps_are_right(world: World) -> None:
    rows = [
        {"prompt": p, "completions": [x, y], "labels": ["a" in x, "a" in y]}
        for p in "efgh"
        for x, y in (("ab", "bb"), ("cb", "ac"), ("ba", "ca"), ("cc", "bc"))
    ]
    steps = world.rows("many-steps.jsonl", rows) | {"separator": "."}
    run = reward_model.train(
        config_of(
            world, model={"path": world.path}, steps=steps, held_out_share=0.25, epochs=40.0,
            examples_per_step=12, optimizer={"learning_rate": 0.003}, evaluate_every=20,
        )
    )  # fmt: skip
    *_, last = results = events(run, "evaluation")
    assert [r["step"] for r in results] == [20, 40]
    assert last["n"] == 8
    assert last["accuracy"] == 1.0


def test_held_out_data_are_the_seeds_choice_and_never_trained_on(world: World) -> None:
    def held(seed: int) -> tuple[list[Group], list[Group]]:
        config = config_of(world, held_out_share=0.5, run=world.run(seed=seed))
        training, held_out = load_data(config)
        assert held_out is not None
        return training.groups, held_out.groups

    training, held_out = held(0)
    assert len(training) == len(held_out) == 2
    assert not [g for g in training if g in held_out]
    assert held(0) == (training, held_out)
    assert len({str(held(seed)) for seed in range(6)}) > 1


def test_named_validation_data_are_used_instead_of_a_share(world: World) -> None:
    named = world.rows("named.jsonl", PAIRS[:3])
    config = config_of(world, validation_pairs=named, held_out_share=0.5)
    training, held_out = load_data(config)
    assert (len(training.groups), held_out and len(held_out.groups)) == (4, 3)


@pytest.mark.parametrize("options", [{"pairs": None}, {"steps": "too"}, {"validation_steps": "x"}])
def test_pairs_or_steps_and_not_both(world: World, options: dict[str, Any]) -> None:
    section = world.rows("steps.jsonl", STEPS)
    options = {k: section if v is not None else None for k, v in options.items()}
    if "steps" in options:
        options["pairs"] = world.rows("pairs.jsonl", PAIRS)
    with pytest.raises(ValueError, match=r"give either pairs|it goes with steps"):
        config_of(world, **options)
