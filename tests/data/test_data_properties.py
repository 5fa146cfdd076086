"""Loaders on arbitrary rows: values round-trip, and every error names its file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.data_tokenizers import CHATML, chatml_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.data.chat import decode_response
from trivium.data.demonstrations import DemonstrationsConfig, read_demonstrations
from trivium.data.encoder import Encoder
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    read_preferences,
    read_step_labels,
)
from trivium.data.prompts import PromptsConfig, read_prompts
from trivium.data.rankings import RankingsConfig, read_rankings
from trivium.data.rows import RowsConfig, collect, read_rows
from trivium.data.template import render
from trivium.errors import DataError

EACH = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), max_size=8)
NUMBER = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=4), min_size=1, max_size=5)

BYTES: Any = chatml_tokenizer()


def columns_of(path: Path) -> list[dict[str, Any]]:
    rows = list(read_rows(RowsConfig(path=str(path))))
    assert [row.index for row in rows] == list(range(len(rows)))
    return [row.columns for row in rows]


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


# --- round trips ----------------------------------------------------------------------------------


def json_lines(rows: list[Any], ascii_only: bool = True) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)


@EACH
@given(rows=ROWS, ascii_only=st.booleans(), indent=st.sampled_from([None, 0, 3]))
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_arbitrary_rows_round_trip_through_every_json_format(
    tmp_path: Path, zipped: str, rows: list[Any], ascii_only: bool, indent: int | None
) -> None:
    lines = json_lines(rows, ascii_only)
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    assert columns_of(write(tmp_path / f"a.jsonl{zipped}", lines)) == rows
    assert columns_of(write(tmp_path / f"b.json{zipped}", lines)) == rows
    assert columns_of(write(tmp_path / f"c.json{zipped}", array)) == rows
    assert columns_of(write(tmp_path / f"d.json{zipped}", "\ufeff\n " + array + "\r\n")) == rows


@EACH
@given(data=st.data())
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_arbitrary_text_rows_round_trip_through_csv(tmp_path: Path, zipped: str, data: Any) -> None:
    names = data.draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    texts = st.fixed_dictionaries(dict.fromkeys(names, TEXT))
    rows = data.draw(st.lists(texts, min_size=1, max_size=5))
    written = io.StringIO(newline="")
    ending = data.draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.DictWriter(written, names, lineterminator=ending, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    assert columns_of(write(tmp_path / f"a.csv{zipped}", written.getvalue())) == rows


COLUMN_KINDS = [TEXT, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.lists(TEXT, max_size=3)]
COLUMN_KINDS += [st.floats(allow_nan=False), st.fixed_dictionaries({"role": TEXT, "content": TEXT})]


@EACH
@given(data=st.data())
def test_typed_columns_round_trip_through_parquet(tmp_path: Path, data: Any) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = data.draw(st.lists(TEXT.filter(bool), min_size=1, max_size=4, unique=True))
    kinds = {name: st.none() | data.draw(st.sampled_from(COLUMN_KINDS)) for name in names}
    rows = data.draw(st.lists(st.fixed_dictionaries(kinds), min_size=1, max_size=5))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert columns_of(tmp_path / "a.parquet") == rows


@EACH
@given(rows=ROWS, limit=st.integers(1, 6))
def test_a_limit_reads_the_first_rows(tmp_path: Path, rows: list[Any], limit: int) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    config = RowsConfig(path=str(path), limit=limit)
    items, report = collect(config, lambda row, notes: row.columns)
    assert items == rows[:limit]
    assert (report.rows, report.kept) == (len(items), len(items))


# --- arbitrary values in the columns --------------------------------------------------------------

ROLE = st.sampled_from(["user", "assistant", "system", "tool"])
MESSAGE = st.fixed_dictionaries({"role": ROLE | JSON, "content": TEXT | JSON})
CHAT = st.lists(MESSAGE | JSON, max_size=4)
ANY = JSON | CHAT | st.text(max_size=5) | st.sampled_from([math.nan, math.inf, 10**400])
LOADERS: list[tuple[type[RowsConfig], Callable[..., Any], str]] = [
    (PromptsConfig, read_prompts, "prompt messages chosen rejected"),
    (DemonstrationsConfig, read_demonstrations, "prompt completion messages text"),
    (PreferencesConfig, read_preferences, "prompt chosen rejected"),
    (StepLabelsConfig, read_step_labels, "prompt completions labels"),
    (RankingsConfig, read_rankings, "prompt responses scores"),
]
LOADER_NAMES = ["prompts", "demonstrations", "preferences", "step labels", "rankings"]


@settings(EACH, max_examples=80)
@given(data=st.data())
@pytest.mark.parametrize(("config_class", "read", "names"), LOADERS, ids=LOADER_NAMES)
def test_any_row_is_kept_or_dropped_or_reported_with_its_line(
    tmp_path: Path, config_class: Any, read: Callable[..., Any], names: str, data: Any
) -> None:
    optional = dict.fromkeys(names.split(), ANY)
    if config_class is StepLabelsConfig:
        optional["completions"] = ANY | st.lists(TEXT, max_size=3)
        optional["labels"] = ANY | st.lists(st.booleans() | NUMBER | st.just(10**400), max_size=3)
    if config_class is RankingsConfig:
        optional["responses"] = ANY | st.lists(TEXT, max_size=3)
        optional["scores"] = ANY | st.lists(st.booleans() | NUMBER | st.just(10**400), max_size=3)
    row = st.fixed_dictionaries({}, optional=optional) | JSON
    rows = data.draw(st.lists(row, min_size=1, max_size=4))
    path = write(tmp_path / "a.jsonl", json_lines(rows))
    try:
        items, report = read(config_class(path=str(path)), BYTES)
    except DataError as error:
        messages = str(error).split("\n")
    else:
        assert report.rows == len(rows) == len(items) + sum(report.dropped.values())
        return
    lines = range(len(rows) + 1)
    reported = [line for line in lines for text in messages if f":{line}: " in text[:90]]
    assert reported == sorted(set(reported))
    for text in messages:
        assert text.startswith(str(path)) and text.isprintable()


# --- order and counts -----------------------------------------------------------------------------

VISIBLE = TEXT.filter(lambda text: text.strip() and "<|" not in text)


@EACH
@given(st.lists(st.tuples(VISIBLE, VISIBLE | st.just(" ")), min_size=1, max_size=6))
def test_demonstrations_keep_order_and_count_empty_responses(
    tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    config = DemonstrationsConfig(path=str(write(tmp_path / "a.jsonl", json_lines(rows))))
    full = [pair for pair in pairs if pair[1].strip()]
    if not full:
        with pytest.raises(DataError, match="dropped: empty response; no row is left"):
            read_demonstrations(config, BYTES)
        return
    items, report = read_demonstrations(config, BYTES)
    texts = [(BYTES.decode(i.group.prompt), BYTES.decode(i.group.responses[0])) for i in items]
    assert texts == [(prompt, completion + "<|endoftext|>") for prompt, completion in full]
    assert report.dropped == ({"empty response": len(pairs) - len(full)} if full != pairs else {})


@EACH
@given(steps=st.lists(st.tuples(VISIBLE, st.booleans()), min_size=1, max_size=5))
def test_every_step_ends_where_its_text_is_complete(tmp_path: Path, steps: Any) -> None:
    texts, labels = [text for text, _ in steps], [label for _, label in steps]
    row = {"prompt": "p", "completions": texts, "labels": labels}
    config = StepLabelsConfig(path=str(write(tmp_path / "a.jsonl", json_lines([row]))))
    (item,), _ = read_step_labels(config, BYTES)
    (response,) = item.group.responses
    assert item.labels == labels
    for number, end in enumerate(item.ends, 1):
        so_far = "\n".join(texts[:number]).rstrip()
        assert decode_response(BYTES, response[: end + 1]).startswith(so_far)
        assert not decode_response(BYTES, response[:end]).startswith(so_far)


# --- chat templates -------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": CHATML,
    "trimmed": CHATML.replace("m['content']", "(m['content'] | trim)"),
    "roles in capitals": "{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "counts ahead": "{{ messages | length }} messages\n" + CHATML,
    "last one differs": "{% for m in messages %}{{ '!' if loop.last else '.' }}{{ m.role }} "
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}.assistant {% endif %}",
}
TURNS = st.lists(st.tuples(VISIBLE, VISIBLE), min_size=1, max_size=3)


@cache
def encoder(template: str) -> Encoder:
    return Encoder(chatml_tokenizer(TEMPLATES[template]))


def chat_of(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    pairs = [(("user", question), ("assistant", answer)) for question, answer in turns]
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


@EACH
@given(turns=TURNS, first=st.integers(0, 2))
@pytest.mark.parametrize("template", TEMPLATES)
def test_response_continues_the_prompt_tokens_of_a_rollout(
    template: str, turns: list[tuple[str, str]], first: int
) -> None:
    chat = chat_of(turns)
    at = 1 + 2 * min(first, len(turns) - 1)
    chat_encoder = encoder(template)
    try:
        exchange = chat_encoder.exchange(chat[:at], chat[at:])
    except DataError:
        assert template in ("counts ahead", "last one differs")
        return
    assert template != "counts ahead"
    assert exchange.prompt == chat_encoder.prompt(chat[:at])
    assert len(exchange.loss_mask) == len(exchange.response)
    text = chat_encoder.tokenizer.decode([*exchange.prompt, *exchange.response])
    rendered = render(chat_encoder.tokenizer, chat)
    assert text.removesuffix("<|endoftext|>").strip() == rendered.strip()


@EACH
@given(TURNS)
def test_loss_covers_only_assistant_text_and_end_of_turn(turns: Any) -> None:
    chat = chat_of(turns)
    exchange = encoder("chatml").exchange(chat[:1], chat[1:])
    pairs = zip(exchange.response, exchange.loss_mask, strict=True)
    trained = [token for token, has_loss in pairs if has_loss]
    assert BYTES.decode(trained) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
