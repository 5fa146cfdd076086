"""Files of a run directory: configuration, logs and models."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium.config.base import Configuration, load_configuration
from trivium.errors import ConfigurationError, DataError, TrainingError
from trivium.runs.run_directory import LOCK, RunClaim, claim_directory, new_directory
from trivium.runs.store import (
    Run,
    RunConfig,
    json_line,
    read_evaluations,
    read_events,
    read_metrics,
    read_run,
    read_samples,
)


class Job(Configuration):
    run: RunConfig = RunConfig()
    rate: float = 3e-4


def start(directory: Path, **fields: Any) -> Run:
    job = Job(run=RunConfig(directory=directory, **fields))
    return create_run(claim_directory("grpo", job.run, job))


def create_run(claim: RunClaim) -> Run:
    path, lock = new_directory(claim)
    lock.release()
    return Run.create(path, claim.kind, claim.resolved)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return start(tmp_path / "run")


def texts(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): file.read_text()
        for file in directory.rglob("*")
        if file.is_file() and file.name != LOCK
    }


# --- The directory --------------------------------------------------------------------------------


def test_run_records_its_configuration_and_provenance(run: Run) -> None:
    loaded = load_configuration(Job, run.path / "config.yaml")
    assert loaded == Job(run=RunConfig(directory=run.path))
    record = read_run(run.path)
    assert record["kind"] == "grpo"
    assert record["packages"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", record["started"])


def test_each_run_without_a_directory_gets_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [create_run(claim_directory("dpo", RunConfig(), Job())).path for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(re.match(r"runs/dpo-\d{8}-\d{6}", str(path)) for path in paths)
    assert all(read_run(path)["kind"] == "dpo" for path in paths)


def test_directory_of_a_finished_run_is_refused_and_left_alone(run: Run) -> None:
    run.event("finished", step=0)
    before = texts(run.path)
    with pytest.raises(ConfigurationError, match=r"holds a finished run: .*run\.overwrite=true"):
        start(run.path)
    assert texts(run.path) == before


def test_overwriting_removes_all_files_of_the_earlier_run(run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    run.log(1, {"loss": 1.0})
    with run.saving("final") as directory:
        (directory / "weights").write_text("old")
    (run.path / "link").symlink_to(outside)
    start(run.path, overwrite=True)
    assert sorted(texts(run.path)) == ["config.yaml", "run.json"]
    assert (outside / "kept").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_with_other_files_is_refused_and_left_alone(
    tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match=r"holds thesis\.txt but no run"):
        start(tmp_path, overwrite=overwrite)
    assert texts(tmp_path) == {"thesis.txt": "years of work"}


def test_directory_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"run\.directory = .*file: is a file"):
        start(tmp_path / "file")
    with pytest.raises(ConfigurationError, match="cannot be used: Not a directory"):
        start(tmp_path / "file" / "run")


# --- Logs -----------------------------------------------------------------------------------------


def test_metrics_read_back_in_order_with_their_steps(run: Run) -> None:
    run.log(1, {"loss": 0.1, "tokens": 7})
    run.log(2, {"loss": torch.tensor(0.5).item()})
    first, second = read_metrics(run.path)
    assert (first["step"], first["loss"], first["tokens"]) == (1, 0.1, 7.0)
    assert (second["step"], second["loss"]) == (2, 0.5)
    assert 0 <= first["elapsed"] <= second["elapsed"]


def test_nonfinite_numbers_are_written_as_strict_json(run: Run) -> None:
    run.log(3, {"a": math.nan, "b": -math.inf, "c": math.inf, "d": 1.0})
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    raw = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (raw["a"], raw["b"], raw["c"]) == ("NaN", "-Infinity", "Infinity")
    (metrics,) = read_metrics(run.path)
    assert math.isnan(metrics["a"])
    assert (metrics["b"], metrics["c"], metrics["d"]) == (-math.inf, math.inf, 1.0)


def test_each_append_writes_a_complete_line_at_once(run: Run) -> None:
    for step in range(3):
        run.log(step, {"loss": 1.0})
        assert (run.path / "metrics.jsonl").read_bytes().count(b"\n") == step + 1


def test_generated_text_is_read_back_and_its_control_characters_are_escaped(run: Run) -> None:
    text = 'NaN \x1b[31m \x9b2J \x7f \u2028 \u202e \ud800 \x85 \r\n "é" 猫 \U0001f600'
    run.samples(2, [{"response": text, "reward": 1.0}, {"response": "NaN", "reward": 0.0}])
    data = (run.path / "samples.jsonl").read_bytes()
    line = data.decode("utf-8").split("\n")[0]
    assert len(data.decode("utf-8").splitlines()) == 2
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202e]", line)
    assert "猫" in line
    assert read_samples(run.path) == [
        {"step": 2, "response": text, "reward": 1.0},
        {"step": 2, "response": "NaN", "reward": 0.0},
    ]


def test_tensors_and_other_objects_are_written_as_json() -> None:
    record = {"a": torch.tensor(2), "b": [torch.tensor(math.nan)], "c": (1, Path("x")), 4: None}
    assert json.loads(json_line(record)) == {"a": 2, "b": ["NaN"], "c": [1, "x"], "4": None}


def test_event_has_time_kind_message_and_fields(run: Run) -> None:
    run.event("alarm", "the reward is flat", step=4, share=0.5)
    run.event("quiet")
    alarm, quiet = read_events(run.path)
    assert alarm.pop("time").endswith("+00:00")
    assert alarm == {
        "kind": "alarm",
        "message": "the reward is flat",
        "step": 4,
        "share": 0.5,
    }
    assert set(quiet) == {"time", "kind"}


def test_record_cannot_replace_the_step(run: Run) -> None:
    with pytest.raises(AssertionError, match="step"):
        run.log(1, {"step": 2.0})


def test_line_truncated_by_a_crash_is_skipped_and_other_damage_is_an_error(run: Run) -> None:
    run.log(1, {"loss": 1.0})
    path = run.path / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + text[:9])
    assert [record["step"] for record in read_metrics(run.path)] == [1]
    path.write_text(text + text[:9] + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: is damaged"):
        read_metrics(run.path)
    path.write_text("3\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: is damaged"):
        read_metrics(run.path)


def test_missing_logs_are_empty_and_other_directories_are_refused(run: Run, tmp_path: Path) -> None:
    assert read_metrics(run.path) == read_evaluations(run.path) == read_samples(run.path) == []
    with pytest.raises(DataError, match="is not the directory of a run"):
        read_metrics(tmp_path)
    for damaged in ("{", "[]", '"text"'):
        (run.path / "run.json").write_text(damaged)
        with pytest.raises(DataError, match=r"run\.json: is damaged"):
            read_run(run.path)


def test_error_of_a_line_that_cannot_be_written_names_the_file(run: Run) -> None:
    (run.path / "metrics.jsonl").mkdir()
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written: "):
        run.log(1, {"loss": 1.0})


# --- Saving ---------------------------------------------------------------------------------------


def test_saved_model_appears_only_when_complete(run: Run) -> None:
    with run.saving("final") as directory:
        (directory / "weights").write_text("new")
        assert not (run.path / "final").exists()
        assert directory.parent == run.path
    assert texts(run.path / "final") == {"weights": "new"}
    assert [p.name for p in run.path.iterdir() if p.name.startswith(".")] == [LOCK]
    (event,) = read_events(run.path)
    assert (event["kind"], event["name"]) == ("saved", "final")


def test_saving_again_replaces_the_whole_directory(run: Run) -> None:
    with run.saving("a/b") as directory:
        (directory / "old").write_text("old")
    with run.saving("a/b") as directory:
        (directory / "new").write_text("new")
        assert texts(run.path / "a") == {"b/old": "old", f"{directory.name}/new": "new"}
    assert texts(run.path / "a") == {"b/new": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_save_leaves_the_old_model_and_no_partial_files(
    run: Run, error: type[BaseException]
) -> None:
    with run.saving("final") as directory:
        (directory / "weights").write_text("old")
    before = texts(run.path)
    with pytest.raises(error), run.saving("final") as directory:
        (directory / "weights").write_text("half")
        raise error
    assert texts(run.path) == before


def test_old_model_is_restored_if_the_new_one_cannot_be_renamed(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run.saving("final") as directory:
        (directory / "weights").write_text("old")
    rename = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="no"), run.saving("final") as directory:
        (directory / "weights").write_text("new")
    assert texts(run.path / "final") == {"weights": "old"}
    assert [p.name for p in run.path.iterdir() if p.name.startswith(".")] == [LOCK]


def test_model_is_flushed_to_disk_before_it_gets_its_name(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name.split("-")[0], (run.path / "final").exists()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to see which file is synced")
    monkeypatch.setattr(os, "fsync", record)
    with run.saving("final") as directory:
        (directory / "inner").mkdir()
        (directory / "inner" / "weights").write_text("new")
    assert synced == [
        ("weights", False),
        ("inner", False),
        (".final", False),
        (run.path.name, True),
    ]


def test_saved_directory_has_the_permissions_of_the_run_directory(run: Run) -> None:
    with run.saving("final"):
        pass
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (run.path, run.path / "final")}
    assert len(modes) == 1
