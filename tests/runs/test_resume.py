"""A run that is stopped anywhere and resumed ends with the same bits as one never stopped."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.stoppable_runs import RUNS, Train, different_values, run_options, run_results
from helpers.tiny_models import World
from transformers import AutoTokenizer

from trivium.algorithms import grpo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.config.base import Configuration
from trivium.models.cpu.linear import Backend, matmul_backend
from trivium.runs import checkpointing, startup
from trivium.runs.store import read_run


class Killed(BaseException):
    """Ends a run as if its process were killed."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def _save_at_every_save_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "MIN_INTERVAL_PER_SAVE", 0)


def kill_after_save(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the run end, as if killed, after its state was saved ``number`` times."""
    save, save_points = checkpointing.CheckpointManager.save, []

    def save_and_kill(manager: checkpointing.CheckpointManager, *arguments: Any) -> None:
        save(manager, *arguments)
        save_points.append(arguments[0])
        if len(save_points) == number:
            raise Killed

    monkeypatch.setattr(checkpointing.CheckpointManager, "save", save_and_kill)


def train_with_kills(train: Train, config: Configuration, patch: pytest.MonkeyPatch) -> int:
    """Train to the end, killed and resumed at every save point. Return the number of kills."""
    for kills in range(100):
        with patch.context() as once:
            kill_after_save(once, 1)
            try:
                train(config)
            except Killed:
                with (config.run.directory / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 99, "torn')
            else:
                return kills
    raise AssertionError("the run does not finish")


@pytest.mark.parametrize("name", RUNS)
def test_run_killed_at_every_save_point_ends_with_the_same_bits(
    world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, make_config = RUNS[name]
    expected = run_results(train(make_config(world, tmp_path / "uninterrupted")))
    config = make_config(world, tmp_path / "killed")
    assert train_with_kills(train, config, monkeypatch) >= 3
    assert different_values(expected, run_results(tmp_path / "killed")) == []


@pytest.mark.parametrize(("first", "second"), [("torch", "onednn"), ("onednn", "torch")])
def test_resumed_run_keeps_its_matmul_backend(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Backend, second: Backend
) -> None:
    train, make_config = RUNS["sft"]
    before = matmul_backend.name
    try:
        matmul_backend.use(first)
        with monkeypatch.context() as once:
            kill_after_save(once, 1)
            with pytest.raises(Killed):
                train(make_config(world, tmp_path / "run"))
        matmul_backend.use(second)  # Another process may measure that this one is faster.
        train(make_config(world, tmp_path / "run"))
        assert matmul_backend.name == first
    finally:
        matmul_backend.use(before)


def begin_on(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, day, 12, tzinfo=UTC)

    monkeypatch.setattr(startup, "datetime", Day)


def test_resumed_run_sees_the_prompts_of_the_day_on_which_it_began(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.path)
    tokenizer.chat_template = (
        "{{ 'a' if strftime_now('%d') == '01' else 'b' }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(world.path)

    def train(name: str) -> Path:
        options = world.on_policy("letters", run=run_options(tmp_path / name))
        options["data"] = world.prompts | {"chat": True}
        return grpo.train(GRPOConfig(**options, steps_per_iteration=2, beta=0.0))

    begin_on(monkeypatch, 1)
    expected = run_results(train("uninterrupted"))
    with monkeypatch.context() as once:
        kill_after_save(once, 1)
        with pytest.raises(Killed):
            train("killed")
    begin_on(monkeypatch, 2)
    assert different_values(expected, run_results(train("killed"))) == []
    assert read_run(tmp_path / "killed")["started"].startswith("2026-01-01T")
    assert different_values(expected, run_results(train("next-day")))
