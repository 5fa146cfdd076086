"""The moving average of the weights: its recurrence, its precision, and what is measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import World
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from trivium.algorithms import dpo, grpo, ppo, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.errors import ConfigurationError
from trivium.hf.loading import trained_parameters
from trivium.hf.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.training.ema import WeightAverage
from trivium.training.optimizer import Optimizer
from trivium.training.optimizer_config import OptimizerConfig

ROWS = [{"prompt": "a", "completion": "bcd"}, {"prompt": "ef", "completion": "gh"}]
PAIRS = [{"prompt": "a", "chosen": "bc", "rejected": "d"}]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def weights(path: Path | str) -> dict[str, Tensor]:
    return load_file(Path(path) / "model.safetensors")


def close(mine: dict[str, Tensor], theirs: dict[str, Tensor], **options: Any) -> None:
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], **options)


def sft_config(world: World, **options: Any) -> SFTConfig:
    given = {
        "model": {"path": world.path}, "data": world.rows("rows.jsonl", ROWS), "run": world.run(),
        "optimizer": {"learning_rate": 0.01}, "steps": 1, "ema_decay": 0.75,
    }  # fmt: skip
    return SFTConfig(**(given | options))


def test_average_is_the_recurrence_over_the_weights_of_every_step(world: World) -> None:
    policy = Policy.load(ModelConfig(path=world.path))
    average = WeightAverage(policy, 0.9)
    (*_, weight) = trained_parameters(policy.model)
    expected = weight.detach().double().clone()
    for step in range(5):
        with torch.no_grad():
            weight.add_(0.1 * (step + 1))
        average.update({})
        expected = 0.9 * expected + 0.1 * weight.detach().double()
    torch.testing.assert_close(average.average[-1].double(), expected, atol=1e-6, rtol=0)
    assert average.updates == 5
    assert average.state_dict()["average"][-1] is average.average[-1]


def test_half_precision_weights_are_averaged_in_float32_from_their_float32_copies(
    world: World,
) -> None:
    policy = Policy.load(ModelConfig(path=world.path, dtype="bfloat16"))
    parameters = trained_parameters(policy.model)
    average = WeightAverage(policy, 0.5)
    optimizer = Optimizer([(OptimizerConfig(), parameters)], 1, average=average)
    before = [p.detach().float() for p in parameters]
    with torch.no_grad():
        for parameter in parameters:
            # An update that bfloat16 cannot hold.
            optimizer.masters.of[parameter].add_(2**-12)
    optimizer.masters.round_()
    average.update(optimizer.masters.of)
    assert all(x.dtype == torch.float32 for x in average.average)
    for found, start in zip(average.average, before, strict=True):
        torch.testing.assert_close(found, start + 2**-13, atol=1e-7, rtol=0)


def test_own_weights_come_back_to_the_last_bit_also_after_an_error(world: World) -> None:
    policy = Policy.load(ModelConfig(path=world.path))
    average = WeightAverage(policy, 0.5)
    for value in average.average:
        value.zero_()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(KeyError), average.applied():
        assert not any(bool(p.any()) for p in trained_parameters(policy.model))
        raise KeyError
    after = policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_decays_that_average_nothing_are_refused(world: World, decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        sft_config(world, ema_decay=decay)


def test_average_is_saved_beside_the_weights(world: World) -> None:
    run = sft.train(sft_config(world))
    first, last = weights(world.path), weights(run / "final")
    expected = {name: 0.75 * first[name] + 0.25 * last[name] for name in first}
    close(weights(run / "ema"), expected, atol=1e-6, rtol=0)
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert AutoModelForCausalLM.from_pretrained(run / "ema").config.model_type == "llama"
    assert not (sft.train(sft_config(world, ema_decay=None)) / "ema").exists()


def test_adapters_are_averaged_by_themselves(world: World) -> None:
    run = sft.train(sft_config(world, model={"path": world.path, "lora": {"rank": 2}}))
    last, averaged = (
        load_file(run / name / "adapter" / "adapter_model.safetensors") for name in ("final", "ema")
    )
    for name in last:
        if "lora_B" in name:  # It starts at 0.
            torch.testing.assert_close(averaged[name], 0.25 * last[name], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("method", ["ppo", "grpo", "dpo", "sft"])
def test_every_method_evaluates_and_saves_the_average(world: World, method: str) -> None:
    evaluation = {"data": world.prompts, "samples": 2, "max_tokens": 5, "every": 1}
    evaluation["rewards"] = world.reward("letters")
    shared = {
        "optimizer": {"learning_rate": 0.05}, "run": world.run(), "ema_decay": 0.9,
        "evaluation": evaluation,
    }  # fmt: skip
    model = {"model": {"path": world.path}}
    run = {
        "ppo": lambda: ppo.train(PPOConfig(**world.on_policy(**shared, steps=2))),
        "grpo": lambda: grpo.train(GRPOConfig(**world.on_policy(**shared, steps_per_iteration=2))),
        "dpo": lambda: dpo.train(
            DPOConfig(**model, **shared, data=world.rows("pairs.jsonl", PAIRS), epochs=2.0)
        ),
        "sft": lambda: sft.train(
            SFTConfig(**model, **shared, data=world.rows("rows.jsonl", ROWS), steps=2)
        ),
    }[method]()
    start, *_, last = (
        json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()
    )
    names = ["greedy", "sampled", "sampled_low", "length", *(["kl"] if method != "sft" else [])]
    assert [start[f"ema/{name}"] for name in names] == [start[name] for name in names]
    assert any(last[f"ema/{name}"] != last[name] for name in names)
    if method != "sft":
        # With a decay of 0.9, the average has moved less from the reference.
        assert 0 <= last["ema/kl"] < last["kl"]
    first, final, ema = weights(world.path), weights(run / "final"), weights(run / "ema")
    moved = {name: float((x - first[name]).norm()) for name, x in final.items()}
    assert all(float((ema[n] - first[n]).norm()) < m for n, m in moved.items() if m > 0)


@pytest.mark.parametrize(("metric", "name"), [("ema/sampled", "ema"), ("sampled", "final")])
def test_best_model_is_the_average_if_its_metric_decides(
    world: World, metric: str, name: str
) -> None:
    run = {"checkpoints": {"best": metric, "steps": 1}, **world.run()}
    evaluation = {"data": world.prompts, "at_start": False, "max_tokens": 5}
    evaluation["rewards"] = world.reward("letters")
    trained = sft.train(sft_config(world, run=run, evaluation=evaluation, steps=2))
    close(weights(trained / "best"), weights(trained / name), atol=0, rtol=0)


def test_best_by_an_average_that_is_not_measured_names_the_metrics(world: World) -> None:
    run = {"checkpoints": {"best": "ema/sampled"}, **world.run()}
    evaluation = {"data": world.prompts, "max_tokens": 5, "rewards": world.reward("letters")}
    config = sft_config(world, run=run, evaluation=evaluation, ema_decay=None)
    with pytest.raises(ConfigurationError, match=r"best = ema/sampled.*measure n, greedy"):
        sft.train(config)
