"""Rows that are refused, and rows of which the report says what is not learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from helpers.row_forms import (
    ASK,
    EARLIER_THOUGHTS,
    END,
    TEMPLATE,
    TOOL,
    TURN,
    call,
    read,
    says,
    write,
)

from trivium.errors import DataError, ModelError

# --- rows that are refused ------------------------------------------------------------------------

PAIR = {"chosen": "so 3", "rejected": "so 4"}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "prompt under another name": ("dpo", {**PAIR, "question": "?"}, r"columns: {prompt: question}"),
    "unknown sender": ("sft", {"conversations": [{"from": "bard", "value": "x"}]},
                       r"message 1 of column `messages` is from 'bard', and known are human, "),
    "conversation that is no chat": ("sft", {"conversations": [3]}, r"`conversations` is \[3\]"),
    "another role": ("sft", {"messages": [{"role": "Human", "content": "x"}, says("3")]},
                     r"`role` of message 1 .* is 'Human', which templates do not know; write user"),
    "an image": ("grpo", {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
                 r"message 1 of column `prompt` has the parts image"),
    "a weight between": ("sft", {"messages": [ASK, says("3", weight=0.5)]},
                         "`weight` of message 2 of column `messages` is 0.5"),
    "tools that are none": ("grpo", {"prompt": [ASK], "tools": ["hammer"]},
                            r"column `tools` is \['hammer'\], not a list of JSON schemas"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", REFUSED)
def test_row_of_unknown_meaning_is_refused_with_what_to_write(
    tmp_path: Path, name: str, form: str
) -> None:
    method, row, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, form, [row]), method)


@pytest.mark.parametrize("method", ["sft", "dpo", "grpo"])
def test_tools_that_the_template_does_not_read_are_an_error(tmp_path: Path, method: str) -> None:
    row = {"prompt": [ASK], "completion": "3", "chosen": "3", "rejected": "4", "tools": [TOOL]}
    with pytest.raises(DataError, match=r"rows.jsonl:1: the chat template of .* read tools"):
        read(write(tmp_path, "jsonl", [row]), method, chatml_tokenizer())


def test_chat_without_a_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        read(
            write(tmp_path, "jsonl", [{"messages": [ASK, says("3")]}]),
            "sft",
            chatml_tokenizer(None),
        )


# --- rows that are not learned as they are --------------------------------------------------------

THOUGHTS = {"messages": [ASK, says("<think>so</think>3"), ASK, says("4")]}
NO_SYSTEM = TEMPLATE.replace(
    "%}{{ '<|im_start|>' + m.role", "if m.role != 'system' %}{{ '<|im_start|>' + m.role"
)
REMARKS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "thoughts": ("sft", EARLIER_THOUGHTS, THOUGHTS,
                 "leaves out or changes the thoughts of assistant messages, up to </think>"),
    "thoughts in a prompt": ("grpo", EARLIER_THOUGHTS, {"prompt": THOUGHTS["messages"][:3]},
                             "the thoughts of assistant messages, up to </think>"),
    "reasoning": ("sft", TEMPLATE.replace("m.reasoning_content %}", "false %}"),
                  {"messages": [ASK, says("3", reasoning_content="since so")]},
                  "leaves out or changes the reasoning of assistant messages"),
    "tool calls": ("dpo", TEMPLATE.replace("in m.tool_calls or []", "in []"),
                   {"prompt": [ASK], "rejected": [says("3")],
                    "chosen": [says("4", tool_calls=[call("add", {"a": "one"})])]},
                   "leaves out or changes tool calls of assistant messages"),
    "a system message": ("grpo", NO_SYSTEM,
                         {"prompt": [{"role": "system", "content": "Be brief."}, ASK]},
                         "leaves out or changes the text of system messages"),
    "an end token": ("sft", TEMPLATE, {"messages": [{"role": "user", "content": "a<|im_end|>b"},
                                                    says("3")]},
                     r"a message contains <|im_end|>, which the tokenizer reads as the end"),
    "tools of a plain prompt": ("grpo", TEMPLATE, {"prompt": "1 + 2", "tools": [TOOL]},
                                "column `tools` is not used: the prompt is plain text"),
    "system of plain text": ("sft", TEMPLATE, {"text": "1 + 2", "system": "Be brief."},
                             "column `system` is not used: the prompt is plain text"),
    "nulls in arguments": ("sft", TEMPLATE,
                           {"messages": [ASK, says("", tool_calls=[call("add", {"a": None})])]},
                           "nulls in the arguments of tool calls are left out"),
}  # fmt: skip


@pytest.mark.parametrize("name", REMARKS)
def test_report_says_what_is_not_learned_in_how_many_rows_and_where_first(
    tmp_path: Path, name: str
) -> None:
    method, template, row, remark = REMARKS[name]
    plain = {"prompt": [ASK], "completion": "3", "chosen": "3", "rejected": "4"}
    path = write(tmp_path, "jsonl", [plain, row, row])
    report = read(path, method, chatml_tokenizer(template))[1]
    ((note, count),) = [(note, n) for note, n in report.notes.items() if remark in note]
    assert count == 2
    assert report.noted_rows[note] == [f"{path}:2", f"{path}:3"]
    assert f"2 noted: {note} ({path}:2; {path}:3)" in str(report)


def test_report_names_the_first_three_rows_of_a_remark(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [THOUGHTS] * 4)
    report = str(read(path, "grpo", chatml_tokenizer(EARLIER_THOUGHTS))[1])
    assert f"up to </think> ({path}:1; {path}:2; {path}:3; …)" in report


def test_completion_that_the_template_changes_follows_the_prompt_as_it_is(tmp_path: Path) -> None:
    rows = [{"prompt": [ASK], "completion": "<think>so</think>3"}]
    path = write(tmp_path, "jsonl", rows)
    texts, report = read(path, "sft", chatml_tokenizer(EARLIER_THOUGHTS))
    assert texts == [(TURN, "<think>so</think>3" + END)]
    assert any("its text follows the opened turn" in note for note in report.notes)
