"""Tests on a device that is not the CPU, where mixing devices is an error.

They run in a process of their own (``tests/test_devices.py``): a device that PyTorch knows changes
defaults everywhere, as those of activation checkpointing, and stays for the life of the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trivium
from helpers.stand_in_device import DEVICE, StandInTensor, stand_in_device
from helpers.stoppable_runs import RUNS
from helpers.tiny_models import World, metrics_of
from trivium.hf import loading


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Make ``device: auto`` the stand-in device."""
    with stand_in_device() as device:
        resolve = loading.resolve_device
        monkeypatch.setattr(
            loading, "resolve_device", lambda name: device if name == "auto" else resolve(name)
        )
        yield device


def without_fast_path(config: Any) -> Any:
    """Return the configuration with the modules of transformers, which the device has too."""
    return config.model_copy(update={"model": config.model.model_copy(update={"fast_path": "off"})})


FLOAT32, BFLOAT16 = 1e-3, 5e-2
"""Relative differences that rounding causes in a few steps."""


def differences(found: Any, expected: Any, tolerance: float = FLOAT32, at: str = "") -> list[str]:
    """Return the places where two JSON values differ by more than rounding."""
    if isinstance(expected, dict):
        missing = [f"{at}.{k}" for k in found.keys() ^ expected.keys()]
        both = found.keys() & expected.keys()
        return missing + [
            d for k in both for d in differences(found[k], expected[k], tolerance, f"{at}.{k}")
        ]
    if isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, tolerance, f"{at}[{i}]")]
    if isinstance(expected, float):
        expected = pytest.approx(expected, rel=tolerance, abs=tolerance / 10)
    return [] if found == expected else [f"{at}: {found} and {expected}"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_another_device_has_the_metrics_of_the_cpu(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    train, make_config = RUNS[name]
    world = World(tmp_path)
    train(without_fast_path(make_config(world, tmp_path / "cpu")))
    request.getfixturevalue("device")
    train(make_config(world, tmp_path / "device"))
    found, expected = (metrics_of(tmp_path / place) for place in ("device", "cpu"))
    if name == "grpo-bfloat16":  # From the second step on, rounding decides what is sampled.
        found, expected = found[:1], expected[:1]
    half = name in ("grpo-bfloat16", "sft-stochastic")
    assert differences(found, expected, BFLOAT16 if half else FLOAT32) == []


COMMANDS = {
    "evaluate": lambda config: trivium.evaluate(trivium.EvaluateConfig.model_validate(config)),
    "sample": lambda config: trivium.sample(trivium.SampleConfig.model_validate(config)),
    "pairs": lambda config: trivium.pairs(trivium.PairsConfig.model_validate(config)),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_another_device_has_the_results_of_the_cpu(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    world = World(tmp_path)
    config = {
        "model": {"path": world.path},
        "data": world.prompts,
        "rewards": world.reward("letters"),
    }
    if name == "evaluate":
        config |= {"reference": {"path": world.path}, "max_tokens": 6}
    else:
        config |= {"sampling": {"max_tokens": 6}, "samples": 3}
    if name == "pairs":
        config["keep_truncated"] = True
    suffix = ".json" if name == "evaluate" else ".jsonl"
    COMMANDS[name]({**config, "output": str(tmp_path / f"cpu{suffix}")})
    request.getfixturevalue("device")
    COMMANDS[name]({**config, "output": str(tmp_path / f"device{suffix}")})
    found, expected = (read(tmp_path / f"{place}{suffix}") for place in ("device", "cpu"))
    assert differences(found, expected) == []


def read(path: Path) -> Any:
    """Return the values of the lines of a file, or those of an evaluation."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return {key: value for key, value in json.loads(text).items() if key != "config"}


def test_the_device_refuses_tensors_of_two_devices(device: torch.device) -> None:
    here, there = torch.ones(3, device=device), torch.ones(3)
    assert isinstance(here, StandInTensor) and here.device == DEVICE
    for mixed in (lambda: here + there, lambda: there + here, lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mixed()
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(5, device=device)[torch.tensor([1, 2])] = 1.0
    with pytest.raises(TypeError, match=r"use Tensor.cpu\(\) first"):
        here.numpy()
    assert (here + 1.0).tolist() == [2.0, 2.0, 2.0]
    assert (here.cpu() + there).device == torch.device("cpu")
