"""Rankings of several responses, pairs with margins, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer

from trivium.data.preferences import load_preferences
from trivium.data.preview import survey
from trivium.data.rankings import (
    Ranking,
    RankingsConfig,
    RewardPairsConfig,
    load_rankings,
    read_rankings,
)
from trivium.data.rows import LoadReport
from trivium.errors import DataError

BYTES: Any = chatml_tokenizer()
ROW = {"prompt": "eggs?", "responses": [" 31", " 30", " many"], "scores": [2, 1.5, -1]}


class Rows:
    """A file of rows, and its readers."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "rows.jsonl")

    def read(self, *rows: Any, **options: Any) -> tuple[list[Ranking], LoadReport]:
        self.write(*rows)
        return read_rankings(RankingsConfig(path=self.path, **options), BYTES)

    def write(self, *rows: Any) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        Path(self.path).write_text("".join(line + "\n" for line in lines))
        return self.path


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return Rows(tmp_path)


def test_row_is_one_group_of_all_its_responses_with_their_scores(rows: Rows) -> None:
    ((ranking,), report) = rows.read(ROW)
    texts = [BYTES.decode(tokens) for tokens in (ranking.group.prompt, *ranking.group.responses)]
    assert texts == ["eggs?", *(f"{text}<|endoftext|>" for text in ROW["responses"])]
    assert ranking.scores == [2.0, 1.5, -1.0]
    assert not report.dropped and not report.unused_columns


def test_prompts_may_be_chats_or_templates_and_columns_have_other_names(rows: Rows) -> None:
    chat = {**ROW, "prompt": [{"role": "user", "content": "eggs?"}]}
    ((ranking,), _) = rows.read(chat)
    assert BYTES.decode(ranking.group.prompt).endswith("<|im_start|>assistant\n")
    assert BYTES.decode(ranking.group.responses[0]) == " 31<|im_end|>"
    other = {"question": "eggs?", "answers": ["a", "b"], "ratings": [True, False]}
    columns = {"responses": "answers", "scores": "ratings"}
    ((ranking,), _) = rows.read(other, template="Q: {question}", columns=columns)
    assert BYTES.decode(ranking.group.prompt) == "Q: eggs?"
    assert ranking.scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"responses": [" 31"], "scores": [1]},
            "ranks 1 response, and a ranking compares at least",
        ),
        ({"responses": [], "scores": []}, "ranks 0 responses, and a ranking compares at least two"),
        ({"scores": [1, 2]}, "has 3 `responses` and 2 `scores`; each response needs one"),
        ({"scores": [1, 2, "3"]}, "score 3 of `scores` is .3.; write a finite number"),
        ({"scores": [1, None, 3]}, "score 2 of `scores` is None; write a finite number"),
        ({"scores": [10**400, 2, 3]}, "score 1 of `scores` is 1000.*; write a finite number"),
        ({"scores": 3}, "column `scores` is 3; write a list of numbers"),
        ({"responses": " 31"}, "column `responses` is .*; write a list of texts"),
        ({"responses": [" 31", 30, " x"]}, r"response 2 of `responses` is 30 \(int\), not text"),
        ({"responses": None}, "column `responses` is null"),
        ({"prompt": None}, "column `prompt` is null"),
    ],
)
def test_rows_that_rank_nothing_are_refused_with_their_line(
    rows: Rows, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"rows.jsonl:2: .*{message}"):
        rows.read(ROW, {**ROW, **changes})
    with pytest.raises(DataError, match=message):
        survey(RankingsConfig(path=rows.path))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_scores_that_are_not_finite_are_refused(rows: Rows, number: str) -> None:
    line = json.dumps(ROW).replace("1.5", number)
    with pytest.raises(DataError, match=r"rows.jsonl:1"):
        rows.read(line)


def test_ties_of_all_responses_teach_nothing_unless_they_count_half(rows: Rows) -> None:
    tied = {**ROW, "scores": [1, 1, 1]}
    (kept, report) = rows.read(ROW, tied)
    assert (len(kept), dict(report.dropped)) == (1, {"all responses are tied": 1})
    (kept, report) = rows.read(ROW, tied, ties="half")
    assert (len(kept), dict(report.dropped)) == (2, {})


def test_empty_and_repeated_responses_are_counted(rows: Rows) -> None:
    empty = {**ROW, "responses": [" 31", " ", " x"]}
    repeated = {**ROW, "responses": [" 31", " 31", " x"]}
    (kept, report) = rows.read(ROW, empty, repeated)
    assert (len(kept), dict(report.dropped)) == (2, {"empty response": 1})
    assert report.notes["a response occurs twice in its ranking"] == 1


def test_limits_of_length_and_context_apply_to_every_response(rows: Rows) -> None:
    ((ranking,), _) = rows.read(ROW, max_response_tokens=2, long_responses="truncate")
    assert [len(r) for r in ranking.group.responses] == [2, 2, 2]
    with pytest.raises(DataError, match="`max_response_tokens` is 2"):
        rows.read(ROW, max_response_tokens=2)
    with pytest.raises(DataError, match="the model's context holds 4"):
        load_rankings(RankingsConfig(path=rows.path), BYTES, 4)


# --- margins --------------------------------------------------------------------------------------

PAIR = {"prompt": "eggs?", "chosen": " 31", "rejected": " 30"}


def test_margins_of_pairs_are_read_if_asked_for_and_reported_as_unused_otherwise(
    rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    path = rows.write({**PAIR, "margin": 0.5}, {**PAIR, "chosen": " 32", "margin": 0})
    pairs = load_preferences(RewardPairsConfig(path=path, margins=True), BYTES)
    assert [pair.margin for pair in pairs] == [0.5, 0.0]
    with caplog.at_level("INFO", logger="trivium"):
        pairs = load_preferences(RewardPairsConfig(path=path), BYTES)
    assert [pair.margin for pair in pairs] == [None, None]
    assert "unused columns: margin" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PAIR, "no column `margin`"),
        (
            {**PAIR, "margin": -0.5},
            "column `margin` is -0.5, and the chosen response",
        ),
        ({**PAIR, "margin": "large"}, "column `margin` is .*large.*; write a finite number"),
    ],
)
def test_margins_that_are_no_numbers_of_at_least_0_are_refused(
    rows: Rows, row: dict[str, Any], message: str
) -> None:
    config = RewardPairsConfig(path=rows.write(row), margins=True)
    for read in (lambda: load_preferences(config, BYTES), lambda: survey(config)):
        with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
            read()


def test_source_of_a_margin_that_is_not_read_is_refused(rows: Rows) -> None:
    with pytest.raises(ValueError, match="set `margins: true` to use it"):
        RewardPairsConfig(path=rows.path, columns={"margin": "gap"})
    with pytest.raises(ValueError, match="margin_scale"):
        RankingsConfig(path=rows.path, margin_scale=-1.0)
