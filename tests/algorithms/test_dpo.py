"""DPO's loss and loop on a tiny model, offline and online."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    World,
    assert_same_parameter_gradients,
    differentiable_logprobs,
    metrics_of,
    perturb,
    plain_logprobs,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from trivium.algorithms import dpo
from trivium.algorithms.dpo import Online, PairData, best_and_worst, with_reference
from trivium.algorithms.dpo_config import DPOConfig
from trivium.data.group import Group
from trivium.data.oom import score_logprobs
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import TrainingError
from trivium.hf.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import Scores
from trivium.rollout.rollouts import Rollouts
from trivium.training.optimizer import StepResult

FAST = {"learning_rate": 0.003}
PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "efgh"},
    {"prompt": "b", "chosen": "fghij.a", "rejected": "f"},
    {"prompt": "aaaa", "chosen": "c", "rejected": "cd"},
    {"prompt": "ij", "chosen": "abcdefgh", "rejected": "a.a.a."},
]
GROUPS = [
    Group([1, 2, 3], [[4, 5, 0], [5, 6, 7, 8, 0]]),
    Group([2], [[6, 7, 8, 9, 10], [6]]),
    Group([1, 1], [[3, 0], [3, 4, 0]]),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def config_of(world: World, **options: Any) -> DPOConfig:
    given = {
        "model": {"path": world.path},
        "data": world.rows("pairs.jsonl", PAIRS),
        "run": world.run(),
        "optimizer": FAST,
    }
    return DPOConfig(**(given | options))


def online_of(world: World, **options: Any) -> dict[str, Any]:
    given = {"data": world.prompts, "rewards": world.reward("letters"), "steps": 1}
    return given | {"sampling": {"max_tokens": 8}} | options


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(options: dict[str, Any], new: list[Tensor], ref: list[Tensor]) -> Tensor:
    """The mean loss of pairs, from the log-probs of each response's tokens."""
    losses = []
    beta, smoothing = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    for at in range(0, len(new), 2):
        ratios = []
        for mine, theirs in zip(new[at : at + 2], ref[at : at + 2], strict=True):
            row = mine if options.get("reference_free") else mine - theirs
            ratios.append(row.mean() if options.get("length_normalized") else row.sum())
        h = ratios[0] - ratios[1]
        right, wrong = (1 + (-beta * h).exp()).log(), (1 + (beta * h).exp()).log()
        loss = (1 - smoothing) * right + smoothing * wrong
        match options.get("loss", "sigmoid"):
            case "ipo":
                loss = (h - 1 / (2 * beta)) ** 2
            case "hinge":
                loss = 1 - beta * h if beta * h < 1 else 0 * h
            case "robust":
                loss = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
        if "target_margin" in options:
            loss = (1 + (options["target_margin"] - beta * h).exp()).log()
        losses.append(loss - options.get("sft_coefficient", 0.0) * new[at].mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7},
        {"loss": "ipo"},
        {"loss": "hinge", "beta": 0.4},
        {"loss": "robust", "label_smoothing": 0.3},
        {"label_smoothing": 0.1},
        {"length_normalized": True},
        {"length_normalized": True, "reference_free": True, "target_margin": 0.4, "beta": 2.0},
        {"sft_coefficient": 0.5},
    ],
    ids=str,
)
def test_loss_and_gradient_are_those_written_out_by_hand(
    world: World, options: dict[str, Any]
) -> None:
    config = config_of(world, **options)
    policy = Policy.load(ModelConfig(path=world.path))
    reference = Reference(policy)
    perturb(policy.model, seed=3, spread=0.05)
    pairs = with_reference(config, PairData(GROUPS), partial(score_logprobs, reference))
    assert (pairs.ref_logprobs_T is None) == config.reference_free
    total = 0.0
    for part in dpo.micro_batches(dpo.Objective.of(config), policy, pairs, max_tokens=12):
        loss, _ = part()
        loss.backward()
        total += float(loss.detach())
    lengths = pairs.lengths_N.tolist()
    plain = AutoModelForCausalLM.from_pretrained(world.path)
    ref = plain_logprobs(plain, GROUPS).split(lengths)
    perturb(plain, seed=3, spread=0.05)
    new = differentiable_logprobs(plain, GROUPS).split(lengths)
    expected = by_hand(options, list(new), list(ref))
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-4, abs=1e-5)
    assert_same_parameter_gradients(policy.model, plain, atol=2e-5)


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_metrics_are_implicit_rewards_and_the_gradient_weight(world: World, name: str) -> None:
    seen = {
        "margin_P": torch.tensor([2.0, -1.0]),
        "chosen_P": torch.tensor([1.0, 0.0]),
        "rejected_P": torch.tensor([-1.0, 1.0]),
        "logprobs_chosen_P": torch.tensor([-3.0, -5.0]),
        "logprobs_rejected_P": torch.tensor([-4.0, -8.0]),
    }
    objective = dpo.Objective.of(config_of(world, loss=name, beta=0.5))
    found = dpo.step_metrics(objective, StepResult(0.7, 1.0, 0.1, seen))
    weights = {"sigmoid": (sigmoid(-1.0) + sigmoid(0.5)) / 2, "ipo": (-4.0 + 8.0) / 2}
    expected = {
        "implicit_reward/chosen": 0.25,
        "implicit_reward/rejected": 0.0,
        "implicit_reward/margin": 0.25,
        "implicit_reward/accuracy": 0.5,
        "implicit_reward/gradient_weight": weights[name],
        "logprobs/chosen": -4.0,
        "logprobs/rejected": -6.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_chosen_responses_win_as_training_goes_on(world: World) -> None:
    lines = metrics_of(dpo.train(config_of(world, epochs=4.0)))
    assert [line["loss"] for line in lines] == sorted((x["loss"] for x in lines), reverse=True)
    assert lines[-1]["implicit_reward/accuracy"] == 1.0


def test_added_likelihood_raises_the_chosen_responses(world: World) -> None:
    found = []
    for coefficient in (0.0, 2.0):
        run = dpo.train(config_of(world, epochs=8.0, sft_coefficient=coefficient))
        lines = metrics_of(run)
        found.append(lines[-1]["logprobs/chosen"] - lines[0]["logprobs/chosen"])
    assert found[1] > found[0] + 1.0


def test_reference_is_scored_once_and_pairs_keep_their_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    hidden = Policy.hidden

    def counted(policy: Policy, batch: Any) -> Any:
        if not torch.is_grad_enabled():
            calls.append(len(batch.lengths_N))
        return hidden(policy, batch)

    monkeypatch.setattr(Policy, "hidden", counted)
    seen: dict[tuple[int, ...], list[Tensor]] = {}
    loss = dpo.loss

    def noted(config: Any, policy: Any, pairs: PairData, total: int) -> Any:
        assert pairs.ref_logprobs_T is not None
        rows = pairs.ref_logprobs_T.split(pairs.lengths_N.tolist())
        flat = [(*g.prompt, -1, *r) for g in pairs.groups for r in g.responses]
        for key, row in zip(flat, rows, strict=True):
            seen.setdefault(key, []).append(row)
        return loss(config, policy, pairs, total)

    monkeypatch.setattr(dpo, "loss", noted)
    dpo.train(config_of(world, epochs=4.0, pairs_per_step=2, tokens_per_micro_batch=20))
    assert sum(calls) == 8
    plain = AutoModelForCausalLM.from_pretrained(world.path)
    assert len(seen) == 8
    for key, rows in seen.items():
        split = key.index(-1)
        group = Group(list(key[:split]), [list(key[split + 1 :])])
        for row in rows:
            torch.testing.assert_close(row, plain_logprobs(plain, [group]), atol=1e-5, rtol=0)


# --- online -------------------------------------------------------------------------------------


def rollouts_of(outcomes: list[list[float]]) -> Rollouts:
    responses = [
        [Response([1 + j, 0], [0.0, 0.0], "eos", "") for j in range(len(group))]
        for group in outcomes
    ]
    prompts = [Prompt([i + 1], "", {}, i) for i in range(len(outcomes))]
    flat = [x for group in outcomes for x in group]
    return Rollouts(prompts, responses, Scores(flat, None, {}, {}), {})


def test_pair_is_the_best_and_the_worst_of_a_group_and_ties_make_none() -> None:
    pairs = best_and_worst(rollouts_of([[0.0, 3.0, -1.0], [2.0, 2.0, 2.0], [5.0, 4.0, 4.5]]))
    assert pairs == [Group([1], [[2, 0], [3, 0]]), Group([3], [[1, 0], [2, 0]])]


def test_rewards_that_differ_by_rounding_make_no_pair() -> None:
    assert best_and_worst(rollouts_of([[0.1, 0.1 + 1e-8, 0.1], [1.0, 1.0 + 1.2e-7]])) == []


def test_online_pairs_come_from_the_policy_as_it_is_and_the_reference_as_it_was(
    world: World,
) -> None:
    config = config_of(world, data=None, online=online_of(world))
    source = Online(config)
    policy = Policy.load(config.model)
    reference = Reference(policy)
    source.prepare(policy, reference)
    first, _ = source.pairs(1)
    perturb(policy.model, seed=3, spread=0.2)
    second, _ = source.pairs(1)
    assert first is not None
    assert second is not None
    assert second.groups != first.groups
    assert second.ref_logprobs_T is not None
    plain = AutoModelForCausalLM.from_pretrained(world.path)
    expected_T = plain_logprobs(plain, second.groups)
    torch.testing.assert_close(second.ref_logprobs_T, expected_T, atol=1e-5, rtol=0)


def test_step_without_any_pair_moves_nothing_and_is_reported(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def letters(responses):\n    return [1.0] * len(responses)\n"
    )
    config = config_of(world, data=None, online=online_of(world, steps=2))
    with pytest.raises(TrainingError, match="none of 2 steps found a pair"):
        dpo.train(config)
    assert config.run.directory is not None
    assert not (config.run.directory / "final").exists()
    lines = metrics_of(config.run.directory)
    assert [line["group/equal_rewards"] for line in lines] == [1.0, 1.0]
    assert all("loss" not in line for line in lines)


def test_reward_rises_in_online_training(world: World) -> None:
    online = online_of(world, steps=12, responses_per_prompt=16)
    run = dpo.train(config_of(world, data=None, online=online, beta=0.05))
    rewards = [line["reward/mean"] for line in metrics_of(run)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.7


def test_held_out_prompts_are_sampled_while_training(world: World) -> None:
    evaluation = {
        "data": world.prompts, "rewards": world.reward("letters"), "every": 1, "samples": 2,
        "max_tokens": 8,
    }  # fmt: skip
    run = dpo.train(config_of(world, evaluation=evaluation, epochs=2.0))
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["kl"] == 0.0
    assert lines[2]["kl"] > 0.0
    assert all(line["length"] > 0 and line["n"] == 4 for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": None}, "either data"),
        ({"online": "yes"}, "either data"),
        ({"loss": "ipo", "target_margin": 0.1}, r"target_margin\s+it goes with"),
        ({"loss": "hinge", "label_smoothing": 0.1}, r"label_smoothing\s+it goes with"),
        ({"loss": "robust"}, "needs label_smoothing"),
        ({"evaluation": "without rewards"}, "name what measures quality"),
        ({"beta": 0.0}, "beta"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    if options.get("online") == "yes":
        options = {"online": online_of(world)}
    if "evaluation" in options:
        options = {"evaluation": {"data": world.prompts}}
    with pytest.raises(ValueError, match=message):
        config_of(world, **options)


def test_online_training_cannot_be_greedy_or_counted_in_epochs(world: World) -> None:
    greedy = online_of(world, sampling={"temperature": 0.0})
    with pytest.raises(ValueError, match="would be equal and make no pair"):
        config_of(world, data=None, online=greedy)
    with pytest.raises(ValueError, match=r"online\.steps"):
        config_of(world, data=None, online=online_of(world), epochs=2.0)
