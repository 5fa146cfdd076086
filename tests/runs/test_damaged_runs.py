"""Damaged run directories: one message or a drawing, nothing changed, nothing hangs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.stoppable_runs import RUNS
from helpers.tiny_models import World

from trivium.cli import main
from trivium.errors import DataError
from trivium.report.watch import Watch
from trivium.runs import checkpointing
from trivium.runs.files import open_regular

LOGS = ("metrics", "evaluation", "samples", "events")
FILES = ("run.json", "config.yaml", *(f"{stem}.jsonl" for stem in LOGS))
MANIFEST = "checkpoints/*/manifest.json"


class Killed(BaseException):
    """Ends a run as if its process were killed."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a small run that was killed after its second checkpoint."""
    directory = tmp_path_factory.mktemp("stopped")
    train, make_config = RUNS["sft"]
    save, saved = checkpointing.CheckpointManager.save, []

    def save_and_kill(manager: Any, *arguments: Any) -> None:
        save(manager, *arguments)
        saved.append(arguments)
        if len(saved) == 4:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "MIN_INTERVAL_PER_SAVE", 0)
        patch.setattr(checkpointing.CheckpointManager, "save", save_and_kill)
        with pytest.raises(Killed):
            train(make_config(World(directory), directory / "run"))
    event = {"time": "2026-01-01T00:00:00+00:00", "kind": "alarm", "step": 1, "message": "x"}
    (directory / "run/events.jsonl").write_text(f"{json.dumps(event)}\n" * 2)
    assert (directory / "run/evaluation.jsonl").exists()
    return directory / "run"


# --- Kinds of damage -----------------------------------------------------------------------------

Damage = Callable[[Path], object]


def _at(run: Path, name: str) -> list[Path]:
    found = sorted(run.glob(name)) if "*" in name else [run / name]
    assert found
    return found


def write(name: str, data: bytes | str) -> Damage:
    content = data.encode() if isinstance(data, str) else data
    return lambda run: [path.write_bytes(content) for path in _at(run, name)]


def truncated(name: str) -> Damage:
    return lambda run: [os.truncate(p, p.stat().st_size // 2 + 1) for p in _at(run, name)]


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(run: Path) -> None:
        for path in _at(run, name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            make(path)

    return damage


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 42)


def listening(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def changed(name: str, **fields: Any) -> Damage:
    """Set fields of a JSON document; None removes one."""

    def damage(run: Path) -> None:
        for path in _at(run, name):
            record = {**json.loads(path.read_bytes()), **fields}
            record = {key: value for key, value in record.items() if value is not None}
            path.write_text(json.dumps(record))

    return damage


def appended(stem: str, *records: Any) -> Damage:
    lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)

    def damage(run: Path) -> None:
        with (run / f"{stem}.jsonl").open("a") as file:
            file.write(lines)

    return damage


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = json.loads("[" * 400 + "]" * 400)
DAMAGES: dict[str, Damage] = {
    **{f"empty {name}": write(name, b"") for name in FILES},
    **{f"truncated {name}": truncated(name) for name in FILES},
    **{f"binary {name}": write(name, bytes(range(256)) * 9 + b"\n") for name in FILES},
    **{f"{name} is a pipe": replaced(name, os.mkfifo) for name in (*FILES, ".lock")},
    **{f"{name} is a directory": replaced(name, os.mkdir) for name in (*FILES, ".lock")},
    **{f"{name} is a link to itself": replaced(name, lambda p: p.symlink_to(p)) for name in FILES},
    **{f"huge {name}": replaced(name, huge) for name in FILES},
    **{f"deep {name}": write(name, DEEP + "\n") for name in FILES},
    "a socket": replaced("metrics.jsonl", listening),
    "a device": replaced("samples.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "nested values": appended("metrics", {"step": 9, "loss": NESTED}),
    "run.json that is a list": write("run.json", "[1]"),
    "run.json without a kind": changed("run.json", kind=None),
    "a kind that is a list": changed("run.json", kind=["sft"]),
    "an unknown kind": changed("run.json", kind="sft\x1b[2J"),
    "packages that are a list": changed("run.json", packages=[1]),
    "inputs that are missing": changed("run.json", inputs=None),
    "a directory that is a number": changed("run.json", **{"from": 5}),
    "a directory with a null byte": changed("run.json", **{"from": "a\0b"}),
    "a start that is no time": changed("run.json", started="noon"),
    "another id": changed("run.json", id="0"),
    "nested run.json": changed("run.json", more=NESTED),
    "events that are numbers": appended("events", 5),
    "an event without a kind": appended("events", {"step": 3}),
    "an event whose kind is a list": appended("events", {"kind": []}),
    "a resumption without a position": appended("events", {"kind": "resumed"}),
    "steps of other types": appended("metrics", {"step": "x"}, {"step": None}, {"step": [1]}, {}),
    "steps without end": appended("metrics", '{"step": Infinity}', '{"step": NaN, "loss": 1}'),
    "numbers beyond floats": appended("metrics", {"step": 10**400, "loss": 10**4000}),
    "large numbers": appended("metrics", {"step": 10**300, "loss": 10**300, "elapsed": 1e308}),
    "numbers of 5000 digits": appended("metrics", '{"step": ' + "9" * 5000 + "}"),
    "metrics with odd names": appended("metrics", {"step": 9, "rewards/a\nb/mean": 1.0, "": 2.0}),
    "odd pass rates": appended("evaluation", {"step": 9, "pass_at": {"²": 1, "9" * 99: 1, "x": 2}}),
    "pass rates as columns": appended("evaluation", {"step": 9, "pass@x": 1, "pass@²": 0.5}),
    "evaluations of other types": appended("evaluation", {"step": 9, "greedy": "a", "n": []}, {}),
    "samples of other types": appended(
        "samples", {"step": [1], "prompt": 5, "response": {}, "rewards": []}, {"step": {}}, {},
        {"step": 1, "prompt": [[1], {"role": []}], "tokens": [[1]], "log_ratio": ["x"]},
    ),
    "a configuration with an alias of itself": write("config.yaml", "a: &a [*a]\n"),
    "a configuration that multiplies": write(
        "config.yaml", "a0: &a0 [1, 1]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    ),
    "a huge number in the configuration": write("config.yaml", f"steps: 0x{'f' * 5000}\n"),
    "an empty manifest": write(MANIFEST, b""),
    "a manifest that is a pipe": replaced(MANIFEST, os.mkfifo),
    "a deep manifest": write(MANIFEST, DEEP),
    "a manifest of other types": write(MANIFEST, '{"format": 2, "files": 5}'),
    "an altered state": write("checkpoints/*/state.json", "{}"),
    "a state that is a pipe": replaced("checkpoints/*/state.json", os.mkfifo),
    "truncated tensors": truncated("checkpoints/*/tensors.safetensors"),
    "checkpoints that are files": replaced("checkpoints/0*", lambda path: path.write_text("x")),
    "a pipe in place of the checkpoints": replaced("checkpoints", os.mkfifo),
    "checkpoints in a link to itself": replaced("checkpoints", lambda path: path.symlink_to(path)),
    "a planted link for a log": replaced("outcomes.jsonl", lambda p: p.symlink_to("config.yaml")),
}  # fmt: skip


def snapshot(directory: Path) -> dict[str, Any]:
    """Return the kind, the size, the time and (of small files) the content of every path."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        small = path.is_file() and not path.is_symlink() and status.st_size < 1 << 20
        content = path.read_bytes() if small else None
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_size, content)
    return found


def run_cli(*arguments: str) -> tuple[int, str]:
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, err.getvalue()


@pytest.fixture
def damaged(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def test_the_table_has_more_than_forty_directories():
    assert len(DAMAGES) > 80


def test_the_undamaged_run_can_be_drawn_and_resumed(damaged: Path, tmp_path: Path) -> None:
    assert run_cli("report", str(damaged), "--output", str(tmp_path / "r.html")) == (0, "")
    status, err = run_cli("resume", str(damaged))
    assert status == 0 and "resuming the run" in err


@pytest.mark.parametrize("name", DAMAGES)
def test_report_and_watch_draw_a_damaged_run_or_refuse_it(
    name: str, damaged: Path, tmp_path: Path
) -> None:
    DAMAGES[name](damaged)
    before = snapshot(damaged)
    status, err = run_cli("report", str(damaged), "--output", str(tmp_path / "report.html"))
    assert (status, err.count("error: ")) in [(0, 0), (2, 1)], err
    assert "\x1b" not in err
    with contextlib.ExitStack() as stack:
        if status == 2:
            stack.enter_context(pytest.raises(DataError))
        Watch(damaged).server_close()
    assert snapshot(damaged) == before


@pytest.mark.parametrize("name", DAMAGES)
def test_resume_continues_a_damaged_run_or_refuses_it(
    name: str, damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(damaged.parent)
    DAMAGES[name](damaged)
    before = snapshot(damaged)
    status, err = run_cli("resume", str(damaged))
    assert (status, err.count("error: ")) in [(0, 0), (2, 1)], err
    assert "\x1b" not in err
    assert status == 0 or snapshot(damaged) == before
    assert status == 0 or str(damaged) in " ".join(err.split()), err


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    for name, reason in (("pipe", "is a pipe"), ("", "is a directory"), ("none", "No such file")):
        with pytest.raises(OSError, match=reason):
            open_regular(tmp_path / name)
    open_regular(tmp_path / "link").close()
    with pytest.raises(OSError):
        open_regular(tmp_path / "link", follow=False)


def test_a_report_is_not_written_through_a_planted_link(damaged: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".report.html.partial", "report.html"):
        (damaged / name).symlink_to(victim)
    assert run_cli("report", str(damaged))[0] == 0
    assert victim.read_text() == "mine"
    assert (damaged / "report.html").is_file() and not (damaged / "report.html").is_symlink()


def test_control_characters_of_a_path_are_escaped(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(stopped, tmp_path / "a\x1b[2J\nb"))
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run / "none")]) == 2
    output = "".join(capsys.readouterr())
    assert "\x1b" not in output and output.count("\\x1b[2J") == 2


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", DEEP, '{"methods": 5, "title": 1}', '{"methods": [{}], "title": "x"}',
     '{"methods": [{"runs": [{}], "varied": []}], "title": "x"}', '{"methods": [5]}'],
)  # fmt: skip
def test_a_damaged_comparison_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(content)
    status, err = run_cli("report", str(tmp_path))
    assert (status, err.count("error: ")) == (2, 1), err
    assert list(tmp_path.iterdir()) == [tmp_path / "comparison.json"]
