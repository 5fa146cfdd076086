"""`trivium memory`: prediction from the run's own data, and micro-batches that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.tiny_models import World

from trivium.cli import main
from trivium.commands import COMMANDS, memory
from trivium.compare.memory import _lengths
from trivium.jobs.job import Job
from trivium.memory import fit
from trivium.memory import lengths as lengths_module
from trivium.memory.fit import FREE_SHARE, free_bytes, largest_fitting_limit, smaller_limits
from trivium.memory.lengths import data_lengths
from trivium.memory.report import Lengths
from trivium.memory.stages import predict
from trivium.runs.store import read_samples

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def configured(kind: str, **settings: Any) -> Any:
    return COMMANDS[kind].config_class().model_validate(settings)


def grpo(world: World, **options: Any) -> Any:
    settings = {"prompts_per_step": 16, "responses_per_prompt": 8, "sampling": {"max_tokens": 40}}
    return configured("grpo", **world.on_policy(**(settings | options)))


# --- Lengths of the data --------------------------------------------------------------------------


def test_prompts_are_measured_and_responses_have_the_maximum_length(world: World) -> None:
    data = world.rows("counted.jsonl", [{"prompt": "ab"}, {"prompt": "abcde"}])
    expected = Lengths((2, 5), (40,))
    assert data_lengths("grpo", grpo(world, data=data)) == expected
    settings = world.on_policy(data=data, sampling={"max_tokens": 40})
    assert data_lengths("ppo", configured("ppo", **settings)) == expected
    online = {"data": data, "rewards": world.reward("letters"), "sampling": {"max_tokens": 40}}
    config = configured("dpo", model={"path": world.path}, online={**online, "steps": 1})
    assert data_lengths("dpo", config) == expected


def test_pairs_and_demonstrations_are_measured_with_the_held_out_share(world: World) -> None:
    texts = [
        {"prompt": "ab", "chosen": "cde", "rejected": "f"},
        {"prompt": "a", "chosen": "b", "rejected": "cd"},
        {"prompt": "abc", "chosen": "d", "rejected": "e"},
    ]
    pairs = world.rows("pairs.jsonl", texts)
    model = {"path": world.path}
    # Each response has one more token, EOS.
    expected = Lengths((2, 1, 3), (4, 2, 2, 3, 2, 2))
    assert data_lengths("dpo", configured("dpo", model=model, data=pairs)) == expected
    config = configured("reward-model", model=model, pairs=pairs, held_out_share=0.4)
    assert data_lengths("reward-model", config) == Lengths((2, 1, 3), expected.responses, 2)
    config = configured("reward-model", model=model, pairs=pairs, validation_pairs=pairs)
    assert data_lengths("reward-model", config).held_out == 3
    data = world.rows("sft.jsonl", [{"prompt": "ab", "completion": "cde"}])
    config = configured("sft", model=model, data=data)
    assert data_lengths("sft", config) == Lengths((2,), (4,))
    config = configured("sft", model=model, data=data, validation=data)
    assert data_lengths("sft", config).held_out == 1


def test_labeled_steps_are_measured(world: World) -> None:
    rows = [{"prompt": "ab", "completions": ["cd", "e"], "labels": [True, False]}] * 10
    config = configured(
        "reward-model", model={"path": world.path}, steps=world.rows("steps.jsonl", rows)
    )
    lengths = data_lengths("reward-model", config)
    assert lengths == Lengths((2,) * 10, (5,) * 10, 1)  # Each step ends with a separator.


def test_only_the_first_examples_are_measured(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths_module, "MAX_EXAMPLES", 2)
    prompts = world.rows("many.jsonl", [{"prompt": "a" * n} for n in (1, 2, 3)])
    assert data_lengths("grpo", grpo(world, data=prompts)).prompts == (1, 2)
    rows = [{"prompt": "a" * n, "completion": "b" * n} for n in (1, 2, 3)]
    texts = world.rows("more.jsonl", rows)
    config = configured("sft", model={"path": world.path}, data=texts, validation=texts)
    assert data_lengths("sft", config) == Lengths((1, 2), (2, 3), 3)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_comparison_predicts_from_the_responses_of_its_measured_step(
    world: World, tmp_path: Path, method: str
) -> None:
    settings = world.on_policy(responses_per_prompt=4, sampling={"max_tokens": 40})
    settings["run"] = {"directory": str(tmp_path / "run"), "samples_every": 1}
    once = {"steps": 1} if method == "ppo" else {"iterations": 1, "steps_per_iteration": 1}
    run = COMMANDS[method].load()(configured(method, **settings, **once))
    lengths = _lengths(Job(method, method, run, settings), configured(method, **settings))
    sampled = [row["length"] for row in read_samples(run) if row["drawn"] == "training"]
    assert lengths.responses == tuple(sampled) and min(sampled) < 40
    assert lengths.prompts == data_lengths(method, configured(method, **settings)).prompts


# --- Micro-batches --------------------------------------------------------------------------------


def test_bounds_are_halved_down_to_one_prompt_with_its_responses() -> None:
    lengths = Lengths((100, 300), (50, 20))
    assert list(smaller_limits(4096, lengths)) == [2048, 1024, 512]
    assert list(smaller_limits(800, lengths)) == [400]
    assert list(smaller_limits(799, lengths)) == []


def test_largest_micro_batch_that_fits_is_found(world: World) -> None:
    config = grpo(world, prompts_per_step=2, tokens_per_micro_batch=4096)
    lengths = Lengths((400,), (80,))

    def needed(bound: int) -> int:
        changed = config.model_copy(update={"tokens_per_micro_batch": bound})
        return predict("grpo", changed, lengths).bytes

    full, half, quarter = needed(4096), needed(2048), needed(1024)
    assert quarter < half < full
    found = largest_fitting_limit("grpo", config, lengths, half)
    assert found is not None and (found[0], found[1].bytes) == (2048, half)
    found = largest_fitting_limit("grpo", config, lengths, half - 1)
    assert found is not None and found[0] == 1024
    found = largest_fitting_limit("grpo", config, lengths, full)
    assert found is not None and found[0] == 2048
    assert largest_fitting_limit("grpo", config, lengths, 1) is None


@pytest.mark.parametrize(
    ("share", "bound", "advice"),
    [
        (1.01, 4096, "It fits."),
        (0.99, 4096, "With tokens_per_micro_batch: 2048 it needs"),
        (1e-6, 128, "No tokens_per_micro_batch makes it fit: set model.gradient_checkpointing"),
    ],
)
def test_advice_depends_on_the_free_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, share: float, bound: int, advice: str
) -> None:
    config = grpo(world, tokens_per_micro_batch=bound)
    needed = predict("grpo", config, data_lengths("grpo", config)).bytes
    monkeypatch.setattr(memory, "free_bytes", lambda _: int(share * needed / FREE_SHARE))
    report = memory.run("grpo", config)
    assert advice in report.advice
    assert f"{needed / 2**20:,.0f} MiB at its peak" in report.advice


def test_advice_leaves_a_tenth_of_the_free_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = grpo(world, tokens_per_micro_batch=4096)
    lengths = data_lengths("grpo", config)
    half = config.model_copy(update={"tokens_per_micro_batch": 2048})
    monkeypatch.setattr(memory, "free_bytes", lambda _: predict("grpo", half, lengths).bytes + 1)
    assert "With tokens_per_micro_batch: 1024 it needs" in memory.run("grpo", config).advice


def test_free_memory_is_that_of_the_system_or_the_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    available = psutil.virtual_memory().available
    monkeypatch.setattr(fit, "CONTROL_GROUP", tmp_path)
    assert abs(free_bytes(CPU) - available) < available / 2
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 300\n")
    assert free_bytes(CPU) > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(CPU) == 4300
    (tmp_path / "memory.max").write_text("500\n")
    assert free_bytes(CPU) == 0


# --- The command ----------------------------------------------------------------------------------


def test_command_prints_every_stage_and_the_advice(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "sft.yaml"
    data = world.rows("shown.jsonl", [{"prompt": "ab", "completion": "cde"}])
    path.write_text(f"model: {{path: {world.path}}}\ndata: {{path: {data['path']}}}\n")
    assert main(["memory", "sft", str(path), "examples_per_step=2"]) == 0
    shown = capsys.readouterr().out
    assert "prompts of up to 2 and responses of up to 4 tokens" in shown
    assert "load policy" in shown and "update" in shown and "It fits." in shown
    assert not (tmp_path / "runs").exists()


def test_faults_are_reported_as_by_the_training_command(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(f"model: {{path: {world.path}}}\ndata: {{path: none.jsonl}}\n")
    assert main(["memory", "sft", str(path)]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["memory", "sample", str(path)])
    assert "choose from" in capsys.readouterr().err
