"""The script that measures the CPU fast path (``benchmarks/fast_path.py``).

Its measurements are not tested here, because they depend on the machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trivium.models.fast_path import REFERENCE, kernels_of

pytestmark = pytest.mark.fast_path
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "fast_path.py"
WORK = ["sft", "dpo", "grpo", "ppo", "sample"]


@pytest.fixture(scope="module")
def fast_path() -> ModuleType:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("fast_path_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def model(fast_path: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a tiny checkpoint."""
    world = tmp_path_factory.mktemp("fast-path") / "world"
    size = sys.modules["worlds"].Size(width=64, layers=1, vocabulary=300)
    fast_path.write_world(world, size, prompt_tokens=4, rows=1)
    return str(world / "model")


def test_every_kind_of_work_is_measured(model: str, tmp_path: Path) -> None:
    output = tmp_path / "gains.json"
    options = ["--prompts", "2", "--responses", "2", "--repetitions", "2"]
    command = [sys.executable, str(SCRIPT), "--model", model, "--output", str(output), *options]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, _, row = done.stdout.splitlines()
    assert header == f"| {' | '.join(WORK)} |" and row.count("×") == len(WORK)
    report = json.loads(output.read_text())
    assert {"commit", "cpu", "torch"} <= report.keys()
    assert [result["work"] for result in report["results"]] == WORK
    for result in report["results"]:
        assert len(result["costs"]) == 2
        assert min(min(pair) for pair in result["costs"]) > 0
        assert 0 < result["low"] <= result["gain"] <= result["high"]


def test_gain_is_the_cost_without_the_fast_path_over_the_cost_with_it(
    fast_path: ModuleType,
) -> None:
    result = fast_path.Result("sft", [(2.0, 3.0), (2.0, 5.0), (4.0, 4.0)])
    assert result.ratios == [1.5, 2.5, 1.0]
    assert fast_path.table([result]).splitlines()[-1] == "| 1.50× (1.00 – 2.50) |"


def test_all_models_of_a_side_have_its_fast_path(fast_path: ModuleType, model: str) -> None:
    for name in ("auto", "off"):
        side = fast_path.Side(model, name, prompts=1, responses=2)
        policy = side.policy()
        config = fast_path.PPOConfig.model_validate(side.on_policy_settings())
        critic, reference = side.critic(config, policy), fast_path.Reference(policy)
        for network in (policy, critic.model, reference.frozen_policy):
            assert (kernels_of(network.backbone) is REFERENCE) == (name == "off")
