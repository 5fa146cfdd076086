"""What is looked at before anything slow: how far, in what order, and what is only remarked."""

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
from trivium.data import preview as surveys
from trivium.data.demonstrations import DemonstrationsConfig, read_demonstrations
from trivium.data.preferences import PreferencesConfig, read_preferences
from trivium.data.preview import survey
from trivium.data.prompts import PromptsConfig, read_prompts
from trivium.errors import ConfigurationError, DataError, ModelError
from trivium.models.hf_checkpoint import check_checkpoint
from trivium.models.loading import load_tokenizer
from trivium.models.model_config import ModelConfig
from trivium.preflight import preflight


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def sft(world: World, **options: Any) -> trivium.SFTConfig:
    data = world.rows("demos.jsonl", [{"prompt": "a", "completion": "b"}])
    given = {"model": {"path": world.path}, "data": data, "run": world.run()}
    return trivium.SFTConfig.model_validate(given | options)


# --- How far, and in what order -------------------------------------------------------------------


def test_a_million_rows_pass_in_memory_that_does_not_grow(tmp_path: Path) -> None:
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


def test_the_look_ends_after_its_rows_and_the_loader_reads_on(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surveys, "MOST_ROWS", 3)
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
def test_the_look_refuses_what_the_loader_refuses_in_the_same_words(
    row: dict[str, Any], tmp_path: Path, world: World
) -> None:
    config = DemonstrationsConfig(path=rows(tmp_path / "d.jsonl", [row]))
    with pytest.raises(DataError) as looked:
        survey(config)
    with pytest.raises(DataError) as loaded:
        read_demonstrations(config, load_tokenizer(ModelConfig(path=world.path)))
    assert str(looked.value) == str(loaded.value)


def test_pairs_whose_prompt_must_be_found_pass_the_look(tmp_path: Path) -> None:
    row = {"chosen": "a b c d", "rejected": "a b e f"}
    assert survey(PreferencesConfig(path=rows(tmp_path / "d.jsonl", [row]))) == row.keys()


def test_a_call_from_python_looks_first_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sft(world, data=world.rows("broken.jsonl", [{"prompt": "a", "completion": 1}]))
    monkeypatch.setattr(
        "trivium.algorithms.sft.load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded")
    )
    with pytest.raises(DataError, match=r"broken\.jsonl:1"):
        trivium.sft(config)
    assert trivium.sft.__doc__ and "Fine-tune" in trivium.sft.__doc__


def test_rewards_come_before_data_and_data_before_models(world: World) -> None:
    wrong_data = {"path": "none.jsonl"}
    wrong_model = {"path": "./none"}
    wrong_reward = [{"function": "none.py:score"}]
    given = {"model": wrong_model, "data": wrong_data, "rewards": wrong_reward}
    with pytest.raises(ConfigurationError, match=r"no such file 'none\.py'"):
        preflight(trivium.GRPOConfig.model_validate(given))
    given["rewards"] = world.reward("letters")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        preflight(trivium.GRPOConfig.model_validate(given))
    given["data"] = world.prompts
    with pytest.raises(ModelError, match=r"model\.path: there is no checkpoint"):
        preflight(trivium.GRPOConfig.model_validate(given))


def test_all_faults_of_one_kind_are_told_together(world: World) -> None:
    broken = world.rows("one.jsonl", [{"prompt": "a", "completion": 1}])
    other = {"path": "none.jsonl"}
    with pytest.raises(DataError) as caught:
        preflight(sft(world, data=broken, validation=other))
    assert "found 2 faults" in str(caught.value)
    assert "one.jsonl:1" in str(caught.value) and "none.jsonl" in str(caught.value)


def test_what_lies_below_a_comparison_s_directory_is_made_later(world: World) -> None:
    config = sft(world, data={"path": str(world.directory / "later" / "rows.jsonl")})
    preflight(config, made=world.directory / "later")
    with pytest.raises(DataError):
        preflight(config, made=world.directory / "elsewhere")


def test_a_whole_checkpoint_is_not_objected_to(world: World) -> None:
    check_checkpoint(world.path)
    check_checkpoint("someone/a-hub-name")
    preflight(sft(world))


# --- What is only remarked ------------------------------------------------------------------------


def test_held_out_data_that_is_trained_on_is_remarked(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    data = world.rows("demos.jsonl", [{"prompt": "a", "completion": "b"}])
    with caplog.at_level(logging.WARNING, "trivium"):
        preflight(sft(world, validation=data))
    assert ["validation is " in message for message in caplog.messages] == [True]
    caplog.clear()
    preflight(sft(world, validation=world.rows("held.jsonl", [{"prompt": "a", "completion": "c"}])))
    assert not caplog.messages


def test_equal_rows_forms_that_differ_and_unread_columns_are_counted(
    world: World, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=world.path))
    given = [
        {"prompt": "a", "completion": "b", "id": 1},
        {"prompt": "a", "completion": "b", "id": 2},
        {"text": "abc"},
    ]
    config = DemonstrationsConfig(path=rows(tmp_path / "d.jsonl", given))
    items, report = read_demonstrations(config, tokenizer)
    assert len(items) == report.kept == 3
    assert report.notes == {
        "the same as an earlier row": 1,
        "rows differ in form (2 as plain text, 1 as text without a prompt)": 1,
    }
    assert report.unread == ("id",)
    assert "columns that are not read: id" in str(report)


def test_column_with_another_name_in_the_data_counts_as_read(world: World, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(path=world.path))
    path = rows(tmp_path / "d.jsonl", [{"question": "a", "answer": "b", "id": 1}])
    config = DemonstrationsConfig(
        path=path, template="{question}", columns={"completion": "answer"}
    )
    assert read_demonstrations(config, tokenizer)[1].unread == ("id",)


def test_equal_pairs_and_equal_prompts_are_counted(world: World, tmp_path: Path) -> None:
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


def test_a_secret_is_refused_and_not_shown_to_a_caller_from_python() -> None:
    secret = "abcdefgh12345"
    with pytest.raises(ValueError, match="`api_key` looks like a secret") as caught:
        trivium.RewardConfig(function="reward.py:score", arguments={"api_key": secret})
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "found"),
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
def test_secrets_are_known_by_name_or_form(arguments: dict[str, Any], found: list[str]) -> None:
    assert list(secrets_in(arguments)) == found
