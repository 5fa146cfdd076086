"""Before the first update nothing has moved, exactly; and the same seed gives the same bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import STILL, World, metrics_of

from trivium.algorithms import dpo, grpo, ppo, reward_model, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.policy_metrics import policy_metrics

FAST = {"learning_rate": 0.01}
REUSED = {"epochs": 2, "minibatches": 2, "tokens_per_micro_batch": 30}
PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "efgh"},
    {"prompt": "b", "chosen": "fghij.a", "rejected": "f"},
    {"prompt": "aaaa", "chosen": "c", "rejected": "cd"},
    {"prompt": "ij", "chosen": "abcdefgh", "rejected": "a.a.a."},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[StepResult]:
    """Every optimizer step's result, in order."""
    kept: list[StepResult] = []
    step = Optimizer.step

    def step_and_keep(optimizer: Optimizer, work: Any) -> StepResult:
        kept.append(step(optimizer, work))
        return kept[-1]

    monkeypatch.setattr(Optimizer, "step", step_and_keep)
    return kept


def run_ppo(world: World, **options: Any) -> Path:
    critic = {"model": {"path": world.reward_model()}, "optimizer": STILL}
    given = world.on_policy("letters", "pairs") | {"critic": critic, "optimizer": FAST, "steps": 1}
    return ppo.train(PPOConfig(**(given | REUSED | options)))


def run_grpo(world: World, **options: Any) -> Path:
    given = world.on_policy() | {"optimizer": FAST, "steps_per_iteration": 1}
    return grpo.train(GRPOConfig(**(given | REUSED | options)))


def run_dpo(world: World, **options: Any) -> Path:
    given = {
        "model": {"path": world.path},
        "data": world.rows("pairs.jsonl", PAIRS),
        "run": world.run(),
        "optimizer": FAST,
        "tokens_per_micro_batch": 30,
    }
    return dpo.train(DPOConfig(**(given | options)))


def run_sft(world: World, **options: Any) -> Path:
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    given = {
        "model": {"path": world.path},
        "data": world.rows("demonstrations.jsonl", rows),
        "run": world.run(),
        "optimizer": FAST,
        "examples_per_step": 2,
    }
    return sft.train(SFTConfig(**(given | options)))


def run_reward_model(world: World, **options: Any) -> Path:
    given = {
        "model": {"path": world.path},
        "pairs": world.rows("pairs.jsonl", PAIRS),
        "run": world.run(),
        "optimizer": FAST,
        "examples_per_step": 2,
        "held_out_share": 0.3,
    }
    return reward_model.train(RewardModelConfig(**(given | options)))


def model_of(world: World, lora: bool) -> dict[str, Any]:
    return {"path": world.path, "lora": {"rank": 2} if lora else None}


# --- first-step identities ----------------------------------------------------------------------


def assert_nothing_has_moved(first: StepResult, run: Path) -> None:
    seen = first.observed
    assert len(seen["logprobs_T"]) > 10
    assert torch.equal(seen["logprobs_T"], seen["old_logprobs_T"])
    metrics = policy_metrics(seen)
    assert metrics["policy/ratio_min"] == metrics["policy/ratio_max"] == 1.0
    assert metrics["policy/clip_low"] == metrics["policy/clip_high"] == 0.0
    assert metrics["policy/kl_old"] == 0.0
    line = metrics_of(run)[0]
    assert line["kl/k1"] == line["kl/k3"] == line["kl/response"] == 0.0


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_ppo_starts_at_ratio_one_and_kl_zero_exactly(
    world: World, results: list[StepResult], kind: str, lora: bool
) -> None:
    critic = {"kind": kind, "optimizer": STILL}
    run = run_ppo(world, critic=critic, model=model_of(world, lora), steps=2)
    assert_nothing_has_moved(results[0], run)
    assert len(results) == 8
    assert not torch.equal(results[1].observed["logprobs_T"], results[1].observed["old_logprobs_T"])
    assert metrics_of(run)[1]["kl/response"] != 0.0


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("surrogate", ["clipped", "gspo", "cispo"])
def test_grpo_starts_at_ratio_one_and_kl_zero_exactly(
    world: World, results: list[StepResult], surrogate: str, lora: bool
) -> None:
    options = {"surrogate": surrogate, "steps_per_iteration": 2}
    run = run_grpo(world, model=model_of(world, lora), **options)
    assert_nothing_has_moved(results[0], run)
    assert not torch.equal(results[1].observed["logprobs_T"], results[1].observed["old_logprobs_T"])
    assert metrics_of(run)[1]["kl/response"] != 0.0


def test_every_minibatch_of_the_first_epoch_starts_at_ratio_one_exactly(
    world: World, results: list[StepResult]
) -> None:
    run_grpo(world, epochs=1, minibatches=4, optimizer={"learning_rate": 1e-30})
    run_ppo(world, epochs=1, minibatches=4, optimizer={"learning_rate": 1e-30})
    assert len(results) == 8
    for result in results:
        assert torch.equal(result.observed["logprobs_T"], result.observed["old_logprobs_T"])


def test_on_policy_grpo_stays_at_ratio_one_at_every_step(
    world: World, results: list[StepResult]
) -> None:
    run = run_grpo(world, epochs=1, minibatches=1, steps_per_iteration=3)
    for result in results:
        assert torch.equal(result.observed["logprobs_T"], result.observed["old_logprobs_T"])
    assert [line["policy/ratio_max"] for line in metrics_of(run)] == [1.0] * 3


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_dpos_first_loss_is_the_logarithm_of_two(world: World, lora: bool) -> None:
    line = metrics_of(run_dpo(world, model=model_of(world, lora)))[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["implicit_reward/margin"] == pytest.approx(0.0, abs=1e-6)
    assert line["implicit_reward/gradient_weight"] == pytest.approx(0.5, abs=1e-6)
    assert line["implicit_reward/accuracy"] == 0.5


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"loss": "ipo", "beta": 0.5}, 1.0),
        ({"loss": "hinge"}, 1.0),
        ({"loss": "robust", "label_smoothing": 0.2}, math.log(2)),
        ({"label_smoothing": 0.2}, math.log(2)),
        ({"length_normalized": True}, math.log(2)),
        ({"target_margin": 0.5}, math.log(1 + math.exp(0.5))),
    ],
)
def test_first_losses_of_the_variants(world: World, options: dict[str, Any], loss: float) -> None:
    assert metrics_of(run_dpo(world, **options))[0]["loss"] == pytest.approx(loss, abs=2e-5)


def test_evaluation_before_training_measures_no_distance_from_the_reference(world: World) -> None:
    evaluation = {"data": world.prompts, "samples": 3, "max_tokens": 8}
    run = run_grpo(world, evaluation=evaluation)
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["kl"] == 0.0
    assert lines[1]["kl"] > 0.0


def test_new_reward_model_starts_at_the_logarithm_of_two(world: World) -> None:
    line = metrics_of(run_reward_model(world))[0]
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert line["accuracy"] == 0.5


# --- seeds --------------------------------------------------------------------------------------


def bits(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))
    }


METHODS = {
    "sft": (run_sft, {"epochs": 2.0}),
    "reward model": (run_reward_model, {"epochs": 2.0}),
    "dpo": (run_dpo, {"epochs": 2.0, "pairs_per_step": 2}),
    "ppo": (run_ppo, {"steps": 2}),
    "ppo, shared critic": (run_ppo, {"critic": {"kind": "shared", "optimizer": FAST}}),
    "grpo": (run_grpo, {"iterations": 2, "steps_per_iteration": 2}),
    "grpo with adapters": (run_grpo, {"adapters": True}),
}


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_bits_and_another_seed_others(world: World, method: str) -> None:
    train, options = METHODS[method]
    if "adapters" in options:
        options = {"model": model_of(world, lora=True)}
    runs = [train(world, run=world.run(seed=seed), **options) for seed in (4, 4, 5)]
    assert bits(runs[0]).keys() >= {"final/model.safetensors"}
    assert bits(runs[0]) == bits(runs[1])
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    assert bits(runs[0]) != bits(runs[2])
    assert metrics_of(runs[0]) != metrics_of(runs[2])


def test_online_dpo_is_decided_by_its_seed_too(world: World) -> None:
    online = {
        "data": world.prompts,
        "rewards": world.reward("letters"),
        "steps": 2,
        "sampling": {"max_tokens": 8},
    }
    runs = [
        run_dpo(world, data=None, online=online, run=world.run(seed=seed)) for seed in (1, 1, 2)
    ]
    assert bits(runs[0]) == bits(runs[1])
    assert metrics_of(runs[0]) == metrics_of(runs[1])
    assert bits(runs[0]) != bits(runs[2])
