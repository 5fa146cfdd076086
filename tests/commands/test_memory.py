"""`trivium memory`: what a run would need is predicted of its own data, and what fits is found."""

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
from trivium.compare.plan import Job
from trivium.memory import fit
from trivium.memory import lengths as lengths_module
from trivium.memory.fit import SHARE, fitting, free_bytes, smaller_bounds
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


# --- The data's lengths ---------------------------------------------------------------------------


def test_prompts_are_counted_and_responses_are_as_long_as_they_may_be(world: World) -> None:
    data = world.rows("counted.jsonl", [{"prompt": "ab"}, {"prompt": "abcde"}])
    expected = Lengths((2, 5), (40,))
    assert data_lengths("grpo", grpo(world, data=data)) == expected
    settings = world.on_policy(data=data, sampling={"max_tokens": 40})
    assert data_lengths("ppo", configured("ppo", **settings)) == expected
    online = {"data": data, "rewards": world.reward("letters"), "sampling": {"max_tokens": 40}}
    config = configured("dpo", model={"path": world.path}, online={**online, "steps": 1})
    assert data_lengths("dpo", config) == expected


def test_pairs_and_demonstrations_are_counted_with_what_is_held_out(world: World) -> None:
    texts = [
        {"prompt": "ab", "chosen": "cde", "rejected": "f"},
        {"prompt": "a", "chosen": "b", "rejected": "cd"},
        {"prompt": "abc", "chosen": "d", "rejected": "e"},
    ]
    pairs = world.rows("pairs.jsonl", texts)
    model = {"path": world.path}
    # Each response has its end as a token of its own.
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


def test_labeled_steps_are_counted(world: World) -> None:
    rows = [{"prompt": "ab", "completions": ["cd", "e"], "labels": [True, False]}] * 10
    config = configured(
        "reward-model", model={"path": world.path}, steps=world.rows("steps.jsonl", rows)
    )
    found = data_lengths("reward-model", config)
    assert found == Lengths((2,) * 10, (5,) * 10, 1)  # Each step ends with a separator.


def test_no_more_than_the_first_examples_are_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths_module, "EXAMPLES", 2)
    prompts = world.rows("many.jsonl", [{"prompt": "a" * n} for n in (1, 2, 3)])
    assert data_lengths("grpo", grpo(world, data=prompts)).prompts == (1, 2)
    rows = [{"prompt": "a" * n, "completion": "b" * n} for n in (1, 2, 3)]
    texts = world.rows("more.jsonl", rows)
    config = configured("sft", model={"path": world.path}, data=texts, validation=texts)
    assert data_lengths("sft", config) == Lengths((1, 2), (2, 3), 3)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_comparison_predicts_of_the_responses_that_its_measured_step_sampled(
    world: World, tmp_path: Path, method: str
) -> None:
    settings = world.on_policy(responses_per_prompt=4, sampling={"max_tokens": 40})
    settings["run"] = {"directory": str(tmp_path / "run"), "samples_every": 1}
    once = {"steps": 1} if method == "ppo" else {"iterations": 1, "steps_per_iteration": 1}
    run = COMMANDS[method].load()(configured(method, **settings, **once))
    found = _lengths(Job(method, method, run, settings), configured(method, **settings))
    drawn = [row["length"] for row in read_samples(run) if row["drawn"] == "training"]
    assert found.responses == tuple(drawn) and min(drawn) < 40
    assert found.prompts == data_lengths(method, configured(method, **settings)).prompts


# --- What fits ------------------------------------------------------------------------------------


def test_bounds_are_halves_down_to_a_prompt_with_its_responses() -> None:
    lengths = Lengths((100, 300), (50, 20))
    assert list(smaller_bounds(4096, lengths)) == [2048, 1024, 512]
    assert list(smaller_bounds(800, lengths)) == [400]
    assert list(smaller_bounds(799, lengths)) == []


def test_the_largest_micro_batch_that_fits_is_found(world: World) -> None:
    config = grpo(world, prompts_per_step=2, tokens_per_micro_batch=4096)
    lengths = Lengths((400,), (80,))

    def needed(bound: int) -> int:
        changed = config.model_copy(update={"tokens_per_micro_batch": bound})
        return predict("grpo", changed, lengths).bytes

    most, half, quarter = needed(4096), needed(2048), needed(1024)
    assert quarter < half < most
    found = fitting("grpo", config, lengths, half)
    assert found is not None and (found[0], found[1].bytes) == (2048, half)
    found = fitting("grpo", config, lengths, half - 1)
    assert found is not None and found[0] == 1024
    found = fitting("grpo", config, lengths, most)
    assert found is not None and found[0] == 2048
    assert fitting("grpo", config, lengths, 1) is None


@pytest.mark.parametrize(
    ("share", "bound", "told"),
    [
        (1.01, 4096, "It fits."),
        (0.99, 4096, "With tokens_per_micro_batch: 2048 it needs"),
        (1e-6, 128, "No bound of a micro-batch makes it fit: set model.gradient_checkpointing"),
    ],
)
def test_advice_is_by_what_is_free(
    world: World, monkeypatch: pytest.MonkeyPatch, share: float, bound: int, told: str
) -> None:
    config = grpo(world, tokens_per_micro_batch=bound)
    needed = predict("grpo", config, data_lengths("grpo", config)).bytes
    monkeypatch.setattr(memory, "free_bytes", lambda _: int(share * needed / SHARE))
    found = memory.run("grpo", config)
    assert told in found.advice and f"{needed / 2**20:,.0f} MiB at its peak" in found.advice


def test_advice_leaves_a_tenth_of_what_is_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = grpo(world, tokens_per_micro_batch=4096)
    lengths = data_lengths("grpo", config)
    half = config.model_copy(update={"tokens_per_micro_batch": 2048})
    monkeypatch.setattr(memory, "free_bytes", lambda _: predict("grpo", half, lengths).bytes + 1)
    assert "With tokens_per_micro_batch: 1024 it needs" in memory.run("grpo", config).advice


def test_free_memory_is_what_the_system_or_the_container_has_left(
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


def test_the_command_prints_every_stage_and_the_advice(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    place = tmp_path / "sft.yaml"
    data = world.rows("shown.jsonl", [{"prompt": "ab", "completion": "cde"}])
    place.write_text(f"model: {{path: {world.path}}}\ndata: {{path: {data['path']}}}\n")
    assert main(["memory", "sft", str(place), "examples_per_step=2"]) == 0
    shown = capsys.readouterr().out
    assert "prompts of up to 2 and responses of up to 4 tokens" in shown
    assert "load policy" in shown and "update" in shown and "It fits." in shown
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_is_told_as_by_the_command_itself(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "sft.yaml"
    place.write_text(f"model: {{path: {world.path}}}\ndata: {{path: none.jsonl}}\n")
    assert main(["memory", "sft", str(place)]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["memory", "sample", str(place)])
    assert "choose from" in capsys.readouterr().err
