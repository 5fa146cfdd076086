"""Demonstrations: tokens of prompt and response, loss mask, limits and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from pydantic import ValidationError
from transformers import AutoTokenizer

from trivium.data.chat import decode_response, encode
from trivium.data.demonstrations import (
    DemonstrationsConfig,
    load_demonstrations,
    read_demonstrations,
)
from trivium.errors import DataError

BYTES: Any = chatml_tokenizer()
EOS = BYTES.eos_token_id
QUESTION = [{"role": "user", "content": "how many eggs?"}]
ANSWER = {"role": "assistant", "content": "31"}
FOLLOW_UP = {"role": "user", "content": "and then?"}


@pytest.fixture
def read(tmp_path):
    def read(*rows, tokenizer=BYTES, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_demonstrations(DemonstrationsConfig(path=str(path), **options), tokenizer)

    return read


def texts(item):
    return BYTES.decode(item.group.prompt), BYTES.decode(item.group.responses[0])


def trained_text(item):
    pairs = zip(item.group.responses[0], item.loss_mask, strict=True)
    return BYTES.decode([token for token, has_loss in pairs if has_loss])


# --- formats --------------------------------------------------------------------------------------


def test_prompt_and_completion_give_a_response_with_loss_on_every_token(read):
    ((item,), _) = read({"prompt": "Q: eggs?\nA:", "completion": " 31"})
    assert texts(item) == ("Q: eggs?\nA:", " 31<|endoftext|>")
    assert all(item.loss_mask)
    assert len(item.loss_mask) == len(item.group.responses[0])


def test_question_and_answer_columns_are_mapped(read):
    columns = {"prompt": "question", "completion": "answer"}
    ((item,), _) = read({"question": "eggs?", "answer": " 31"}, columns=columns)
    assert texts(item) == ("eggs?", " 31<|endoftext|>")


def test_template_writes_the_prompt_of_a_completion(read):
    options = {"template": "Q: {question}\nA:", "columns": {"completion": "answer"}}
    ((item,), _) = read({"question": "eggs?", "answer": " 31"}, **options)
    assert texts(item) == ("Q: eggs?\nA:", " 31<|endoftext|>")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "completion": "31"},
        {"prompt": QUESTION, "completion": [ANSWER]},
        {"messages": [*QUESTION, ANSWER]},
        {"messages": [*QUESTION, {**ANSWER, "name": None}], "prompt": "not this one"},
    ],
)
def test_all_chat_formats_give_the_same_demonstration(read, row):
    ((item,), _) = read(row)
    prompt = "<|im_start|>user\nhow many eggs?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(item) == (prompt, "31<|im_end|>")


def test_user_turns_inside_a_response_have_no_loss(read):
    second = {"role": "assistant", "content": "46"}
    ((item,), report) = read({"messages": [*QUESTION, ANSWER, FOLLOW_UP, second, FOLLOW_UP]})
    assert trained_text(item) == "31<|im_end|>46<|im_end|>"
    assert BYTES.decode(item.group.responses[0]).count("and then?") == 1
    assert report.notes == {"turns after the last assistant turn are left out": 1}


def test_text_without_a_prompt_has_a_loss_after_its_first_token(read):
    ((item,), _) = read({"text": "two and two make four."})
    tokens = encode(BYTES, "two and two make four.")
    assert [*item.group.prompt, *item.group.responses[0]] == [*tokens, EOS]
    assert len(item.group.prompt) == 1


def test_chat_and_system_options_apply_to_demonstrations(read):
    ((item,), _) = read({"prompt": "eggs?", "completion": "31"}, chat=True, system="be brief")
    assert texts(item)[0].startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\neggs"
    )
    ((item,), _) = read({"messages": [*QUESTION, ANSWER]}, system="be brief")
    assert texts(item)[0].startswith("<|im_start|>system\nbe brief")
    assert texts(item)[1] == "31<|im_end|>"


def test_gsm8k_demonstrations_decode_to_question_and_answer(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "checkpoints" / "stories260k")
    config = DemonstrationsConfig(
        path=str(shared_dir / "datasets" / "gsm8k" / "train.jsonl.gz"),
        columns={"completion": "answer"},
        template="Question: {question}\nAnswer:\n",
        limit=300,
    )
    items = load_demonstrations(config, tokenizer)
    assert len(items) == 300
    for item in items:
        (response,) = item.group.responses
        assert (item.group.prompt[0], response[-1]) == (tokenizer.bos_token_id, 2)
        assert response.count(2) == 1
        assert tokenizer.decode(item.group.prompt[1:]).startswith("Question: ")
        assert "\n#### " in decode_response(tokenizer, response)


# --- limits ---------------------------------------------------------------------------------------


def test_long_responses_are_errors_or_dropped_or_truncated_without_eos(read):
    rows = [{"prompt": "A:", "completion": " 31" * 20}, {"prompt": "A:", "completion": " 31"}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: a response has \d+ tokens.* is 6; raise"):
        read(*rows, max_response_tokens=6)
    (items, report) = read(*rows, max_response_tokens=6, long_responses="drop")
    assert (len(items), report.dropped) == (1, {"response longer than 6 tokens": 1})
    (items, report) = read(*rows, max_response_tokens=6, long_responses="truncate")
    (truncated, complete) = [item.group.responses[0] for item in items]
    assert (len(truncated), EOS in truncated, complete[-1]) == (6, False, EOS)
    assert len(items[0].loss_mask) == 6
    assert report.notes == {"response truncated at 6 tokens": 1}


def test_response_of_exactly_the_limit_keeps_its_eos(read):
    row = {"prompt": "A:", "completion": " 31"}
    length = len(encode(BYTES, " 31")) + 1
    ((item,), report) = read(row, max_response_tokens=length, long_responses="truncate")
    assert item.group.responses[0][-1] == EOS
    assert not report.notes


def test_response_truncated_before_the_first_assistant_token_is_dropped(read):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    empty = {"role": "assistant", "content": ""}
    rows = [{"messages": [*QUESTION, empty, FOLLOW_UP, ANSWER]}, {"messages": [*QUESTION, ANSWER]}]
    (items, report) = read(
        *rows,
        tokenizer=chatml_tokenizer(template),
        max_response_tokens=4,
        long_responses="truncate",
    )
    assert len(items) == 1
    assert report.dropped == {"no token to train on within `max_response_tokens`": 1}


def test_demonstrations_with_long_prompts_are_dropped(read):
    rows = [{"prompt": "A:" * 20, "completion": " 31"}, {"prompt": "A:", "completion": " 31"}]
    (items, report) = read(*rows, max_prompt_tokens=8, long_prompts="drop")
    assert (len(items), report.dropped) == (1, {"prompt longer than 8 tokens": 1})


def test_option_without_its_limit_is_refused():
    with pytest.raises(ValidationError, match="set `max_response_tokens`"):
        DemonstrationsConfig(path="x", long_responses="truncate")


# --- errors ---------------------------------------------------------------------------------------


def test_empty_responses_are_dropped_and_counted(read):
    good = {"prompt": "A:", "completion": " 31"}
    empty = {"role": "assistant", "content": ""}
    (items, report) = read(
        good, {**good, "completion": " \n"}, {"messages": [*QUESTION, empty]}, {"text": ""}
    )
    assert (len(items), report.dropped) == (1, {"empty response": 3})


def test_prompt_that_shares_a_token_with_its_response_is_noted(read):
    ((item,), report) = read({"prompt": "the answer is ", "completion": "the answer"})
    assert texts(item) == ("the answer is ", "the answer<|endoftext|>")
    assert [note.split(",")[0] for note in report.notes] == [
        "prompt and response would share a token"
    ]


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        ({"question": "x"}, {}, "no demonstration: the columns are question, and a demon"),
        ({"prompt": "x", "completion": 3}, {}, "`completion` is 3"),
        ({"completion": "x"}, {}, "no column `prompt`"),
        ({"prompt": "x"}, {"template": "{prompt}"}, "no column `completion`"),
        ({"prompt": "x", "completion": [ANSWER]}, {}, "chat: true"),
        (
            {"prompt": QUESTION, "completion": [*QUESTION, ANSWER]},
            {},
            "begins with a message of 'user'",
        ),
        ({"prompt": QUESTION, "completion": [ANSWER, *QUESTION]}, {}, "ends with one of 'user'"),
        ({"messages": QUESTION}, {}, "no assistant turn after another"),
        ({"messages": [ANSWER, *QUESTION]}, {}, "no assistant turn after another"),
        ({"text": "x"}, {"chat": True}, "remove `chat`"),
        ({"text": 3}, {}, "`text` is 3"),
    ],
)
def test_invalid_row_is_reported_with_line_and_reason(read, row, options, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{reason}"):
        read(row, **options)
