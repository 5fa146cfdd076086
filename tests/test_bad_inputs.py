"""Every bad input of the table: status 2, one complete message, nothing loaded or changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import bad_files, bad_settings
from helpers.bad_inputs import ALL, Bad
from helpers.tiny_models import checkpoint

from trivium.cli import main
from trivium.commands import Command

assert bad_settings and bad_files, "importing them fills the table"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create two tiny checkpoints with different vocabularies, to copy into each case."""
    directory = tmp_path_factory.mktemp("models")
    checkpoint(directory / "model", letters="abcdefghijk", max_position_embeddings=64)
    checkpoint(directory / "other", letters="abcdefgxyz", max_position_embeddings=64)
    return directory


def snapshot(directory: Path) -> dict[str, str]:
    """Return every path below the directory with the hash of its content."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        )
        for path in directory.rglob("*")
        if "__pycache__" not in path.parts
    }


def run_cli(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit status, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def check(case: Bad, status: int, out: str, err: str) -> None:
    message = " ".join(err.split())
    assert status == 2, message
    assert "Traceback" not in err
    assert err.count("error: ") == 1
    assert err.startswith("error: ") or "usage: " in err or not case.early, err
    for text in (case.value, case.place, case.reason, case.remedy):
        assert text in message, f"{text!r} is not in: {message}"
    assert out == ""


def test_table_covers_all_commands_and_has_unique_names() -> None:
    assert len(ALL) >= 120
    assert len({case.name for case in ALL}) == len(ALL)
    assert {case.command for case in ALL} >= {
        *("sft", "reward-model", "ppo", "dpo", "grpo", "sample", "pairs", "label-steps"),
        *("evaluate", "compare"),
    }


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_bad_input_gives_one_complete_message_and_changes_nothing(
    case: Bad, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    arguments = case.write(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if case.early:

        def fail_on_load(command: Command) -> None:
            pytest.fail(f"{command.function} was loaded")

        if case.command != "compare":
            monkeypatch.setattr(Command, "load", fail_on_load)
    check(case, *run_cli(arguments))
    assert snapshot(tmp_path) == before


def test_early_faults_are_reported_without_importing_torch(models: Path, tmp_path: Path) -> None:
    cases = [case for case in ALL if case.early]
    command_lines = []
    for number, case in enumerate(cases):
        directory = tmp_path / str(number)
        shutil.copytree(models, directory)
        command_lines.append([str(directory), case.write(directory)])
    code = (
        "import contextlib, io, json, os, sys\n"
        "from trivium.cli import main\n"
        "for directory, arguments in json.load(sys.stdin):\n"
        "    os.chdir(directory)\n"
        "    with contextlib.redirect_stderr(io.StringIO()):\n"
        "        try:\n"
        "            status = main(arguments)\n"
        "        except SystemExit as stop:\n"
        "            status = stop.code\n"
        "    assert status == 2, (arguments, status)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), arguments\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(command_lines),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
