"""Reward models on a tiny base: the losses, what is held out, and what they learn."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations
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
from trivium.errors import ModelError
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
    if not {"steps", "rankings"} & options.keys():
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


RANKINGS = [
    {"prompt": "abc", "responses": ["de", "efgh", "a", "j.a"], "scores": [1, 3, 1, 2]},
    {"prompt": "b", "responses": ["fghij.a", "f"], "scores": [0.25, -0.5]},
    {"prompt": "aaaa", "responses": ["c", "cd", "e"], "scores": [7, 8, 9]},
]


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize(("center", "margin"), [(0.0, 0.0), (0.3, 0.0), (0.2, 0.5)])
def test_ranking_loss_is_the_mean_over_k_choose_2_comparisons_by_plain_transformers(
    world: World, ties: str, center: float, margin: float
) -> None:
    rankings = {**world.rows("rankings.jsonl", RANKINGS), "ties": ties, "margin_scale": margin}
    config = config_of(world, rankings=rankings, center=center, tokens_per_micro_batch=40)
    run = reward_model.train(config)
    plain = AutoModelForSequenceClassification.from_pretrained(world.reward_model())
    losses, accuracies = [], []
    for row in RANKINGS:
        scores = [logit(plain, f"{row['prompt']}{text}<eos>") for text in row["responses"]]
        ranked, right = 0.0, []
        for (a, label_a), (b, label_b) in combinations(zip(scores, row["scores"], strict=True), 2):
            swap = label_b > label_a
            won, lost, gap = (b, a, label_b - label_a) if swap else (a, b, label_a - label_b)
            if gap > 0:
                ranked += log1pexp(lost - won + margin * gap)
                right.append(won > lost)
            elif ties == "half":
                ranked += (log1pexp(a - b) + log1pexp(b - a)) / 2
            ranked += center * (a + b) ** 2 * (gap > 0 or ties == "half")
        losses.append(ranked / math.comb(len(scores), 2))
        accuracies.append(sum(right) / len(right))
    (line,) = metrics_of(run)
    assert line["loss"] == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert line["accuracy"] == pytest.approx(sum(accuracies) / 3, abs=1e-6)


def test_rankings_of_two_are_pairs(world: World) -> None:
    ranks = [
        {"prompt": p["prompt"], "responses": [p["rejected"], p["chosen"]], "scores": [0, 0.3]}
        for p in PAIRS
    ]
    settings = {"center": 0.3, "held_out_share": 0.5, "optimizer": {"learning_rate": 0.01}}
    runs = [
        reward_model.train(config_of(world, run=world.run(), **settings, **data))
        for data in ({}, {"rankings": world.rows("two.jsonl", ranks)})
    ]
    (pairs,), (rankings,) = map(metrics_of, runs)
    assert rankings["loss"] == pytest.approx(pairs["loss"], abs=1e-6)
    assert rankings["accuracy"] == pairs["accuracy"]
    held_out = [events(run, "evaluation")[0] for run in runs]
    assert held_out[1]["loss"] == pytest.approx(held_out[0]["loss"], abs=1e-5)
    assert held_out[1]["n"] == held_out[0]["n"] == 2


def test_margins_of_pairs_are_subtracted_from_the_difference(world: World) -> None:
    margins = [0.0, 0.5, 1.0, 2.0]
    rows = [{**pair, "margin": m} for pair, m in zip(PAIRS, margins, strict=True)]
    pairs = {**world.rows("margins.jsonl", rows), "margins": True}
    run = reward_model.train(config_of(world, pairs=pairs, center=0.0, tokens_per_micro_batch=25))
    plain = AutoModelForSequenceClassification.from_pretrained(world.reward_model())
    losses = []
    for pair, m in zip(PAIRS, margins, strict=True):
        w = logit(plain, pair["prompt"] + pair["chosen"] + "<eos>")
        losses.append(log1pexp(logit(plain, pair["prompt"] + pair["rejected"] + "<eos>") - w + m))
    assert metrics_of(run)[0]["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)


def test_ranking_model_learns_the_order(world: World) -> None:
    rows = [
        {"prompt": p, "responses": [f"{q}aa", f"{q}ab", f"{q}bb"], "scores": [3, 2, 1]}
        for p in "efgh"
        for q in "cdij"
    ]
    run = reward_model.train(
        config_of(
            world, model={"path": world.path}, rankings=world.rows("order.jsonl", rows),
            held_out_share=0.25, epochs=10.0, examples_per_step=6,
            optimizer={"learning_rate": 0.003},
        )
    )  # fmt: skip
    (result,) = events(run, "evaluation")
    assert (result["n"], result["accuracy"]) == (4, 1.0)


def test_step_of_ties_alone_logs_no_accuracy(world: World) -> None:
    tied = [{**row, "scores": [1] * len(row["responses"])} for row in RANKINGS]
    rankings = {**world.rows("tied.jsonl", tied), "ties": "half"}
    run = reward_model.train(config_of(world, rankings=rankings, validation_rankings=rankings))
    (line,) = metrics_of(run)
    assert "accuracy" not in line and math.isfinite(line["loss"])
    (result,) = events(run, "evaluation")
    assert result["n"] == 0 and "accuracy" not in result


# --- bias -----------------------------------------------------------------------------------------

SHOWN = [{"prompt": "abc", "completion": "de"}, {"prompt": "b", "completion": "fghij.a"}]


def scores_of(path: Path | str, rows: list[dict[str, str]]) -> list[float]:
    model = RewardModel.load(ModelConfig(path=str(path)))
    letters = letters_tokenizer()
    groups = [
        Group(letters.encode(r["prompt"]), [letters.encode(r["completion"] + "<eos>")])
        for r in rows
    ]
    return model.scores(Batch.of(groups)).tolist()


def test_demonstrations_score_0_on_average_after_loading(world: World) -> None:
    rankings = world.rows("rankings.jsonl", RANKINGS)
    shown = {
        "demonstrations": world.rows("shown.jsonl", SHOWN),
        "optimizer": {"learning_rate": 0.01},
    }
    run = reward_model.train(config_of(world, rankings=rankings, **shown, tokens_per_micro_batch=9))
    scores = scores_of(run / "final", SHOWN)
    assert sum(scores) / 2 == pytest.approx(0, abs=1e-5)
    assert abs(scores[0]) > 1e-3
    bias = json.loads((run / "final" / "config.json").read_text())["reward_bias"]
    (event,) = [e for e in events(run, "events") if e["kind"] == "bias_shift"]
    assert event["bias"] == bias != 0
    # Plain transformers loads the model; its logits lack the bias and nothing else.
    plain = AutoModelForSequenceClassification.from_pretrained(run / "final")
    assert plain.config.reward_bias == bias
    logits = [logit(plain, f"{r['prompt']}{r['completion']}<eos>") for r in SHOWN]
    assert scores == pytest.approx([x + bias for x in logits], abs=1e-5)


def test_bias_is_kept_by_saving_and_shifted_again_by_training_again(
    world: World, tmp_path: Path
) -> None:
    model = RewardModel.load(ModelConfig(path=world.reward_model()))
    model.bias = 2.5
    model.save(tmp_path / "biased")
    plain, biased = scores_of(world.reward_model(), SHOWN), scores_of(tmp_path / "biased", SHOWN)
    assert biased == pytest.approx([x + 2.5 for x in plain], abs=1e-6)
    options = {"model": {"path": str(tmp_path / "biased")}, "run": world.run()}
    run = reward_model.train(
        config_of(world, **options, demonstrations=world.rows("shown.jsonl", SHOWN))
    )
    assert sum(scores_of(run / "final", SHOWN)) == pytest.approx(0, abs=1e-5)
    kept = reward_model.train(config_of(world, **options | {"run": world.run()}))
    assert json.loads((kept / "final" / "config.json").read_text())["reward_bias"] == 2.5


def test_bias_does_not_change_while_the_model_trains(world: World) -> None:
    run = {**world.run(), "checkpoints": {"best": "loss", "best_is": "lowest", "steps": 1}}
    options = {
        "center": 0.3, "epochs": 3.0, "examples_per_step": 2, "evaluate_every": 1,
        "validation_pairs": world.rows("valid.jsonl", PAIRS[:2]),
        "optimizer": {"learning_rate": 0.01},
    }  # fmt: skip
    shown = {"demonstrations": world.rows("shown.jsonl", SHOWN)}
    shifted = reward_model.train(config_of(world, run=run, **options, **shown))
    plain = reward_model.train(config_of(world, run=world.run(), **options))
    assert metrics_of(shifted) == metrics_of(plain)
    assert sum(scores_of(shifted / "best", SHOWN)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("bias", ["2.5", True, None, float("nan"), [1.0]])
def test_bias_in_a_checkpoint_that_is_no_number_is_refused(
    world: World, tmp_path: Path, bias: Any
) -> None:
    shutil.copytree(world.reward_model(), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "reward_bias": bias}))
    with pytest.raises(ModelError, match=r"config.json has reward_bias = .*write a finite number"):
        RewardModel.load(ModelConfig(path=str(tmp_path / "model")))


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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "give either pairs or rankings"),
        (["pairs", "steps"], "only one of them"),
        (["pairs", "rankings"], "only one of them"),
        (["pairs", "validation_steps"], "it goes with steps; for pairs write validation_pairs"),
        (["rankings", "validation_pairs"], "for rankings write validation_rankings"),
        (["steps", "demonstrations"], "whose zero is a probability of one half"),
    ],
)
def test_pairs_rankings_or_steps_and_only_one_of_them(
    world: World, names: list[str], message: str
) -> None:
    section = world.rows("steps.jsonl", STEPS)
    with pytest.raises(ValueError, match=message):
        config_of(world, **({"pairs": None} | dict.fromkeys(names, section)))
