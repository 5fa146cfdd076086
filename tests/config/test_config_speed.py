"""A mistake in a configuration is told before torch, transformers or datasets are imported.

Each case runs in a process of its own, in which nothing is imported yet.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import trivium
from trivium.commands import COMMANDS

HEAVY = ("torch", "transformers", "datasets")
TELL = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
COMMAND = f"""
import sys
from trivium.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
heavy = [name for name in {HEAVY} if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
STAGE = """
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


def test_no_commands_configuration_needs_torch() -> None:
    loads = "from trivium.commands import COMMANDS\n"
    loads += "assert all([command.config_class() for command in COMMANDS.values()])\n"
    loads += "import trivium.commands.chat_config\n"
    assert python(loads + TELL).stdout == "[]\n"


def test_public_names_of_configurations_and_loaders_need_no_torch() -> None:
    loaders = ["load_configuration", "load_demonstrations", "load_preferences", "load_prompts"]
    names = [*CONFIGURATIONS, "Sampling", "Group", *loaders]
    assert len(CONFIGURATIONS) > 20
    assert python(f"from trivium import {', '.join(names)}\n" + TELL).stdout == "[]\n"


@pytest.mark.parametrize("command", [*COMMANDS, "chat"])
def test_wrong_key_is_told_without_torch(command: str, tmp_path: Path) -> None:
    place = tmp_path / "config.yaml"
    place.write_text("{}\n", encoding="utf-8")
    told = python(COMMAND, command, str(place), "unheard_of=1")
    assert told.returncode == 2, told.stderr
    assert "`unheard_of` is not a known key" in told.stderr


def test_wrong_key_of_a_run_whose_memory_is_asked_for_is_told_without_torch(
    tmp_path: Path,
) -> None:
    place = tmp_path / "config.yaml"
    place.write_text("{}\n", encoding="utf-8")
    told = python(COMMAND, "memory", "grpo", str(place), "unheard_of=1")
    assert told.returncode == 2, told.stderr
    assert "`unheard_of` is not a known key" in told.stderr


def test_wrong_key_of_a_comparisons_stage_is_told_without_torch(tmp_path: Path) -> None:
    place = tmp_path / "compare.yaml"
    place.write_text(STAGE, encoding="utf-8")
    told = python(COMMAND, "compare", str(place), f"directory={tmp_path / 'runs'}")
    assert told.returncode == 2, told.stderr
    assert "responses" in told.stderr


def test_settings_are_listed_without_torch() -> None:
    listed = python(COMMAND, "grpo", "--fields")
    assert listed.returncode == 0, listed.stderr
    assert "optimizer.learning_rate: number" in listed.stdout
