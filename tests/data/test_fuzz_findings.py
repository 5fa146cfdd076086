"""What fuzzing found stays found: each input is refused in a clean message, and seeds replay."""

from __future__ import annotations

import gzip
import json
import os
import time
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
from trivium.models.loading import require_checkpoint
from trivium.models.model_config import ModelConfig
from trivium.rewards.reward import RewardConfig, Rewards

BYTES: Any = chatml_tokenizer()


def collected(path: Path | str, **options: Any) -> list[Any]:
    return collect(RowsConfig(path=str(path), **options), lambda row, notes: row.columns)[0]


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        collected(path, **options)
    return str(caught.value)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("target", TARGETS)
def test_every_seed_of_the_fuzzer_is_read_or_cleanly_refused(target: str) -> None:
    for seed in seeds(target):
        TARGETS[target](seed)


# --- messages -------------------------------------------------------------------------------------


def test_an_error_shows_control_characters_instead_of_sending_them() -> None:
    said = str(TriviumError("a\x1b[31m\x00\u202e\ud800\nb"))
    assert said == "a\\x1b[31m\\x00\\u202e\\ud800\nb"


def test_a_column_s_name_cannot_write_a_line_of_its_own(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"x\nerror: forged\x1b[1m": 1}, {"b": 1})
    config = PromptsConfig(path=str(path))
    with pytest.raises(DataError) as caught:
        load_prompts(config, BYTES)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"{path}:1: no column `prompt`; the columns are x\\nerror: forged\\x1b")
    assert second.startswith(f"{path}:2: ")
    table = tmp_path / "a.csv"
    table.write_text('"a\nb","a\nb"\n')
    assert refused(table) == f"{table}:1: the column `a\\nb` is there twice; rename one"


def test_a_report_names_columns_without_their_control_characters(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c", "x\n\x1b": 1}
    )
    _, report = read_preferences(PreferencesConfig(path=str(path)), BYTES)
    assert str(report).isprintable() and "x\\n\\x1b" in str(report)


def test_a_key_or_argument_cannot_write_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('"x\\n  - forged\\e[1m": 1\npath: a.jsonl\n')
    with pytest.raises(ConfigurationError) as caught:
        load_configuration(PromptsConfig, path, ["y\nz=1"])
    assert len(str(caught.value).split("\n")) == 3  # found 2 faults:, and one line for each
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
def test_a_path_that_no_system_can_look_up_is_refused_wherever_it_stands(
    path: str, reason: str
) -> None:
    asked: list[Callable[[], Any]] = [
        lambda: collected(path),
        lambda: list(RowsConfig(path=path).inputs()),
        lambda: list(ModelConfig(path=path).inputs()),
        lambda: require_checkpoint(path),
        lambda: Rewards([RewardConfig(function=f"{path}.py:f")]),
        lambda: list(RewardConfig(function=f"{path}.py:f").inputs()),
        lambda: list(RewardConfig(function="f", arguments={"path": path}).inputs()),
    ]
    for ask in asked:
        with pytest.raises(ConfigurationError, match=f"cannot be looked up: {reason}"):
            ask()
    assert RewardConfig(function=f"{path}.py:f").model_dump()["function"] == f"{path}.py:f"


def test_a_path_with_a_nul_leads_nowhere() -> None:
    assert "there is no such file" in refused("a\0b.jsonl")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is a pipe or device, not a file" in refused(tmp_path / "a.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert "loop.jsonl: " in refused(tmp_path / "loop.jsonl")


# --- values ---------------------------------------------------------------------------------------


def test_a_label_too_large_for_a_float_is_refused_like_any_other(tmp_path: Path) -> None:
    row = {"prompt": "a", "completions": ["b"], "labels": [10**400]}
    config = StepLabelsConfig(path=str(lines(tmp_path / "a.jsonl", row)))
    with pytest.raises(DataError, match=r"a\.jsonl:1: label 1 is 1000.*in \[0, 1\]"):
        load_step_labels(config, BYTES)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_values_may_nest_a_hundred_deep_and_no_deeper(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert collected(lines(path, {"a": nested(99)})) == [{"a": nested(99)}]
    for deep in ({"a": nested(100)}, nested(900), {"a": nested(900)}):
        assert refused(lines(path, deep)).startswith(f"{path}:1: values nest more than 100 deep")
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert refused(path).startswith(f"{path}:1: not readable as JSON")


def test_half_a_character_never_reaches_the_tokenizer(tmp_path: Path) -> None:
    message = {"role": "user", "content": "a", "name": "\ud800"}
    template = "{% for m in messages %}{{ m.name }}{% endfor %}"
    path = lines(tmp_path / "a.jsonl", {"prompt": [message]})
    with pytest.raises(DataError, match=r"a\.jsonl:1: .* holds half of a surrogate pair"):
        load_prompts(PromptsConfig(path=str(path)), chatml_tokenizer(template))
    path = lines(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"b\.jsonl:1: .* holds half of a surrogate pair"):
        load_demonstrations(DemonstrationsConfig(path=str(path), chat=True, system="\ud800"), BYTES)


def test_a_date_that_python_cannot_hold_is_a_fault_of_the_file(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"t": pa.array([2**62], pa.timestamp("us"))}), path)
    assert refused(path).startswith(f"{path}: not a readable Parquet file: date value out of range")


def test_a_damaged_saved_dataset_is_a_fault_in_the_data(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    datasets = pytest.importorskip("datasets")
    table = pa.table({"t": pa.array([2**62], pa.timestamp("us"))})
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(tmp_path / "d"))
    assert f"{tmp_path / 'd'}: its rows cannot be read: " in refused(tmp_path / "d")
    (tmp_path / "d" / "data-00000-of-00001.arrow").write_bytes(b"no arrow")
    assert f"{tmp_path / 'd'}: not a readable dataset: " in refused(tmp_path / "d")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_no_line_or_value_is_longer_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(files, "_LONGEST", 1000)
    begin, end = {"jsonl": ('{"a": "', '"}'), "json": ('[{"a": "', '"}]'), "csv": ("a\n", "\n")}[
        kind
    ]
    path = tmp_path / f"a.{kind}.gz"
    path.write_bytes(gzip.compress((begin + "x" * 900 + end).encode()))
    assert collected(path) == [{"a": "x" * 900}]
    path.write_bytes(gzip.compress((begin + "x" * 5000).encode()))
    assert "is longer than 1,000 bytes, which no row may be" in refused(path)


def test_an_early_fault_in_a_long_array_is_told_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a": tru, "b": "' + "x" * 5_000_000 + '"}]')
    tracemalloc.start()
    message = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message == f"{path}:2: not valid JSON: Expecting value"
    assert peak < 2_000_000


# --- configurations -------------------------------------------------------------------------------


def faults_of(path: Path, text: str, *arguments: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_configuration(RewardConfig, path, arguments)
    return str(caught.value)


def test_deep_brackets_are_refused_at_once(tmp_path: Path) -> None:
    began = time.process_time()
    message = faults_of(tmp_path / "a.yaml", "function: " + "[" * 20_000)
    assert "a.yaml:1: not valid YAML: brackets nest more than 50 deep" in message
    assert time.process_time() - began < 1
    path = tmp_path / "b.yaml"
    path.write_text("a: " + "[" * 49 + "]" * 49)
    held = YamlSource(path).values["a"]
    for _ in range(48):
        [held] = held
    assert held == []


@pytest.mark.parametrize("place", ["a.yaml", "/dev/zero"])
def test_a_file_too_large_for_a_configuration_is_not_read(tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    if place == "a.yaml":
        path.write_text("- a: 1\n" * 1_000_000)
    with pytest.raises(ConfigurationError, match="holds more than 131,072 bytes, too many for a configuration"):
        YamlSource(path)


@pytest.mark.parametrize(
    "value", ["!!int ''", "!!float ''", "!!bool maybe", "!!float " + "1:" * 400 + "1"]
)
def test_a_tag_that_its_text_does_not_fit_is_a_fault_at_its_line(
    tmp_path: Path, value: str
) -> None:
    message = faults_of(tmp_path / "a.yaml", f"function: gsm8k\nweight: {value}\n")
    assert f"{tmp_path / 'a.yaml'}:2: " in message and "is not of type" in message


@pytest.mark.parametrize("number", ["0x" + "f" * 4000, "9" * 400])
def test_an_integer_beyond_every_float_is_a_fault_at_its_line(tmp_path: Path, number: str) -> None:
    message = faults_of(tmp_path / "a.yaml", f"function: gsm8k\narguments: {{a: {number}}}\n")
    assert message.startswith(f"{tmp_path / 'a.yaml'}:2: ") and "too large a number" in message
    assert len(message) < 300


def test_half_a_character_in_a_configuration_is_a_fault_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    message = faults_of(path, 'function: gsm8k\nname: "\\ud800"\n')
    assert f'{path}:2: "\\ud800" holds an unpaired surrogate' in message
    message = faults_of(path, 'function: gsm8k\narguments: {"\\ud800": 1}\n')
    assert f"{path}:2: a key must be a word" in message
    arguments = ["name=\udcff", "arguments.\udcff=1", 'columns."x\udcff"=a']
    message = faults_of(path, "function: gsm8k\n", *arguments)
    assert message.count("is not UTF-8 text") == 3 and "argument `name=\\udcff`: " in message
