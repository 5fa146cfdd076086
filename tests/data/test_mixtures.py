"""Mixtures: the order and shares of rows, their sources, and mistakes in them."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trivium.data.demonstrations import DemonstrationsConfig
from trivium.data.preferences import PreferencesConfig
from trivium.data.preview import survey
from trivium.data.prompts import PromptsConfig, load_prompts
from trivium.data.rows import RowReader, read_rows
from trivium.data.sources import in_proportion
from trivium.errors import DataError


def sources(directory: Path, **counts: int) -> dict[str, str]:
    """Write a file of numbered prompts for each source; return their paths."""
    paths = {}
    for name, count in counts.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name}{i}"}) + "\n" for i in range(count)))
        paths[name] = str(path)
    return paths


def mixture(paths: dict[str, str], *weights: float | None, **options: Any) -> PromptsConfig:
    mixed = [
        {"path": path, "name": name, **({} if weight is None else {"weight": weight})}
        for (name, path), weight in zip(paths.items(), weights, strict=True)
    ]
    return PromptsConfig.model_validate({"mixture": mixed, **options})


def prompts_of(config: PromptsConfig) -> list[str]:
    rows = [row for row in read_rows(config) if not isinstance(row, DataError)]
    assert [row.index for row in rows] == list(range(len(rows)))
    return [row.columns["prompt"] for row in rows]


def test_rows_of_two_sources_alternate_in_proportion_to_their_weights(tmp_path: Path) -> None:
    config = mixture(sources(tmp_path, a=9, b=9), 2, 1)
    assert prompts_of(config)[:9] == ["a0", "b0", "a1", "a2", "b1", "a3", "a4", "b2", "a5"]


def test_a_mixture_ends_with_the_first_source_that_has_no_further_row(tmp_path: Path) -> None:
    config = mixture(sources(tmp_path, a=4, b=2), 1, 1)
    assert prompts_of(config) == ["a0", "b0", "a1", "b1", "a2"]


def test_repeated_sources_start_again_until_each_was_read_to_its_end(tmp_path: Path) -> None:
    config = mixture(sources(tmp_path, a=4, b=2), 1, 1, exhausted="repeat")
    assert prompts_of(config) == ["a0", "b0", "a1", "b1", "a2", "b0", "a3", "b1"]


def test_without_weights_all_rows_follow_one_source_after_the_other(tmp_path: Path) -> None:
    config = mixture(sources(tmp_path, a=2, b=3), None, None)
    assert prompts_of(config) == ["a0", "a1", "b0", "b1", "b2"]


def test_limits_apply_to_each_source_and_to_the_mixture(tmp_path: Path) -> None:
    paths = sources(tmp_path, a=9, b=9)
    config = {"mixture": [{"path": paths["a"], "limit": 2}, {"path": paths["b"]}], "limit": 4}
    assert prompts_of(PromptsConfig.model_validate(config)) == ["a0", "a1", "b0", "b1"]


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    st.integers(min_value=1, max_value=200),
)
def test_any_first_rows_have_every_share_up_to_one_row(weights: list[float], count: int) -> None:
    endless = [lambda: iter(range(10_000))] * len(weights)
    drawn = [i for i, _ in islice(in_proportion(endless, weights, repeat=False), count)]
    for i, weight in enumerate(weights):
        assert abs(drawn.count(i) - count * weight / sum(weights)) < len(weights)


def test_every_source_keeps_the_order_of_its_rows(tmp_path: Path) -> None:
    found = prompts_of(mixture(sources(tmp_path, a=30, b=30, c=30), 0.5, 0.3, 0.2))
    for name in "abc":
        own = [prompt for prompt in found if prompt[0] == name]
        assert own == [f"{name}{i}" for i in range(len(own))]


def test_prompts_have_the_name_of_their_source_as_a_column(tmp_path: Path) -> None:
    paths = sources(tmp_path, a=2, b=2)
    config = mixture(paths, 1, 1)
    prompts = load_prompts(config, chatml_tokenizer(None))
    assert [p.columns["source"] for p in prompts] == ["a", "b", "a", "b"]
    named = mixture(paths, 1, 1, source_column="kind")
    assert [p.columns["kind"] for p in load_prompts(named, chatml_tokenizer(None))] == list("abab")
    assert survey(config) == {"prompt", "source"}


def test_a_source_without_a_name_is_called_by_its_path_and_split(tmp_path: Path) -> None:
    sources(tmp_path, train=1, test=1)
    mixed = [{"path": str(tmp_path), "split": "train"}, {"path": str(tmp_path), "split": "test"}]
    rows = list(read_rows(PromptsConfig.model_validate({"mixture": mixed})))
    assert [r.source for r in rows if not isinstance(r, DataError)] == [
        f"{tmp_path}[train]", f"{tmp_path}[test]"
    ]  # fmt: skip


def test_columns_of_each_source_are_renamed_by_its_own_table(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "solution": "s"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    renamed = {"prompt": "question", "completion": "solution"}
    mixed = [
        {"path": str(tmp_path / "a.jsonl"), "columns": renamed},
        {"path": str(tmp_path / "b.jsonl")},
    ]  # fmt: skip
    rows = read_rows(DemonstrationsConfig.model_validate({"mixture": mixed}))
    found = [
        (r.columns["prompt"], r.columns["completion"]) for r in rows if not isinstance(r, DataError)
    ]
    assert found == [("q", "s"), ("p", "c")]


def test_the_report_counts_the_rows_of_each_source(tmp_path: Path) -> None:
    reader = RowReader(mixture(sources(tmp_path, a=6, b=6), 2, 1))
    kept = list(reader.items(lambda row, notes: row))
    report = reader.report(len(kept))
    assert report.sources == {"a": 6, "b": 3}
    assert str(report).startswith("mixture of a, b: 9 rows read, 9 kept; 6 of a; 3 of b")


def test_all_files_of_a_mixture_are_inputs_of_a_run(tmp_path: Path) -> None:
    paths = sources(tmp_path, a=1, b=1)
    assert [str(path) for path in mixture(paths, 1, 1).inputs()] == list(paths.values())


def test_a_faulty_row_of_a_mixture_is_named_with_its_own_file(tmp_path: Path) -> None:
    paths = sources(tmp_path, a=2, b=1)
    (tmp_path / "b.jsonl").write_text("{broken\n")
    with pytest.raises(DataError, match=r"b\.jsonl:1"):
        load_prompts(mixture(paths, 1, 1), chatml_tokenizer(None))


def test_an_empty_source_is_refused_by_name(tmp_path: Path) -> None:
    paths = sources(tmp_path, a=2, b=0)
    with pytest.raises(DataError, match=r"b\.jsonl: .*no rows"):
        load_prompts(mixture(paths, 1, 1), chatml_tokenizer(None))


def test_a_column_that_has_the_name_of_the_added_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "source": "web"}\n')
    paths = {"a": str(tmp_path / "a.jsonl")}
    with pytest.raises(DataError, match=r"has a column `source`, .* set `source_column`"):
        load_prompts(mixture(paths, 1), chatml_tokenizer(None))


A, B = {"path": "a.jsonl"}, {"path": "b.jsonl"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, r"path\s+is missing: it must be a file, a directory or a hub name, unless a mixture"),
        ({"path": "x", "mixture": [A, B]}, "a mixture has it in each of its sources"),
        ({"split": "train", "mixture": [A, B]}, r"split\s+a mixture has it in each of its sources"),
        ({"mixture": [A, A]}, "two sources are called 'a.jsonl'"),
        ({"mixture": [A | {"weight": 1}, B]}, "'b.jsonl' has no weight, and another source has"),
        ({"mixture": [A | {"weight": 0}, B | {"weight": 1}]}, "greater than 0"),
        ({"mixture": [A | {"weight": -1}, B | {"weight": 1}]}, "greater than 0"),
        ({"mixture": [A | {"weight": float("nan")}, B | {"weight": 1}]}, "finite number"),
        ({"mixture": [A | {"path": ""}, B]}, "a source has an empty path"),
        ({"mixture": [A, B], "exhausted": "restart"}, "'stop' or 'repeat'"),
    ],
)
def test_a_mistake_in_a_mixture_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptsConfig.model_validate(section)


def test_an_unknown_column_of_a_source_is_refused() -> None:
    mixed = [A | {"columns": {"answer": "x"}}, B]
    with pytest.raises(ValidationError, match="`columns` gives a source for answer"):
        PreferencesConfig.model_validate({"mixture": mixed})
