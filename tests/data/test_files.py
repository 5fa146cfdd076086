"""Readers of every file format, and errors with file and line."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import sys
import tracemalloc
from typing import Any

import pytest
from pydantic import ValidationError

from trivium.data.files import open_records
from trivium.data.rows import DropRow, Row, RowsConfig, collect, read_rows
from trivium.errors import DataError

ROWS = [
    {"question": "2+2?", "answer": "4, or\n“four”"},
    {"question": "é\u2028✓", "answer": "#### 5"},
]


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows_of(path, **options) -> list[Any]:
    return list(read_rows(RowsConfig(path=str(path), **options)))


def columns_of(path, **options):
    return [row.columns for row in rows_of(path, **options)]


def error_of(path, **options):
    with pytest.raises(DataError) as raised:
        collect(RowsConfig(path=str(path), **options), lambda row, notes: row)
    return str(raised.value)


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_json_lines_json_arrays_and_csv_give_the_same_rows(tmp_path, zipped):
    lines = write(tmp_path / f"a.jsonl{zipped}", json_lines(ROWS))
    array = write(tmp_path / f"b.json{zipped}", json.dumps(ROWS, indent=2))
    named = write(tmp_path / f"c.json{zipped}", json_lines(ROWS))
    with (tmp_path / "d.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)
    table = write(tmp_path / f"e.csv{zipped}", (tmp_path / "d.csv").read_bytes())
    for path in (lines, array, named, table):
        assert columns_of(path) == ROWS


def test_parquet_and_saved_datasets_give_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(
        str(tmp_path / "two")
    )
    assert columns_of(tmp_path / "a.parquet") == ROWS
    assert columns_of(tmp_path / "one") == ROWS
    assert columns_of(tmp_path / "two", split="test") == ROWS[1:]
    assert rows_of(tmp_path / "a.parquet")[1].where == f"{tmp_path / 'a.parquet'}, row 2"
    assert "set `split` to one of train, test" in error_of(tmp_path / "two")
    assert "no split 'tset'" in error_of(tmp_path / "two", split="tset")
    assert "has no splits" in error_of(tmp_path / "one", split="train")


def test_hub_name_is_loaded_with_its_subset_and_split(tmp_path, monkeypatch):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return {"train": ROWS} if options["split"] is None else ROWS[1:]

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert columns_of("openai/gsm8k", subset="main", split="test") == ROWS[1:]
    assert rows_of("openai/gsm8k")[1].where == "openai/gsm8k[train], row 2"
    assert calls[0] == ("openai/gsm8k", {"name": "main", "split": "test"})


def test_hub_dataset_that_fails_is_reported_in_one_line(tmp_path, monkeypatch):
    def load_dataset(path, **options):
        raise ConnectionError("no route to the hub\nlong details")

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    expected = "openai/gsm8k: there is no such path, and as a hub dataset it cannot be loaded: "
    assert error_of("openai/gsm8k") == expected + "no route to the hub"


def test_missing_package_is_reported_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").touch()
    assert "a Parquet file needs `pyarrow`; pip install 'trivium[data]'" in error_of(
        tmp_path / "a.parquet"
    )


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_long_file_is_not_read_into_memory_at_once(tmp_path, ending):
    rows = [{"n": str(n), "text": "x" * 10_000} for n in range(400)]
    contents = {
        "json": json.dumps(rows),
        "jsonl": json_lines(rows),
        "csv": "n,text\n" + "".join(f"{row['n']},{row['text']}\n" for row in rows),
    }
    path = write(tmp_path / f"a.{ending}", contents[ending])
    tracemalloc.start()
    assert [value["n"] for _, value in open_records(str(path), None, None)] == [
        str(n) for n in range(400)
    ]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 4


def test_json_array_elements_longer_than_the_buffer_are_read_completely(tmp_path):
    rows = [{"text": "é" * 300_000}, {"text": "b"}]
    path = write(tmp_path / "a.json", "\ufeff " + json.dumps(rows, ensure_ascii=False, indent=1))
    assert columns_of(path) == rows
    assert rows_of(path)[1].where == f"{path}:5"


def test_directory_gives_the_files_of_its_split(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", json_lines(ROWS[:1]))
    write(tmp_path / "train-00001-of-00002.jsonl", json_lines(ROWS[1:]))
    write(tmp_path / "test.jsonl.gz", json_lines(ROWS[:1]))
    write(tmp_path / "README.md", "about")
    assert columns_of(tmp_path, split="train") == ROWS
    assert [row.index for row in rows_of(tmp_path, split="train")] == [0, 1]
    assert columns_of(tmp_path, split="test") == ROWS[:1]
    assert "is a directory with test.jsonl.gz, train-00000" in error_of(tmp_path)
    assert "has no file named dev.*" in error_of(tmp_path, split="dev")


def test_blank_lines_and_byte_order_marks_are_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", "\ufeff" + '{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.columns["a"], row.index) for row in rows_of(path)] == [(1, 0), (2, 1)]
    assert rows_of(path)[1].where == f"{path}:4"
    table = write(tmp_path / "a.csv", "\ufeffa,b\r\n\r\n1,2\r\n")
    assert columns_of(table) == [{"a": "1", "b": "2"}]


def test_limit_is_the_number_of_rows_read(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert [row.columns["a"] for row in rows_of(path, limit=2)] == [1, 2]


# --- errors ---------------------------------------------------------------------------------------

INVALID = [
    ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl:2: not valid JSON at column 6"),
    ("a.jsonl", '{"a": 1}\n[1]\n', "a.jsonl:2: is [1], not a row"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl:2: byte 0xff is not UTF-8"),
    ("a.jsonl", "[" * 100_000, "a.jsonl:1: not readable as JSON"),
    ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl:1: not readable as JSON"),
    ("a.json", '[{"a": 1},\n {"a": }]', "a.json:2: not valid JSON: Expecting value"),
    ("a.json", '[{"a": 1}\n {"a": 2}]', "a.json:2: not valid JSON: found { instead of ,"),
    ("a.json", '[{"a": 1},', "a.json:1: not valid JSON"),
    ("a.json", '[{"a": 1}] [', "a.json:1: not valid JSON: found [ instead of the end"),
    ("a.json", '[{"a": 1}, 12]', "a.json:1: is 12, not a row"),
    ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', "a.json:2: byte 0xff is not UTF-8"),
    ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: has 3 fields, and the first line names 2"),
    ("a.csv", 'a,b\n1,"x\ny\n', "a.csv:2: not valid CSV"),
    ("a.csv", "a,a\n1,2\n", "a.csv:1: column `a` appears twice"),
    ("a.csv", b"a\nx\n\xff\n", "a.csv:3: byte 0xff is not UTF-8"),
    ("a.parquet", "not parquet", "a.parquet: not a readable Parquet file"),
    ("a.txt", "x", "a.txt: its name does not end in .jsonl"),
    ("a.jsonl", "", "a.jsonl: contains no rows"),
    ("a.json", "[]", "a.json: contains no rows"),
    ("a.csv", "a,b\n", "a.csv: contains no rows"),
]


@pytest.mark.parametrize(("name", "text", "expected"), INVALID)
def test_invalid_file_is_reported_with_its_line(tmp_path, name, text, expected):
    message = error_of(write(tmp_path / name, text))
    assert message.startswith(f"{tmp_path}/{expected}")
    assert "\n" not in message


def test_invalid_or_truncated_gzip_file_is_reported(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain text")
    assert "a.jsonl.gz: cannot be read: " in error_of(tmp_path / "a.jsonl.gz")
    data = gzip.compress(json_lines(ROWS * 500).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(data[: len(data) // 2])
    assert "b.jsonl.gz: cannot be read: " in error_of(tmp_path / "b.jsonl.gz")


def test_missing_file_is_reported_with_the_nearest_name(tmp_path):
    write(tmp_path / "train.jsonl", json_lines(ROWS))
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in error_of(tmp_path / "trian.jsonl")


def test_split_or_subset_of_a_file_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(ROWS))
    assert "has no `split` (train)" in error_of(path, split="train")
    assert "`subset` (main) is for hub datasets" in error_of(path, subset="main")


def test_faults_are_reported_together_up_to_ten(tmp_path):
    few = error_of(write(tmp_path / "a.jsonl", '{"a": 1}\nx\n{"a": 2}\ny\n')).splitlines()
    assert [line.split(": ")[0] for line in few] == [f"{tmp_path}/a.jsonl:{n}" for n in (2, 4)]
    many = error_of(write(tmp_path / "b.jsonl", "x\n" * 50)).splitlines()
    assert len(many) == 11
    assert many[-1] == "reading stopped after 10 faulty rows; there may be more"


# --- columns and counts ---------------------------------------------------------------------------


def test_mapped_columns_are_added_under_their_new_names(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "q", "answer": "a"}\n')
    (row,) = rows_of(path, columns={"prompt": "question"})
    assert row.columns == {"question": "q", "answer": "a", "prompt": "q"}


def test_missing_source_of_a_column_is_reported_with_the_nearest_name(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question": "q", "answer": "a"}\n')
    message = error_of(path, columns={"prompt": "qestion"})
    assert "no column `qestion`, which `columns` gives for prompt" in message
    assert "did you mean `question`?" in message
    assert "the columns are question, answer" in message


def test_error_for_a_missing_column_lists_the_columns():
    row = Row({"promt": "q", "answer": None}, 0, "x")
    with pytest.raises(DataError, match=r"the columns are promt, answer.*\{prompt: promt\}"):
        row.text("prompt")
    with pytest.raises(DataError, match="column `answer` is null"):
        row.text("answer")
    with pytest.raises(DataError, match=r"`n` is 3 \(int\), not text"):
        Row({"n": 3}, 0, "x").text("n")


def test_known_columns_restrict_the_keys_of_columns():
    class Narrow(RowsConfig):
        known_columns = frozenset({"prompt"})

    with pytest.raises(ValidationError, match="source for promt, which this section does not use"):
        Narrow(path="x", columns={"promt": "question"})


def test_report_counts_kept_dropped_and_noted_rows(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(1200)))

    def convert(row, notes):
        if row.columns["n"] % 100 == 0:
            raise DropRow("round number")
        notes["odd"] += row.columns["n"] % 2
        return row.columns["n"]

    with caplog.at_level(logging.INFO, "trivium"):
        items, report = collect(RowsConfig(path=str(path)), convert)
    assert len(items) == report.kept == 1188
    assert str(report) == (
        f"{path}: 1,200 rows read, 1,188 kept; 12 dropped: round number; 600 noted: odd"
    )
    assert caplog.messages == [str(report)]


@pytest.mark.parametrize(
    ("dropped", "noted", "level"),
    [(0, 0, logging.INFO), (1, 0, logging.WARNING), (0, 1, logging.WARNING)],
)
def test_report_with_dropped_or_noted_rows_is_a_warning(tmp_path, caplog, dropped, noted, level):
    path = write(tmp_path / "a.jsonl", '{"n": 1}\n{"n": 2}\n')

    def convert(row, notes):
        if dropped and row.index == 0:
            raise DropRow("unfit")
        notes.update(["odd"] if noted else [])

    with caplog.at_level(logging.INFO, "trivium"):
        collect(RowsConfig(path=str(path)), convert)
    assert [record.levelno for record in caplog.records] == [level]


def test_data_without_a_kept_row_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"n": 1}\n')

    def convert(row, notes):
        raise DropRow("unfit")

    with pytest.raises(DataError, match="0 kept; 1 dropped: unfit; no row is left"):
        collect(RowsConfig(path=str(path)), convert)
