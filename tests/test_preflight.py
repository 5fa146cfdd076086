"""Preflight: its limits, the order of its checks, and its warnings."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import World, rows

import trivium
from trivium.config.secrets import secrets_in
from trivium.data import preview as preview
from trivium.data.demonstrations import DemonstrationsConfig, read_demonstrations
from trivium.data.preferences import PreferencesConfig, read_preferences
from trivium.data.preview import survey
from trivium.data.prompts import PromptsConfig, read_prompts
from trivium.errors import ConfigurationError, DataError, ModelError
from trivium.hf.checkpoint_files import check_checkpoint
from trivium.hf.loading import load_tokenizer
from trivium.hf.model_config import ModelConfig
from trivium.preflight import preflight


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def sft(world: World, **options: Any) -> trivium.SFTConfig:
    data = world.rows("demos.jsonl", [{"prompt": "a", "completion": "b"}])
    settings = {"model": {"path": world.path}, "data": data, "run": world.run()}
    return trivium.SFTConfig.model_validate(settings | options)


# --- Limits and order of checks -------------------------------------------------------------------


def test_memory_does_not_grow_while_a_million_rows_are_read(tmp_path: Path) -> None:
    code = (
        "import resource\n"
        "from trivium.data.prompts import PromptsConfig\n"
        "from trivium.data.rows import read_rows\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "with open('rows.jsonl', 'w') as file:\n"
        '    file.writelines(\'{"prompt": "w%d"}\\n\' % n for n in range(1_000_000))\n'
        "rows = iter(read_rows(PromptsConfig(path='rows.jsonl')))\n"
        "next(rows)\n"
        "before = peak()\n"
        "assert 1 + sum(1 for _ in rows) == 1_000_000\n"
        "assert peak() - before < 8, peak() - before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_preview_stops_after_its_row_limit_and_the_loader_reads_all_rows(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preview, "MAX_ROWS", 3)
    config = PromptsConfig(path=rows(tmp_path / "p.jsonl", [{"prompt": "a"}] * 3 + [{"x": 1}]))
    assert survey(config) == {"prompt"}
    with pytest.raises(DataError, match=r"p\.jsonl:4: no column `prompt`"):
        read_prompts(config, load_tokenizer(ModelConfig(path=world.path)))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": 3},
        {"prompt": "a"},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"text": None},
    ],
)
def test_preview_and_loader_refuse_the_same_rows_with_the_same_message(
    row: dict[str, Any], tmp_path: Path, world: World
) -> None:
    config = DemonstrationsConfig(path=rows(tmp_path / "d.jsonl", [row]))
    with pytest.raises(DataError) as preview_error:
        survey(config)
    with pytest.raises(DataError) as loader_error:
        read_demonstrations(config, load_tokenizer(ModelConfig(path=world.path)))
    assert str(preview_error.value) == str(loader_error.value)


def test_preview_accepts_pairs_without_a_prompt_column(tmp_path: Path) -> None:
    row = {"chosen": "a b c d", "rejected": "a b e f"}
    assert survey(PreferencesConfig(path=rows(tmp_path / "d.jsonl", [row]))) == row.keys()


def test_call_from_python_runs_the_preflight_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = sft(world, data=world.rows("broken.jsonl", [{"prompt": "a", "completion": 1}]))
    monkeypatch.setattr(
        "trivium.algorithms.sft.load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded")
    )
    with pytest.raises(DataError, match=r"broken\.jsonl:1"):
        trivium.sft(config)
    assert trivium.sft.__doc__ and "Fine-tune" in trivium.sft.__doc__


def test_rewards_are_checked_before_data_and_data_before_models(world: World) -> None:
    wrong_data = {"path": "none.jsonl"}
    wrong_model = {"path": "./none"}
    wrong_reward = [{"function": "none.py:score"}]
    settings = {"model": wrong_model, "data": wrong_data, "rewards": wrong_reward}
    with pytest.raises(ConfigurationError, match=r"no such file 'none\.py'"):
        preflight(trivium.GRPOConfig.model_validate(settings))
    settings["rewards"] = world.reward("letters")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        preflight(trivium.GRPOConfig.model_validate(settings))
    settings["data"] = world.prompts
    with pytest.raises(ModelError, match=r"model\.path: there is no checkpoint"):
        preflight(trivium.GRPOConfig.model_validate(settings))


def test_all_faults_of_one_kind_are_reported_together(world: World) -> None:
    broken = world.rows("one.jsonl", [{"prompt": "a", "completion": 1}])
    other = {"path": "none.jsonl"}
    with pytest.raises(DataError) as caught:
        preflight(sft(world, data=broken, validation=other))
    assert "found 2 faults" in str(caught.value)
    assert "one.jsonl:1" in str(caught.value) and "none.jsonl" in str(caught.value)


def test_paths_below_a_comparison_s_directory_are_not_checked(world: World) -> None:
    config = sft(world, data={"path": str(world.directory / "later" / "rows.jsonl")})
    preflight(config, skip_below=world.directory / "later")
    with pytest.raises(DataError):
        preflight(config, skip_below=world.directory / "elsewhere")


def test_complete_checkpoint_is_accepted(world: World) -> None:
    check_checkpoint(world.path)
    check_checkpoint("someone/a-hub-name")
    preflight(sft(world))


# --- Warnings -------------------------------------------------------------------------------------


def test_held_out_data_that_is_trained_on_gives_a_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    data = world.rows("demos.jsonl", [{"prompt": "a", "completion": "b"}])
    with caplog.at_level(logging.WARNING, "trivium"):
        preflight(sft(world, validation=data))
    assert ["validation is " in message for message in caplog.messages] == [True]
    caplog.clear()
    preflight(sft(world, validation=world.rows("held.jsonl", [{"prompt": "a", "completion": "c"}])))
    assert not caplog.messages


def test_duplicate_rows_mixed_formats_and_unread_columns_are_counted(
    world: World, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=world.path))
    examples = [
        {"prompt": "a", "completion": "b", "id": 1},
        {"prompt": "a", "completion": "b", "id": 2},
        {"text": "abc"},
    ]
    config = DemonstrationsConfig(path=rows(tmp_path / "d.jsonl", examples))
    items, report = read_demonstrations(config, tokenizer)
    assert len(items) == report.kept == 3
    assert report.notes == {
        "the same as an earlier row": 1,
        "rows differ in form (2 as plain text, 1 as text without a prompt)": 1,
    }
    assert report.unused_columns == ("id",)
    assert "unused columns: id" in str(report)


def test_column_with_a_mapped_name_counts_as_read(world: World, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=world.path))
    path = rows(tmp_path / "d.jsonl", [{"question": "a", "answer": "b", "id": 1}])
    config = DemonstrationsConfig(
        path=path, template="{question}", columns={"completion": "answer"}
    )
    assert read_demonstrations(config, tokenizer)[1].unused_columns == ("id",)


def test_duplicate_pairs_and_prompts_are_counted(world: World, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=world.path))
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = rows(tmp_path / "d.jsonl", [pair, pair, {**pair, "chosen": "d"}])
    assert read_preferences(PreferencesConfig(path=path), tokenizer)[1].notes == {
        "the same as an earlier row": 1
    }
    assert read_prompts(PromptsConfig(path=path), tokenizer)[1].notes == {
        "the same as an earlier row": 2
    }


# --- Secrets --------------------------------------------------------------------------------------


def test_secret_is_refused_and_not_shown_in_the_error() -> None:
    secret = "abcdefgh12345"
    with pytest.raises(ValueError, match="`api_key` looks like a secret") as caught:
        trivium.RewardConfig(function="reward.py:score", arguments={"api_key": secret})
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "secrets"),
    [
        ({"api_key": "abcdefgh"}, ["api_key"]),
        ({"server": {"token": "abcdefgh"}}, ["server.token"]),
        ({"headers": ["Bearer abcdefghijklmnop"]}, ["headers.0"]),
        ({"url": "postgres://me:pw@host/db"}, ["url"]),
        ({"x": "sk-abcdefghijklmnop"}, ["x"]),
        ({"max_tokens": 12345678, "token": 3, "stop_token": "<|endoftext|>"}, []),
        ({"url": "http://localhost:8000/score", "monkey": "abcdefghij"}, []),
        ({"token": "short"}, []),
        ({"headers_from_env": {"Authorization": "JUDGE_KEY"}}, []),
        (
            {"headers_from_env": {"Authorization": "Bearer abcdefghijklm"}},
            ["headers_from_env.Authorization"],
        ),
    ],
)
def test_secrets_are_detected_by_name_or_format(
    arguments: dict[str, Any], secrets: list[str]
) -> None:
    assert list(secrets_in(arguments)) == secrets
