"""Names from before version 0.2 are refused, and the error gives the new name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trivium.commands import COMMANDS
from trivium.commands.chat_config import ChatConfig
from trivium.config.base import Configuration, all_fields, load_configuration
from trivium.config.renamed import RENAMED_ARGUMENTS, RENAMED_KEYS, RENAMED_METRICS
from trivium.errors import ConfigurationError, DataError
from trivium.monitoring.metrics import EVALUATIONS, METRICS
from trivium.rewards.functions import CALL_INPUTS, match_columns
from trivium.runs.checkpoint import SavePoint
from trivium.runs.checkpoint_config import CheckpointsConfig
from trivium.runs.checkpointing import CheckpointManager
from trivium.runs.store import Run, RunConfig, read_metrics, read_run

CLASSES: dict[str, type[Configuration]] = {
    **{name: command.config_class() for name, command in COMMANDS.items()},
    "chat": ChatConfig,
}
"""Configuration class of every command."""


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


def places_of(new_key: str) -> list[tuple[str, str]]:
    """Return the command and dotted name of every field with this key."""
    return [
        (command, name)
        for command, cls in CLASSES.items()
        for name, _, _ in all_fields(cls)
        if last_part(name) == new_key
    ]


def message_of(tmp_path: Path, cls: type[Configuration], *arguments: str, text: str = "") -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        load_configuration(cls, path, arguments)
    return str(caught.value)


# --- Keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_new_key_exists_and_old_key_is_unused(old: str, new: str) -> None:
    assert places_of(new)
    assert places_of(old) == []


@pytest.mark.parametrize(
    ("command", "name", "old"),
    [
        (command, name, old)
        for old, new in RENAMED_KEYS.items()
        for command, name in places_of(new)
        if ".0." not in name  # an argument cannot open a list
    ],
)
def test_old_key_is_refused_with_the_new_one_wherever_it_was_valid(
    tmp_path: Path, command: str, name: str, old: str
) -> None:
    section = name.removesuffix(last_part(name))
    message = message_of(tmp_path, CLASSES[command], f"{section}{old}=1")
    assert f"`{section}{old}` is now `{name}`: write that instead" in message


def test_old_key_in_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    text = yaml.safe_dump(
        {"model": {"path": "m"}, "data": {"path": "p"}, "rewards": [{"function": "gsm8k"}]}
    )
    message = message_of(tmp_path, CLASSES["ppo"], text=f"lam: 0.9\n{text}")
    place = tmp_path / "config.yaml"
    assert message == f"{place}:1: `lam` is now `gae_lambda`: write that instead"


def test_old_key_in_the_wrong_section_is_refused_with_the_right_place(tmp_path: Path) -> None:
    message = message_of(tmp_path, CLASSES["grpo"], "sampling.drop_cut_off=true")
    assert "`sampling.drop_cut_off` is now `mask_truncated`: write that instead" in message


def test_old_key_of_another_command_is_an_unknown_key(tmp_path: Path) -> None:
    message = message_of(tmp_path, CLASSES["sample"], "lam=0.9")
    assert "`lam` is not a known key" in message
    assert "gae_lambda" not in message


class Rescoring(Configuration):
    judge: str = ""
    """A current key that has the name of a renamed one."""


class Labeling(Configuration):
    labeler: str = ""


class Mixed(Configuration):
    rescoring: Rescoring = Rescoring()
    labeling: Labeling = Labeling()
    other: ChatConfig | None = None


def test_current_key_is_not_shadowed_by_a_renamed_key_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text("rescoring: {judge: a}\n", encoding="utf-8")
    assert load_configuration(Mixed, path).rescoring.judge == "a"
    message = message_of(tmp_path, Mixed, "judge=a")
    assert "`judge` is not a known key: did you mean `rescoring.judge`?" in message
    message = message_of(tmp_path, Mixed, "labeling.judge=a")
    assert "`labeling.judge` is now `labeling.labeler`: write that instead" in message


def test_free_mapping_may_use_an_old_name(tmp_path: Path) -> None:
    path = tmp_path / "sample.yaml"
    path.write_text(
        "{model: {path: m}, data: {path: p}, output: o.jsonl,\n"
        " rewards: [{function: 'a.py:b', arguments: {lam: 1, judge: x}}]}",
        encoding="utf-8",
    )
    config: Any = load_configuration(CLASSES["sample"], path)
    assert config.rewards[0].arguments == {"lam": 1, "judge": "x"}


# --- Metrics --------------------------------------------------------------------------------------


def test_new_metrics_are_documented_and_old_ones_are_not() -> None:
    documented = {*METRICS, *EVALUATIONS}
    assert set(RENAMED_METRICS.values()) <= documented
    assert not RENAMED_METRICS.keys() & documented


@pytest.mark.parametrize(("old", "new"), RENAMED_METRICS.items())
def test_old_metric_as_best_is_refused_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    run = Run.create(tmp_path, "grpo", RunConfig())
    manager = CheckpointManager(run, CheckpointsConfig(best=old), (), None, dict)
    with pytest.raises(ConfigurationError) as caught:
        manager.is_best(SavePoint(1), {"sampled": 0.5, new: 0.25})
    message = (
        f"run.checkpoints.best = {old}: this metric is now called {new}: write that name instead"
    )
    assert str(caught.value) == message


# --- Reward functions -----------------------------------------------------------------------------


def test_reward_function_with_the_old_parameter_is_refused_with_the_new_one() -> None:
    def reward(responses: list[str], ended: list[str]) -> list[float]:
        return [0.0 for _ in responses]

    columns, faults = match_columns(reward, {}, {}, {"answer"})
    assert columns == {}
    assert faults == ["parameter 'ended' is now 'finish_reasons': rename it"]
    assert set(RENAMED_ARGUMENTS.values()) <= set(CALL_INPUTS)


@pytest.mark.parametrize(
    ("arguments", "columns", "available"),
    [({"ended": 3}, {}, set()), ({}, {"ended": "stop"}, {"stop"}), ({}, {}, {"ended"})],
)
def test_parameter_that_the_user_fills_may_have_an_old_name(
    arguments: dict[str, Any], columns: dict[str, str], available: set[str]
) -> None:
    def reward(responses: list[str], ended: list[str]) -> list[float]:
        return [0.0 for _ in responses]

    assert match_columns(reward, arguments, columns, available)[1] == []


# --- Runs -----------------------------------------------------------------------------------------


def write_version(path: Path, version: str) -> None:
    record = json.loads((path / "run.json").read_text())
    record["packages"]["trivium"] = version
    (path / "run.json").write_text(json.dumps(record))


def test_run_of_version_0_1_is_refused_with_one_message(tmp_path: Path) -> None:
    Run.create(tmp_path, "grpo", RunConfig()).log(1, {"loss": 0.5})
    write_version(tmp_path, "0.1.7")
    for read in (read_run, read_metrics):
        with pytest.raises(DataError) as caught:
            read(tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}: was written by Trivium 0.1.7")
        assert "\n" not in message
        assert "trivium==0.1.7" in message


def test_run_of_version_0_2_is_read(tmp_path: Path) -> None:
    Run.create(tmp_path, "grpo", RunConfig())
    write_version(tmp_path, "0.2.0")
    assert read_run(tmp_path)["kind"] == "grpo"
