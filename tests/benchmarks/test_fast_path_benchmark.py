"""The script that measures the pieces of the CPU fast path (``benchmarks/fast_path.py``).

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

from trivium.models.cpu import PIECES
from trivium.models.cpu.linear import matmul_backend
from trivium.models.kernels import kernels_of

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


def test_one_piece_is_measured_in_every_kind_of_work(model: str, tmp_path: Path) -> None:
    output = tmp_path / "gains.json"
    options = ["--only", "gated_mlp", "--prompts", "2", "--responses", "2", "--repetitions", "2"]
    command = [sys.executable, str(SCRIPT), "--model", model, "--output", str(output), *options]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, _, row = done.stdout.splitlines()
    assert header == f"| piece | {' | '.join(WORK)} |"
    assert row.startswith("| gated_mlp | ") and row.count("×") == len(WORK)
    report = json.loads(output.read_text())
    assert {"commit", "cpu", "torch"} <= report.keys()
    assert [result["work"] for result in report["results"]] == WORK
    for result in report["results"]:
        assert result["piece"] == "gated_mlp" and len(result["costs"]) == 2
        assert min(min(pair) for pair in result["costs"]) > 0
        assert 0 < result["low"] <= result["gain"] <= result["high"]


def test_gain_is_the_cost_without_a_piece_over_the_cost_with_it(fast_path: ModuleType) -> None:
    result = fast_path.Result("norms", "sft", [(2.0, 3.0), (2.0, 5.0), (4.0, 4.0)])
    assert result.ratios == [1.5, 2.5, 1.0]
    assert fast_path.table([result]).splitlines()[-1] == "| norms | 1.50× (1.00 – 2.50) |"


@pytest.mark.parametrize("kind", WORK)
def test_work_runs_without_any_piece_and_keeps_the_matmul_backend(
    fast_path: ModuleType, model: str, kind: str
) -> None:
    before = matmul_backend.name
    for pieces in (PIECES, frozenset[str]()):
        step = fast_path.WORK[kind](fast_path.Side(model, pieces, prompts=1, responses=2))
        step()
        step()
    assert matmul_backend.name == before


def test_every_model_of_a_step_has_the_same_pieces(fast_path: ModuleType, model: str) -> None:
    pieces = PIECES - {"norms"}
    side = fast_path.Side(model, pieces, prompts=1, responses=2)
    policy = side.policy()
    config = fast_path.PPOConfig.model_validate(side.on_policy_settings())
    critic, reference = side.critic(config, policy), fast_path.Reference(policy)
    for network in (policy, critic.model, reference.frozen_policy):
        assert kernels_of(network.backbone).pieces == pieces
