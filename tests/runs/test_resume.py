"""A run that is stopped anywhere and goes on ends with the same bits as one never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.stoppable_runs import RUNS, Train, outcome, same
from helpers.tiny_models import World

from trivium.config.base import Configuration
from trivium.models.cpu.linear import Backend, matmul_backend
from trivium.runs import checkpointing


class Killed(BaseException):
    """What a test ends a run with, as if the process had been killed there."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def _save_at_every_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "_SHARE", 0)


# --- The properties -------------------------------------------------------------------------------


def kill_after_saving(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the run end as if killed once its state was saved for the given time."""
    save, seen = checkpointing.CheckpointManager.save, []

    def counted(saver: checkpointing.CheckpointManager, *given: Any) -> None:
        save(saver, *given)
        seen.append(given[0])
        if len(seen) == number:
            raise Killed

    monkeypatch.setattr(checkpointing.CheckpointManager, "save", counted)


def killed_everywhere(train: Train, config: Configuration, patch: pytest.MonkeyPatch) -> int:
    """Train to the end, killed and prepared again at every single pause; how often that was."""
    for kills in range(100):
        with patch.context() as once:
            kill_after_saving(once, 1)
            try:
                train(config)
            except Killed:
                with (config.run.directory / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 99, "torn')
            else:
                return kills
    raise AssertionError("the run does not come to its end")


@pytest.mark.parametrize("name", RUNS)
def test_run_killed_at_every_pause_ends_with_the_same_bits(
    world: World, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, configured = RUNS[name]
    whole = outcome(train(configured(world, tmp_path / "whole")))
    config = configured(world, tmp_path / "killed")
    assert killed_everywhere(train, config, monkeypatch) >= 3
    assert same(whole, outcome(tmp_path / "killed")) == []


@pytest.mark.parametrize(("first", "later"), [("torch", "onednn"), ("onednn", "torch")])
def test_run_goes_on_with_the_product_that_it_began_with(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Backend, later: Backend
) -> None:
    train, configured = RUNS["sft"]
    before = matmul_backend.name
    try:
        matmul_backend.use(first)
        with monkeypatch.context() as once:
            kill_after_saving(once, 1)
            with pytest.raises(Killed):
                train(configured(world, tmp_path / "run"))
        matmul_backend.use(later)  # As another process may find its own to be faster.
        train(configured(world, tmp_path / "run"))
        assert matmul_backend.name == first
    finally:
        matmul_backend.use(before)
