"""Models, data and cases of the speed benchmark, and its worker for Trivium.

The ratios to TRL are not tested here: they need TRL and an hour.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

SPEED = Path(__file__).resolve().parents[2] / "benchmarks" / "speed"
PROMPT, RESPONSE = 12, 8


def load(name: str) -> ModuleType:
    """Load a module of the benchmark under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"speed_{name}", SPEED / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cases = load("cases")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    worlds = load("worlds")
    directory = tmp_path_factory.mktemp("speed") / "world"
    size = worlds.Size(width=64, layers=1, vocabulary=300)
    worlds.write_world(directory, size, prompt_tokens=PROMPT, response_tokens=RESPONSE, rows=400)
    return directory


def test_every_word_of_the_data_is_one_token(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    assert len(tokenizer) == 300
    for line in (world / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(tokenizer(row["prompt"])["input_ids"]) == PROMPT
        tokens = tokenizer(row["prompt"] + row["chosen"] + "<end>")["input_ids"]
        assert len(tokens) == PROMPT + len(row["chosen"].split()) + 1
        assert tokens[-1] == tokenizer.eos_token_id


def test_response_lengths_take_all_possible_values(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    lengths = Counter(len(row["chosen"].split()) + 1 for row in rows)
    assert set(lengths) == set(range(2, RESPONSE + 1))


def test_cases_have_unique_names_and_whole_batches_for_both_sides() -> None:
    everything = [*cases.TIMES, *cases.memory(cases.TIMES), *cases.CURVES]
    assert len({case.name for case in everything}) == len(everything)
    for case in everything:
        rows = case.prompts * (case.samples if case.method in ("grpo", "ppo", "generation") else 1)
        assert rows % (case.their_rows_per_pass or rows) == 0, case.name
        assert case.steps >= 1 and case.their_steps >= 1, case.name


def run(world: Path, output: Path, case: Any) -> dict[str, Any]:
    """Return the report of Trivium's worker for a case."""
    environment = {**os.environ, "PYTHONPATH": str(SPEED.parents[1]), "OMP_NUM_THREADS": "1"}
    task = json.dumps(asdict(case) | {"seed": 0})
    command = [sys.executable, str(SPEED / "ours.py"), task, str(world), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "report.json").read_text())


def test_worker_measures_every_step_of_the_real_loop(world: Path, tmp_path: Path) -> None:
    case = replace(cases.CASES["grpo-s-32"], prompt=PROMPT, response=RESPONSE, prompts=2, steps=2)
    report = run(world, tmp_path, replace(case, samples=3, warm_up=1))
    assert len(report["seconds"]) == len(report["rates"]) == 3
    assert all(seconds > 0 for seconds in report["seconds"])
    assert all(set(rate) == {"torch", "onednn"} for rate in report["rates"])
    assert min(min(rate.values()) for rate in report["rates"]) > 1e8
    assert all(2 * 3 <= tokens <= 2 * 3 * RESPONSE for tokens in report["tokens"])
    assert all(cost > 0 for cost in report["flops"])
    assert set(report["stages"]) >= {"time/rollout", "time/update"}
    # Each prompt counts once: 2 FLOPs per weight forward, and twice that backward.
    assert min(report["flops"]) > 2 * 3 * 2 * PROMPT * 64 * 64


def test_limit_distances_use_the_matmul_rates_measured_after_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SPEED))
    results = load("results")
    case = replace(cases.CASES["dpo-s"], warm_up=1)

    def side(seconds: list[float], torch: list[float], onednn: list[float], tokens: float) -> Any:
        rates = [{"torch": t, "onednn": o} for t, o in zip(torch, onednn, strict=True)]
        report = {"seconds": seconds, "rates": rates, "seconds_before": 1.0}
        numbers = {"peak_bytes": 0, "base_bytes": 0, "flops": [9e9, 4e9, 6e9]}
        return results.Side.of(case.warm_up, report | numbers | {"tokens": [tokens] * 3})

    # Steps of 3 and 5 seconds, 1 of them before the first step, at rates of 2 and 1 GFLOP/s.
    ours = side([99, 2, 4], [9e9, 1e9, 1e9], [9e9, 2e9, 1e9], 10)
    theirs = side([99, 9, 19], [9e9, 2e9, 2e9], [9e9, 1e9, 1e9], 20)
    assert results.distances([results.Pair(case, ours, theirs)]) == pytest.approx(
        {
            "limit_distance": (3 * 2 + 5 * 1) / 2 / 5,
            "limit_distance_torch": (3 * 1 + 5 * 1) / 2 / 5,
            "their_limit_distance": (10 * 2 + 20 * 2) / 2 / (5 * 2),
            "peak_gflops": (3 * 2 + 5 * 1) / 2 / 4,
            "torch_gflops": 1.0,
        }
    )
    memory = results.distances([results.Pair(replace(case, memory=True), ours, theirs)])
    assert set(memory.values()) == {None}
