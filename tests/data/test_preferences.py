"""Pairs and step labels: what the two responses share, and where each step's last token is."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from helpers.data_tokenizers import CHATML, chatml_tokenizer
from transformers import AutoTokenizer

from trivium.data.chat import decode_response, encode
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    load_preferences,
    read_preferences,
    read_step_labels,
)
from trivium.errors import DataError

BYTES: Any = chatml_tokenizer()
EOS = BYTES.eos_token_id
ASKED = [{"role": "user", "content": "how many eggs?"}]
RENDERED = "<|im_start|>user\nhow many eggs?<|im_end|>\n<|im_start|>assistant\n"
TALK = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: eggs?\n\nAssistant:"


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def read(write):
    def read(*rows, **options):
        return read_preferences(PreferencesConfig(path=write(*rows), **options), BYTES)

    return read


@pytest.fixture
def read_steps(write):
    def read(*rows, tokenizer=BYTES, **options):
        return read_step_labels(StepLabelsConfig(path=write(*rows), **options), tokenizer)

    return read


def texts(item):
    return tuple(BYTES.decode(tokens) for tokens in (item.group.prompt, *item.group.responses))


# --- pairs ----------------------------------------------------------------------------------------


def test_explicit_prompt_gives_a_group_of_chosen_and_rejected(read):
    ((pair,), _) = read({"prompt": "eggs?", "chosen": " 31", "rejected": " 30"})
    assert texts(pair) == ("eggs?", " 31<|endoftext|>", " 30<|endoftext|>")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.index) == ("eggs?", " 31", " 30", 0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": "31", "rejected": "30"},
        {"prompt": ASKED, "chosen": [says("31")], "rejected": [says("30")]},
        {"prompt": "how many eggs?", "chosen": [says("31")], "rejected": [says("30")]},
        {"chosen": [*ASKED, says("31")], "rejected": [*ASKED, says("30")]},
        {"prompt": "other", "chosen": [*ASKED, says("31")], "rejected": [*ASKED, says("30")]},
    ],
)
def test_every_conversational_shape_makes_the_same_pair(read, row):
    ((pair,), _) = read(row)
    assert texts(pair) == (RENDERED, "31<|im_end|>", "30<|im_end|>")
    assert (pair.prompt, pair.chosen, pair.rejected) == (ASKED, "31", "30")


def test_plain_dialogues_are_parted_after_the_assistants_last_shared_mark(read):
    ((pair,), report) = read({"chosen": TALK + " 31, I think", "rejected": TALK + " 31 or 30"})
    assert texts(pair) == (TALK, " 31, I think<|endoftext|>", " 31 or 30<|endoftext|>")
    assert not report.notes


def test_mark_after_the_dialogues_differ_does_not_part_them(read):
    longer = TALK + " 31\n\nHuman: sure?\n\nAssistant: yes"
    ((pair,), _) = read({"chosen": TALK + " 30", "rejected": longer})
    assert pair.prompt == TALK
    assert pair.rejected == longer[len(TALK) :]


def test_another_mark_may_be_named(read):
    row = {"chosen": "ASK eggs SAY 31", "rejected": "ASK eggs SAY 30"}
    ((pair,), _) = read(row, assistant_mark="SAY")
    assert pair.prompt == "ASK eggs SAY"


def test_texts_without_a_mark_are_parted_where_a_shared_word_ends(read):
    ((pair,), report) = read({"chosen": "the eggs are fine", "rejected": "the eggs are found"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("the eggs are", " fine", " found")
    ((pair,), _) = read({"chosen": "the eggs are", "rejected": "the eggs are found"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("the eggs", " are", " are found")
    ((pair,), _) = read({"chosen": "two a b", "rejected": "two c d"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("two", " a b", " c d")
    assert "longest common beginning" in next(iter(report.notes))


def test_texts_without_a_mark_are_never_parted_inside_a_token(write):
    tokenizer = chatml_tokenizer()
    row = {"chosen": "the eggs are fine", "rejected": "the eggs are found"}
    tokenizer.add_tokens(["are f"])
    (pair,) = load_preferences(PreferencesConfig(path=write(row)), tokenizer)
    for text, tokens in zip((row["chosen"], row["rejected"]), pair.group.responses, strict=True):
        assert [*pair.group.prompt, *tokens] == [*encode(tokenizer, text), EOS]
    assert pair.prompt == "the eggs"


def test_texts_that_share_nothing_are_refused_with_a_remedy(read):
    with pytest.raises(DataError, match=r"rows.jsonl:1: no `prompt`.*\{prompt: ...\}"):
        read({"chosen": "yes, 31", "rejected": "no"})
    with pytest.raises(DataError, match="share no first message"):
        read({"chosen": [says("31")], "rejected": [says("30")]})


def test_equal_and_empty_pairs_are_dropped_and_counted(read):
    good = {"prompt": "eggs?", "chosen": " 31", "rejected": " 30"}
    same, empty = {**good, "rejected": " 31"}, {**good, "chosen": "  "}
    whole = {"chosen": TALK + " 31", "rejected": TALK + " 31"}
    chat = {"chosen": [*ASKED, says("31")], "rejected": [*ASKED, says("31")]}
    (pairs, report) = read(good, same, empty, whole, chat)
    assert len(pairs) == 1
    assert report.dropped == {"chosen equals rejected": 3, "empty response": 1}


def test_pairs_that_are_equal_once_cut_are_dropped(read):
    row = {"prompt": "eggs?", "chosen": " a b c d e f", "rejected": " a b c d e g"}
    other = {"prompt": "eggs?", "chosen": " 31", "rejected": " 30"}
    (pairs, report) = read(row, other, max_response_tokens=5, long_responses="truncate")
    assert [pair.index for pair in pairs] == [1]
    assert report.dropped == {"chosen equals rejected": 1}


def test_pairs_and_steps_with_long_prompts_are_dropped_and_counted(read, read_steps):
    pair = {"chosen": " 31", "rejected": " 30"}
    steps = {"completions": ["4.", "5."], "labels": [1, 0]}
    for reading, row in ((read, pair), (read_steps, steps)):
        rows = [{"prompt": "eggs? " * 9, **row}, {"prompt": "eggs?", **row}]
        (items, report) = reading(*rows, max_prompt_tokens=8, long_prompts="drop")
        assert len(items) == 1
        assert report.dropped == {"prompt longer than 8 tokens": 1}


def test_chats_that_differ_before_their_last_turn_are_dropped_and_counted(read):
    again = [{"role": "user", "content": "sure?"}, says("yes")]
    good = {"chosen": [*ASKED, says("31")], "rejected": [*ASKED, says("30")]}
    (pairs, report) = read(
        good,
        {"chosen": [*ASKED, says("31"), *again], "rejected": [*ASKED, says("30")]},
        {"chosen": [*ASKED, says("31"), *again], "rejected": [*ASKED, says("31")]},
    )
    assert len(pairs) == 1
    assert report.dropped == {"the dialogues differ before their last turn": 2}


def test_responses_that_repeat_the_prompt_are_noted(read):
    (_, report) = read({"prompt": "eggs?", "chosen": "eggs? 31", "rejected": "eggs? 30"})
    assert "both repeat the prompt" in next(iter(report.notes))


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"prompt": "x", "chosen": "y"}, {}, "no column `rejected`; the columns are prompt"),
        ({"prompt": "x", "chosen": "y", "rejected": 3}, {}, "`rejected` is 3"),
        ({"prompt": "x", "chosen": "y", "rejected": ASKED}, {}, "runs from a message of 'user'"),
        ({"chosen": "y", "rejected": [says("z")]}, {}, "`rejected` is"),
        ({"chosen": TALK + " y", "rejected": TALK + " z"}, {"chat": True}, "leave the two out"),
        (
            {"chosen": [*ASKED, says("y")], "rejected": [*ASKED, says("z")]},
            {"template": "Q:"},
            "remove `template`",
        ),
    ],
)
def test_row_that_is_no_pair_is_named_with_the_reason(read, row, options, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{reason}"):
        read(row, **options)


def test_human_preferences_come_apart_as_their_dialogues_say(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "checkpoints" / "stories260k")
    path = shared_dir / "datasets" / "hh-rlhf-harmless" / "test.jsonl.gz"
    pairs, report = read_preferences(PreferencesConfig(path=str(path)), tokenizer)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert (report.rows, report.kept) == (2312, 2308)
    assert report.dropped == {"empty response": 4}
    for pair in pairs:
        row = rows[pair.index]
        assert isinstance(pair.prompt, str)
        assert pair.prompt.endswith("\n\nAssistant:")
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (
            row["chosen"],
            row["rejected"],
        )
    for pair in pairs[:50]:
        assert decode_response(tokenizer, pair.group.responses[0]) == pair.chosen


# --- steps ----------------------------------------------------------------------------------------

STEPS = ["Step 1: 31+9=40.", "Step 2: 40+6=46.", "So the answer is 46."]


def test_steps_end_at_their_last_tokens_and_keep_their_labels(read_steps):
    row = {"prompt": "eggs?\n", "completions": STEPS, "labels": [True, 0, 0.5]}
    ((item,), _) = read_steps(row)
    assert item.labels == [1.0, 0.0, 0.5]
    (response,) = item.group.responses
    assert BYTES.decode(response) == "\n".join(STEPS) + "<|endoftext|>"
    ends = [BYTES.decode(response[: end + 1]) for end in item.ends]
    assert ends == ["\n".join(STEPS[: n + 1]) for n in range(3)]


def test_steps_that_bring_their_own_line_breaks_end_before_them(read_steps):
    row = {"prompt": "eggs?\n", "completions": [f"{step}\n" for step in STEPS], "labels": [1, 0, 1]}
    ((item,), _) = read_steps(row, separator="")
    (response,) = item.group.responses
    ends = [BYTES.decode(response[: end + 1]) for end in item.ends]
    assert ends == ["\n".join(STEPS[: n + 1]) for n in range(3)]


def test_steps_of_a_chat_are_found_in_the_rendered_turn(read_steps):
    trimming = chatml_tokenizer(CHATML.replace("m['content']", "m['content'] | trim"))
    row = {"prompt": ASKED, "completions": ["  31.", "46. "], "labels": [1, 0]}
    for tokenizer in (BYTES, trimming):
        ((item,), _) = read_steps(row, tokenizer=tokenizer)
        (response,) = item.group.responses
        ends = [decode_response(BYTES, response[: end + 1]).strip() for end in item.ends]
        assert ends == ["31.", "31.\n46."]


def test_steps_after_the_limit_are_cut_with_their_labels(read_steps):
    row = {"prompt": "eggs?\n", "completions": STEPS, "labels": [1, 0, 1]}
    ((whole,), _) = read_steps(row)
    limit = whole.ends[1] + 1
    ((cut,), _) = read_steps(row, max_response_tokens=limit, long_responses="truncate")
    assert (cut.ends, cut.labels) == (whole.ends[:2], [1.0, 0.0])
    assert cut.group.responses == [whole.group.responses[0][:limit]]
    ((shorter,), _) = read_steps(row, max_response_tokens=limit - 1, long_responses="truncate")
    assert (shorter.ends, shorter.labels) == (whole.ends[:1], [1.0])
    short = {"prompt": "eggs?\n", "completions": ["4.", "5."], "labels": [1, 0]}
    (items, report) = read_steps(row, short, max_response_tokens=6, long_responses="truncate")
    assert len(items) == 1
    assert report.dropped == {"no step within `max_response_tokens`": 1}


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        ({"labels": [1]}, {}, "has 2 `completions` and 1 `labels`"),
        ({"labels": [1, 2]}, {}, "label 2 is 2"),
        ({"labels": [1, -1]}, {}, "label 2 is -1"),
        ({"labels": [1, float("nan")]}, {}, "label 2 is nan"),
        ({"labels": [1, "+"]}, {}, r"label 2 is '\+'"),
        ({"labels": 1}, {}, "`labels` is 1; it takes a list"),
        ({"completions": "4. 5."}, {}, "it takes a list of texts"),
        ({"completions": ["4.", 5]}, {}, "step 2 of `completions` is 5"),
        ({"completions": ["4.", " "]}, {}, "step 2 of `completions` is empty"),
        ({"completions": ["4", "0"]}, {"separator": ""}, "steps 1 and 2 end in the same token"),
    ],
)
def test_faulty_steps_are_named_with_the_reason(read_steps, change, options, reason):
    row = {"prompt": "eggs?\n", "completions": ["4.", "5."], "labels": [1, 0], **change}
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{reason}"):
        read_steps(row, **options)
