"""Rollouts of empty responses raise an alarm at the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import EOS, World, metrics_of
from transformers import AutoModelForCausalLM

from trivium.algorithms import grpo, ppo
from trivium.runs.store import read_events

SILENCE = "def silent(prompts, responses): return [float(not r) for r in responses]"


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Create a world whose model ends every response with its first token."""
    world = World(tmp_path_factory.mktemp("silent"), "phi")
    model = AutoModelForCausalLM.from_pretrained(world.path)
    with torch.no_grad():
        model.lm_head.bias[EOS] += 1000.0
    model.save_pretrained(world.path)
    return world


def reward(world: World) -> list[dict[str, Any]]:
    path = world.directory / "silence.py"
    path.write_text(SILENCE)
    return [{"function": f"{path}:silent", "timeout": None}]


def alarms(run: Path) -> list[tuple[str, int]]:
    return [(e["monitor"], e["step"]) for e in read_events(run) if e["kind"] == "alarm"]


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_responses_without_text_raise_an_alarm_at_the_first_step(
    silent: World, method: str
) -> None:
    config_values = silent.on_policy() | {"rewards": reward(silent)}
    if method == "grpo":
        run = grpo.train(grpo.GRPOConfig(**config_values, steps_per_iteration=2))
    else:
        run = ppo.train(ppo.PPOConfig(**config_values, steps=2))
    first, second = metrics_of(run)
    assert (first["length/empty"], second["length/empty"]) == (1.0, 1.0)
    assert first["length/mean"] == 1.0
    assert ("empty", 1) in alarms(run)
    assert alarms(run).count(("empty", 2)) == 0


def test_responses_with_text_are_not_called_empty(tmp_path: Path) -> None:
    world = World(tmp_path)
    run = grpo.train(grpo.GRPOConfig(**world.on_policy(), steps_per_iteration=1))
    (metrics,) = metrics_of(run)
    assert metrics["length/empty"] < 0.5
    assert "empty" not in [monitor for monitor, _ in alarms(run)]
