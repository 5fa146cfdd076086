"""Regression tests for inputs found by fuzzing: each is refused with a clear message."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.seeds import seeds
from fuzz.targets import TARGETS
from helpers.data_tokenizers import chatml_tokenizer

from trivium.config.base import load_configuration
from trivium.config.yaml_source import YamlSource
from trivium.data import files
from trivium.data.demonstrations import DemonstrationsConfig, load_demonstrations
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    load_step_labels,
    read_preferences,
)
from trivium.data.prompts import PromptsConfig, load_prompts
from trivium.data.rows import RowsConfig, collect
from trivium.errors import ConfigurationError, DataError, TriviumError
from trivium.hf.loading import require_checkpoint
from trivium.hf.model_config import ModelConfig
from trivium.rewards.reward import RewardConfig, Rewards

BYTES: Any = chatml_tokenizer()


def read_all(path: Path | str, **options: Any) -> list[Any]:
    return collect(RowsConfig(path=str(path), **options), lambda row, notes: row.columns)[0]


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_all(path, **options)
    return str(caught.value)


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_every_seed_of_the_fuzzer_is_read_or_cleanly_refused(target: str) -> None:
    for seed in seeds(target):
        TARGETS[target](seed)


# --- messages -------------------------------------------------------------------------------------


def test_errors_escape_control_characters() -> None:
    message = str(TriviumError("a\x1b[31m\x00\u202e\ud800\nb"))
    assert message == "a\\x1b[31m\\x00\\u202e\\ud800\nb"


def test_column_name_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"x\nerror: forged\x1b[1m": 1}, {"b": 1})
    config = PromptsConfig(path=str(path))
    with pytest.raises(DataError) as caught:
        load_prompts(config, BYTES)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"{path}:1: no column `prompt`; the columns are x\\nerror: forged\\x1b")
    assert second.startswith(f"{path}:2: ")
    table = tmp_path / "a.csv"
    table.write_text('"a\nb","a\nb"\n')
    assert error_of(table) == f"{table}:1: column `a\\nb` appears twice; rename one"


def test_report_escapes_control_characters_in_column_names(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c", "x\n\x1b": 1}
    )
    _, report = read_preferences(PreferencesConfig(path=str(path)), BYTES)
    assert str(report).isprintable() and "x\\n\\x1b" in str(report)


def test_key_or_argument_with_a_line_break_stays_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('"x\\n  - forged\\e[1m": 1\npath: a.jsonl\n')
    with pytest.raises(ConfigurationError) as caught:
        load_configuration(PromptsConfig, path, ["y\nz=1"])
    assert len(str(caught.value).split("\n")) == 3  # "found 2 faults:" and one line each
    assert "`x\\n  - forged\\x1b[1m` is not a known key" in str(caught.value)


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~nobody-at-all/a.jsonl", "its home directory is unknown"),
        ("~no\0body/a.jsonl", "its home directory is unknown"),
        ("a" * 300 + ".jsonl", "File name too long"),
    ],
)
def test_unresolvable_path_is_refused_in_every_setting(path: str, reason: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: read_all(path),
        lambda: list(RowsConfig(path=path).inputs()),
        lambda: list(ModelConfig(path=path).inputs()),
        lambda: require_checkpoint(path),
        lambda: Rewards([RewardConfig(function=f"{path}.py:f")]),
        lambda: list(RewardConfig(function=f"{path}.py:f").inputs()),
        lambda: list(RewardConfig(function="f", arguments={"path": path}).inputs()),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match=f"cannot be looked up: {reason}"):
            call()
    assert RewardConfig(function=f"{path}.py:f").model_dump()["function"] == f"{path}.py:f"


def test_path_with_a_nul_character_does_not_exist() -> None:
    assert "there is no such file" in error_of("a\0b.jsonl")


def test_pipe_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is a pipe or device, not a file" in error_of(tmp_path / "a.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "loop.jsonl: " in error_of(tmp_path / "loop.jsonl")


# --- values ---------------------------------------------------------------------------------------


def test_label_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    row = {"prompt": "a", "completions": ["b"], "labels": [10**400]}
    config = StepLabelsConfig(path=str(write_lines(tmp_path / "a.jsonl", row)))
    with pytest.raises(DataError, match=r"a\.jsonl:1: label 1 is 1000.*in \[0, 1\]"):
        load_step_labels(config, BYTES)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_values_nested_more_than_100_levels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_all(write_lines(path, {"a": nested(99)})) == [{"a": nested(99)}]
    for deep in ({"a": nested(100)}, nested(900), {"a": nested(900)}):
        assert error_of(write_lines(path, deep)).startswith(
            f"{path}:1: values are nested more than 100 levels deep"
        )
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert error_of(path).startswith(f"{path}:1: not readable as JSON")


def test_half_of_a_surrogate_pair_never_reaches_the_tokenizer(tmp_path: Path) -> None:
    message = {"role": "user", "content": "a", "name": "\ud800"}
    template = "{% for m in messages %}{{ m.name }}{% endfor %}"
    path = write_lines(tmp_path / "a.jsonl", {"prompt": [message]})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* contains half of a surrogate pair"):
        load_prompts(PromptsConfig(path=str(path)), chatml_tokenizer(template))
    path = write_lines(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"b\.jsonl:1: .* contains half of a surrogate pair"):
        load_demonstrations(DemonstrationsConfig(path=str(path), chat=True, system="\ud800"), BYTES)


def test_date_out_of_range_is_a_data_error(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"t": pa.array([2**62], pa.timestamp("us"))}), path)
    assert error_of(path).startswith(
        f"{path}: not a readable Parquet file: date value out of range"
    )


def test_damaged_saved_dataset_is_a_data_error(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    table = pa.table({"t": pa.array([2**62], pa.timestamp("us"))})
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(tmp_path / "d"))
    assert f"{tmp_path / 'd'}: its rows cannot be read: " in error_of(tmp_path / "d")
    (tmp_path / "d" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert f"{tmp_path / 'd'}: not a readable dataset: " in error_of(tmp_path / "d")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_line_or_value_above_the_size_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(files, "_MAX_BYTES", 1000)
    begin, end = {"jsonl": ('{"a": "', '"}'), "json": ('[{"a": "', '"}]'), "csv": ("a\n", "\n")}[
        kind
    ]
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(gzip.compress((begin + "x" * 900 + end).encode()))
    assert read_all(path) == [{"a": "x" * 900}]
    path.write_bytes(gzip.compress((begin + "x" * 5000).encode()))
    assert "is longer than the limit of 1,000 bytes" in error_of(path)


def test_early_error_in_a_long_array_is_reported_without_reading_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a": tru, "b": "' + "x" * 5_000_000 + '"}]')
    tracemalloc.start()
    message = error_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == f"{path}:2: not valid JSON: Expecting value"
    assert peak < 2_000_000


# --- configurations -------------------------------------------------------------------------------


def config_error(path: Path, text: str, *arguments: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_configuration(RewardConfig, path, arguments)
    return str(caught.value)


def test_deeply_nested_brackets_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    # The parser's time grows with the square of the depth: it would not end here.
    message = config_error(tmp_path / "a.yaml", "function: " + "[" * 120_000)
    assert "a.yaml:1: not valid YAML: brackets nest more than 50 deep" in message
    path = tmp_path / "b.yaml"
    path.write_text("a: " + "[" * 49 + "]" * 49)
    value = YamlSource(path).values["a"]
    for _ in range(48):
        [value] = value
    assert value == []


@pytest.mark.parametrize("name", ["a.yaml", "/dev/zero"])
def test_file_too_large_for_a_configuration_is_not_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.yaml":
        path.write_text("- a: 1\n" * 1_000_000)
    with pytest.raises(
        ConfigurationError, match="holds more than 131,072 bytes, too many for a configuration"
    ):
        YamlSource(path)


@pytest.mark.parametrize(
    "value", ["!!int ''", "!!float ''", "!!bool maybe", "!!float " + "1:" * 400 + "1"]
)
def test_tag_with_mismatched_text_is_reported_with_its_line(tmp_path: Path, value: str) -> None:
    message = config_error(tmp_path / "a.yaml", f"function: gsm8k\nweight: {value}\n")
    assert f"{tmp_path / 'a.yaml'}:2: " in message and "is not of type" in message


@pytest.mark.parametrize("number", ["0x" + "f" * 4000, "9" * 400])
def test_integer_too_large_for_a_float_is_reported_with_its_line(
    tmp_path: Path, number: str
) -> None:
    message = config_error(tmp_path / "a.yaml", f"function: gsm8k\narguments: {{a: {number}}}\n")
    assert message.startswith(f"{tmp_path / 'a.yaml'}:2: ") and "too large a number" in message
    assert len(message) < 300


def test_half_of_a_surrogate_pair_in_a_configuration_is_reported_with_its_line(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.yaml"
    message = config_error(path, 'function: gsm8k\nname: "\\ud800"\n')
    assert f'{path}:2: "\\ud800" holds an unpaired surrogate' in message
    message = config_error(path, 'function: gsm8k\narguments: {"\\ud800": 1}\n')
    assert f"{path}:2: a key must be a word" in message
    arguments = ["name=\udcff", "arguments.\udcff=1", 'columns."x\udcff"=a']
    message = config_error(path, "function: gsm8k\n", *arguments)
    assert message.count("is not UTF-8 text") == 3 and "argument `name=\\udcff`: " in message
