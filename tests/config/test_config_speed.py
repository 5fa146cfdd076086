"""Faults of a configuration are reported before torch, transformers or datasets are imported.

Each case runs in a new process, in which nothing is imported yet.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trivium
from trivium.commands import COMMANDS

HEAVY = ("torch", "transformers", "datasets")
PRINT_HEAVY = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
RUN_COMMAND = f"""
import sys
from trivium.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
COMPARISON = """
model: {path: base}
data: {path: train.jsonl}
rewards: [{function: gsm8k}]
evaluation: {data: {path: test.jsonl}}
methods: [{name: GRPO, stages: [{command: grpo, settings: {responses: 4}}]}]
"""
CONFIGURATIONS = [name for name in trivium.__all__ if name.endswith("Config")]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def test_command_configurations_do_not_import_torch() -> None:
    loads = "from trivium.commands import COMMANDS\n"
    loads += "assert all([command.config_class() for command in COMMANDS.values()])\n"
    loads += "import trivium.commands.chat_config\n"
    assert python(loads + PRINT_HEAVY).stdout == "[]\n"


def test_public_configurations_and_loaders_do_not_import_torch() -> None:
    loaders = ["load_configuration", "load_demonstrations", "load_preferences", "load_prompts"]
    names = [*CONFIGURATIONS, "Sampling", "Group", *loaders]
    assert len(CONFIGURATIONS) > 20
    assert python(f"from trivium import {', '.join(names)}\n" + PRINT_HEAVY).stdout == "[]\n"


@pytest.mark.parametrize("command", [*COMMANDS, "chat"])
def test_unknown_key_is_reported_without_importing_torch(command: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("{}\n", encoding="utf-8")
    done = python(RUN_COMMAND, command, str(path), "unknown_key=1")
    assert done.returncode == 2, done.stderr
    assert "`unknown_key` is not a known key" in done.stderr


def test_unknown_key_for_the_memory_command_is_reported_without_importing_torch(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("{}\n", encoding="utf-8")
    done = python(RUN_COMMAND, "memory", "grpo", str(path), "unknown_key=1")
    assert done.returncode == 2, done.stderr
    assert "`unknown_key` is not a known key" in done.stderr


def test_unknown_key_of_a_stage_is_reported_without_importing_torch(tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(COMPARISON, encoding="utf-8")
    done = python(RUN_COMMAND, "compare", str(path), f"directory={tmp_path / 'runs'}")
    assert done.returncode == 2, done.stderr
    assert "responses" in done.stderr


def test_settings_are_listed_without_importing_torch() -> None:
    listed = python(RUN_COMMAND, "grpo", "--fields")
    assert listed.returncode == 0, listed.stderr
    assert "optimizer.learning_rate: number" in listed.stdout
