"""Several processes compute what one does, and end together where they cannot."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rank_jobs
from helpers.rank_jobs import FAMILIES, TRAINED, Gradients
from helpers.ranks import Ended, on_ranks
from helpers.stoppable_runs import different_values
from helpers.tiny_models import World
from safetensors.torch import load_file

from trivium import distributed, rank_status
from trivium.cli import main
from trivium.config.base import dump
from trivium.data.batch import Grouped
from trivium.data.micro_batching import pack
from trivium.errors import ConfigurationError
from trivium.runs.store import read_events, read_metrics, read_run, read_samples
from trivium.training.micro_batch import MicroBatch, in_rounds

ALL = [(family, name) for family in FAMILIES for name in TRAINED]
ON_FOUR = [(f, n) for f, n in ALL if f == "llama" or n == "grpo"]
"""Four processes train every algorithm, and GRPO with every model."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return rank_jobs.worlds(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def gradients(worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The gradients of 1, 2 and 4 processes, and the digests of all ranks."""
    directory = tmp_path_factory.mktemp("runs")
    arguments = [(worlds, directory / str(n), c) for n, c in ((1, ALL), (2, ALL), (4, ON_FOUR))]
    for _, runs, _ in arguments:
        runs.mkdir()
    return [
        [rank_jobs.gradients(*arguments[0])],
        on_ranks(2, rank_jobs.gradients, *arguments[1]),
        on_ranks(4, rank_jobs.gradients, *arguments[2]),
    ]


def assert_gradients_equal(found: Gradients, expected: Gradients, case: tuple[str, str]) -> None:
    assert len(found[case]) == len(expected[case]) > 0
    for mine, theirs in zip(found[case], expected[case], strict=True):
        assert max(float(g.abs().max()) for g in theirs) > 1e-4
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("case", ALL, ids="-".join)
def test_gradients_of_two_processes_are_those_of_one(
    gradients: list[Any], case: tuple[str, str]
) -> None:
    assert_gradients_equal(gradients[1][0][0], gradients[0][0][0], case)


@pytest.mark.parametrize("case", ON_FOUR, ids="-".join)
def test_gradients_of_four_processes_are_those_of_one(
    gradients: list[Any], case: tuple[str, str]
) -> None:
    assert_gradients_equal(gradients[2][0][0], gradients[0][0][0], case)


def test_every_process_has_the_same_bits(gradients: list[Any]) -> None:
    for ranks in gradients[1:]:
        assert len({digest for _, digest in ranks}) == 1


# --- micro-batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_micro_batches_is_divided_and_added_up(ranks: int) -> None:
    counts = (1, 2, 3, 5)
    by_rank = on_ranks(ranks, rank_jobs.accumulated, counts)
    for index, count in enumerate(counts):
        for rank, found in enumerate(by_rank):
            gradient, observed, own = found[index]
            assert gradient == [count * (count + 1) / 2] * 2
            assert observed == [[i + 1] * (i + 1) for i in range(count)]
            assert own == len(range(rank, count, ranks))


@pytest.mark.parametrize("kind", ["master_weights", "stochastic_rounding"])
def test_half_precision_weights_take_the_same_steps_on_two_processes(kind: str) -> None:
    alone = rank_jobs.half_precision_weights(kind)
    for norm, weights in on_ranks(2, rank_jobs.half_precision_weights, kind):
        assert norm == pytest.approx(alone[0], rel=1e-6)
        assert weights == alone[1]


def test_rounds_give_every_process_each_loss() -> None:
    def actor(data: Grouped, scale: float) -> Any: ...
    def critic(data: Grouped) -> Any: ...

    data = Grouped([rank_jobs.line([1])])
    alternating = [loss for i in range(4) for loss in (partial(actor, scale=float(i)), critic)]
    rounds = in_rounds([MicroBatch(data, loss) for loss in alternating])
    assert [m.index for m in rounds] == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize(("ranks", "expected"), [(1, 3), (2, 4), (3, 3), (4, 4), (8, 6)])
def test_micro_batches_are_a_multiple_of_the_processes(
    monkeypatch: pytest.MonkeyPatch, ranks: int, expected: int
) -> None:
    groups = [rank_jobs.line([1] * 9) for _ in range(12)]
    monkeypatch.setattr(distributed._world, "size", ranks)
    parts = pack(groups, 40)
    assert len(parts) == expected
    assert sorted(r for part in parts for r in part) == list(range(12))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- failures -------------------------------------------------------------------------------------


def test_a_failure_or_disagreement_is_raised_on_all_ranks_and_names_the_rank() -> None:
    first, second, third = on_ranks(3, rank_jobs.failures)
    differ = "TrainingError: the ranks have different plans for a plan: they must read the same"
    places = "the ranks are at different points of the run: rank 0 at point 0, rank 1 at point 1, "
    for found in (first, second, third):
        assert found["plans"].startswith(differ)
        assert found["points"].startswith(f"TrainingError: {places}")
        assert found["signal"] == "SamplingAborted: "
        assert found["after"] == "[0, 1, 2]"
    assert second["error"] == "ValueError: wrong"
    assert first["error"] == third["error"] == "TrainingError: rank 1: ValueError: wrong"
    assert second["own error"] == "RewardError: bad"
    assert first["own error"] == third["own error"] == "RewardError: rank 1: bad"
    assert first["signal and error"] == "TriviumError: a failure"
    assert second["signal and error"] == "TriviumError: rank 0: a failure"


def test_ranks_exchange_values_exactly() -> None:
    for gathered, first, in_order in on_ranks(3, rank_jobs.values):
        assert in_order == list("abcde")
        assert first.tolist() == [0]
        for rank, value in enumerate(gathered):
            assert value["x"].dtype == torch.float64 and value["x"].tolist() == [*range(rank)]
            assert value["n"][0].item() == 2.5 and value["n"][1].shape == (0, 3)


def test_a_killed_rank_ends_the_run_with_one_message_that_names_it(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    first, second, third = on_ranks(3, rank_jobs.killed, worlds["llama"], tmp_path / "run", 1)
    assert isinstance(second, Ended) and second.exit_code == -9
    for raised, _ in (first, third):
        assert raised.startswith("rank 1 ended without a message")
    assert first[1] == first[0] and third[1] is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE=2 and RANK=2"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two and RANK=0"),
    ],
)
def test_an_incomplete_launch_is_an_error(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        distributed.join()


class FakeStore:
    """A launcher's store with the status of two ranks, of which the second is this one."""

    def __init__(self, first: dict[str, Any]) -> None:
        alive = {"beat": 1, "failed": None, "waits": False, "left": False, "at": "x"}
        self.values = {"trivium/rank/0": json.dumps({**alive, **first}).encode()}
        self.added = 0

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        return False

    def add(self, key: str, value: int) -> int:
        self.added += value
        return self.added


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({}, "error: rank 0 ended without a message, or answers no longer"),
        ({"failed": "no space left"}, "error: rank 0: no space left"),
        ({"left": True}, None),
    ],
    ids=["frozen", "failed", "finished"],
)
def test_a_rank_ends_its_process_if_another_one_is_lost_and_nothing_else_notices(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: dict[str, Any],
    message: str | None,
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(rank_status, "FROZEN_SECONDS", -1.0)
    monkeypatch.setattr(rank_status, "GRACE_SECONDS", -1.0)
    monkeypatch.setattr(rank_status.os, "_exit", exits.append)
    status = rank_status.RankStatus(FakeStore(first), 1, 2, lambda: None)
    status._end_if_lost()
    assert exits == ([] if message is None else [1])
    printed = capsys.readouterr().err
    assert printed.startswith(message) if message else printed == ""


def test_a_rank_that_finishes_leaves_no_thread_in_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter's end would abort the process if a thread were in the store's C++ code."""
    entered, released = threading.Event(), threading.Event()

    class SlowStore(FakeStore):
        def multi_get(self, keys: list[str]) -> list[bytes]:
            entered.set()
            assert released.wait(60)
            return super().multi_get(keys)

    monkeypatch.setattr(rank_status, "BEAT_SECONDS", 0.001)
    status = rank_status.RankStatus(SlowStore({}), 1, 2, lambda: None)
    status.start()
    assert entered.wait(60)
    leaving = threading.Thread(target=status.leave)
    leaving.start()
    assert leaving.is_alive() and status._thread.is_alive()
    released.set()
    leaving.join(60)
    assert not status._thread.is_alive()


# --- whole runs -----------------------------------------------------------------------------------


STOPPED = ("grpo-lora", "ppo")
"""Runs of ``helpers.stoppable_runs``. Their rewards draw from the global random generators, β
adapts, and evaluations sample."""


def test_a_run_of_two_processes_stopped_and_resumed_has_the_same_bits(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    found = on_ranks(2, rank_jobs.trained, STOPPED, worlds["llama"], tmp_path, 3)
    assert len(found[0]) == len(STOPPED)
    for whole, stopped in found[0]:
        assert different_values(whole, stopped) == []


def test_processes_sample_the_same_texts_and_a_run_continues_with_another_number(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    world, name = worlds["llama"], "grpo-float64"
    one, two, four, moved = (tmp_path / x for x in ("one", "two", "four", "moved"))
    assert rank_jobs.train(name, world, one) == "finished"
    assert on_ranks(2, rank_jobs.train, name, world, two) == ["finished"] * 2
    assert on_ranks(4, rank_jobs.train, name, world, four) == ["finished"] * 4
    assert "finished" not in on_ranks(2, rank_jobs.train, name, world, moved, 4)
    assert rank_jobs.train(name, world, moved, 4) != "finished"
    assert on_ranks(2, rank_jobs.train, name, world, moved) == ["finished"] * 2

    texts = [(row["step"], row["response"]) for row in read_samples(one)]
    assert len(texts) > 20
    expected = load_file(one / "final" / "model.safetensors")
    for run in (two, four, moved):
        assert [(row["step"], row["response"]) for row in read_samples(run)] == texts
        for tensor, value in load_file(run / "final" / "model.safetensors").items():
            torch.testing.assert_close(value, expected[tensor], atol=1e-6, rtol=0)
    resumed = [e["changes"] for e in read_events(moved) if e["kind"] == "resumed"]
    assert [c[0].partition(":")[0:3:2] for c in resumed] == [
        ("processes", f" {a} → {b}: what follows equals the run with {a} up to rounding, and a "
         "reward's own random numbers differ") for a, b in ((2, 1), (1, 2))
    ]  # fmt: skip


def test_a_signal_to_one_rank_stops_all_of_them(worlds: dict[str, World], tmp_path: Path) -> None:
    found = on_ranks(2, rank_jobs.interrupted, worlds["llama"], tmp_path / "run")
    stopped = "Interrupted: stopped by SIGTERM, saved at inside step 2; to resume: "
    assert all(x[0].startswith(stopped) for x in found)
    assert [x[1] for x in found] == ["finished"] * 2


# --- the command line -----------------------------------------------------------------------------


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", "trivium", *arguments], capture_output=True, text=True, timeout=300
    )


def test_torchrun_starts_a_run_that_one_process_writes(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = rank_jobs.sft_config(worlds["llama"], {"path": worlds["llama"].path}, run)
    (tmp_path / "sft.yaml").write_text(dump(config))
    ended = torchrun("sft", str(tmp_path / "sft.yaml"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"written to {run}") == 1
    assert read_run(run)["processes"] == 2
    assert len(read_metrics(run)) == 1
    again = torchrun("sft", str(tmp_path / "sft.yaml"))
    assert again.returncode != 0
    assert again.stderr.count("holds a finished run") == 1


def test_other_commands_refuse_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert main(["report", "nowhere"]) == 2
    assert "2 processes of this command were started" in capsys.readouterr().err
