"""Preference pairs and step labels: common prompts, and the last token of each step."""

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
QUESTION = [{"role": "user", "content": "how many eggs?"}]
RENDERED_PROMPT = "<|im_start|>user\nhow many eggs?<|im_end|>\n<|im_start|>assistant\n"
DIALOGUE = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: eggs?\n\nAssistant:"


def assistant(text):
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
        {"prompt": QUESTION, "chosen": "31", "rejected": "30"},
        {"prompt": QUESTION, "chosen": [assistant("31")], "rejected": [assistant("30")]},
        {"prompt": "how many eggs?", "chosen": [assistant("31")], "rejected": [assistant("30")]},
        {"chosen": [*QUESTION, assistant("31")], "rejected": [*QUESTION, assistant("30")]},
        {
            "prompt": "other",
            "chosen": [*QUESTION, assistant("31")],
            "rejected": [*QUESTION, assistant("30")],
        },
    ],
)
def test_all_chat_formats_give_the_same_pair(read, row):
    ((pair,), _) = read(row)
    assert texts(pair) == (RENDERED_PROMPT, "31<|im_end|>", "30<|im_end|>")
    assert (pair.prompt, pair.chosen, pair.rejected) == (QUESTION, "31", "30")


def test_plain_dialogues_are_split_after_the_last_common_assistant_mark(read):
    ((pair,), report) = read(
        {"chosen": DIALOGUE + " 31, I think", "rejected": DIALOGUE + " 31 or 30"}
    )
    assert texts(pair) == (DIALOGUE, " 31, I think<|endoftext|>", " 31 or 30<|endoftext|>")
    assert not report.notes


def test_mark_after_the_first_difference_is_ignored(read):
    longer = DIALOGUE + " 31\n\nHuman: sure?\n\nAssistant: yes"
    ((pair,), _) = read({"chosen": DIALOGUE + " 30", "rejected": longer})
    assert pair.prompt == DIALOGUE
    assert pair.rejected == longer[len(DIALOGUE) :]


def test_assistant_mark_is_configurable(read):
    row = {"chosen": "ASK eggs SAY 31", "rejected": "ASK eggs SAY 30"}
    ((pair,), _) = read(row, assistant_mark="SAY")
    assert pair.prompt == "ASK eggs SAY"


def test_texts_without_a_mark_are_split_after_the_last_common_word(read):
    ((pair,), report) = read({"chosen": "the eggs are fine", "rejected": "the eggs are found"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("the eggs are", " fine", " found")
    ((pair,), _) = read({"chosen": "the eggs are", "rejected": "the eggs are found"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("the eggs", " are", " are found")
    ((pair,), _) = read({"chosen": "two a b", "rejected": "two c d"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("two", " a b", " c d")
    assert "longest common prefix" in next(iter(report.notes))


def test_texts_without_a_mark_are_never_split_inside_a_token(write):
    tokenizer = chatml_tokenizer()
    row = {"chosen": "the eggs are fine", "rejected": "the eggs are found"}
    tokenizer.add_tokens(["are f"])
    (pair,) = load_preferences(PreferencesConfig(path=write(row)), tokenizer)
    for text, tokens in zip((row["chosen"], row["rejected"]), pair.group.responses, strict=True):
        assert [*pair.group.prompt, *tokens] == [*encode(tokenizer, text), EOS]
    assert pair.prompt == "the eggs"


def test_texts_without_a_common_word_are_refused_with_a_remedy(read):
    with pytest.raises(DataError, match=r"rows.jsonl:1: there is no `prompt`.*\{prompt: ...\}"):
        read({"chosen": "yes, 31", "rejected": "no"})
    with pytest.raises(DataError, match="do not begin with the same message"):
        read({"chosen": [assistant("31")], "rejected": [assistant("30")]})


def test_equal_and_empty_pairs_are_dropped_and_counted(read):
    good = {"prompt": "eggs?", "chosen": " 31", "rejected": " 30"}
    equal, empty = {**good, "rejected": " 31"}, {**good, "chosen": "  "}
    dialogue = {"chosen": DIALOGUE + " 31", "rejected": DIALOGUE + " 31"}
    chat = {"chosen": [*QUESTION, assistant("31")], "rejected": [*QUESTION, assistant("31")]}
    (pairs, report) = read(good, equal, empty, dialogue, chat)
    assert len(pairs) == 1
    assert report.dropped == {"chosen equals rejected": 3, "empty response": 1}


def test_pairs_that_are_equal_after_truncation_are_dropped(read):
    row = {"prompt": "eggs?", "chosen": " a b c d e f", "rejected": " a b c d e g"}
    other = {"prompt": "eggs?", "chosen": " 31", "rejected": " 30"}
    (pairs, report) = read(row, other, max_response_tokens=5, long_responses="truncate")
    assert [pair.index for pair in pairs] == [1]
    assert report.dropped == {"chosen equals rejected": 1}


def test_pairs_and_steps_with_long_prompts_are_dropped_and_counted(read, read_steps):
    pair = {"chosen": " 31", "rejected": " 30"}
    steps = {"completions": ["4.", "5."], "labels": [1, 0]}
    for read_rows, row in ((read, pair), (read_steps, steps)):
        rows = [{"prompt": "eggs? " * 9, **row}, {"prompt": "eggs?", **row}]
        (items, report) = read_rows(*rows, max_prompt_tokens=8, long_prompts="drop")
        assert len(items) == 1
        assert report.dropped == {"prompt longer than 8 tokens": 1}


def test_chats_that_differ_before_their_last_turn_are_dropped_and_counted(read):
    follow_up = [{"role": "user", "content": "sure?"}, assistant("yes")]
    good = {"chosen": [*QUESTION, assistant("31")], "rejected": [*QUESTION, assistant("30")]}
    (pairs, report) = read(
        good,
        {
            "chosen": [*QUESTION, assistant("31"), *follow_up],
            "rejected": [*QUESTION, assistant("30")],
        },
        {
            "chosen": [*QUESTION, assistant("31"), *follow_up],
            "rejected": [*QUESTION, assistant("31")],
        },
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
        (
            {"prompt": "x", "chosen": "y", "rejected": QUESTION},
            {},
            "begins with a message of 'user'",
        ),
        ({"chosen": "y", "rejected": [assistant("z")]}, {}, "`rejected` is"),
        (
            {"chosen": DIALOGUE + " y", "rejected": DIALOGUE + " z"},
            {"chat": True},
            "remove `chat` and",
        ),
        (
            {"chosen": [*QUESTION, assistant("y")], "rejected": [*QUESTION, assistant("z")]},
            {"template": "Q:"},
            "remove `template`",
        ),
    ],
)
def test_invalid_pair_is_reported_with_line_and_reason(read, row, options, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{reason}"):
        read(row, **options)


def test_hh_rlhf_dialogues_are_split_at_the_assistant_mark(shared_dir):
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


def test_step_ends_exclude_the_line_break_of_a_step(read_steps):
    row = {"prompt": "eggs?\n", "completions": [f"{step}\n" for step in STEPS], "labels": [1, 0, 1]}
    ((item,), _) = read_steps(row, separator="")
    (response,) = item.group.responses
    ends = [BYTES.decode(response[: end + 1]) for end in item.ends]
    assert ends == ["\n".join(STEPS[: n + 1]) for n in range(3)]


def test_steps_of_a_chat_are_found_in_the_rendered_turn(read_steps):
    trimming = chatml_tokenizer(CHATML.replace("m['content']", "m['content'] | trim"))
    row = {"prompt": QUESTION, "completions": ["  31.", "46. "], "labels": [1, 0]}
    for tokenizer in (BYTES, trimming):
        ((item,), _) = read_steps(row, tokenizer=tokenizer)
        (response,) = item.group.responses
        ends = [decode_response(BYTES, response[: end + 1]).strip() for end in item.ends]
        assert ends == ["31.", "31.\n46."]


def test_steps_beyond_the_limit_are_truncated_with_their_labels(read_steps):
    row = {"prompt": "eggs?\n", "completions": STEPS, "labels": [1, 0, 1]}
    ((complete,), _) = read_steps(row)
    limit = complete.ends[1] + 1
    ((truncated,), _) = read_steps(row, max_response_tokens=limit, long_responses="truncate")
    assert (truncated.ends, truncated.labels) == (complete.ends[:2], [1.0, 0.0])
    assert truncated.group.responses == [complete.group.responses[0][:limit]]
    ((shorter,), _) = read_steps(row, max_response_tokens=limit - 1, long_responses="truncate")
    assert (shorter.ends, shorter.labels) == (complete.ends[:1], [1.0])
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
        ({"labels": 1}, {}, "`labels` is 1; write a list"),
        ({"completions": "4. 5."}, {}, "write a list of texts"),
        ({"completions": ["4.", 5]}, {}, "step 2 of `completions` is 5"),
        ({"completions": ["4.", " "]}, {}, "step 2 of `completions` is empty"),
        ({"completions": ["4", "0"]}, {"separator": ""}, "steps 1 and 2 end in the same token"),
    ],
)
def test_invalid_steps_are_reported_with_the_reason(read_steps, change, options, reason):
    row = {"prompt": "eggs?\n", "completions": ["4.", "5."], "labels": [1, 0], **change}
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{reason}"):
        read_steps(row, **options)
