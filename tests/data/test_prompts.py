"""Prompts from a column, a template, a chat or a pair of dialogues, and their limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.data_tokenizers import chatml_tokenizer
from pydantic import ValidationError
from transformers import AutoTokenizer

from trivium.data.chat import encode
from trivium.data.prompt_forms import fill_template
from trivium.data.prompts import PromptsConfig, load_prompts, read_prompts
from trivium.data.rows import Row
from trivium.errors import DataError

BYTES: Any = chatml_tokenizer()
QUESTION = [{"role": "user", "content": "how many eggs?"}]
ANSWER = {"role": "assistant", "content": "31"}


@pytest.fixture
def load(tmp_path):
    def load(*rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_prompts(PromptsConfig(path=str(path), **options), BYTES)

    return load


def text_of(prompt):
    return BYTES.decode(prompt.tokens)


def test_plain_prompt_is_used_verbatim_with_the_rows_other_columns(load):
    (first, second) = load({"prompt": " 2+2?\n", "answer": 4}, {"prompt": "3?", "answer": 3})
    assert (first.text, text_of(first)) == (" 2+2?\n", " 2+2?\n")
    assert [prompt.columns for prompt in (first, second)] == [{"answer": 4}, {"answer": 3}]
    assert [prompt.index for prompt in (first, second)] == [0, 1]


def test_mapped_prompt_column_keeps_its_original_name_too(load):
    (prompt,) = load({"question": "2+2?", "answer": "4"}, columns={"prompt": "question"})
    assert prompt.text == "2+2?"
    assert prompt.columns == {"question": "2+2?", "answer": "4"}


def test_messages_are_rendered_with_an_open_assistant_turn(load):
    rendered = "<|im_start|>user\nhow many eggs?<|im_end|>\n<|im_start|>assistant\n"
    for row in ({"prompt": QUESTION}, {"messages": QUESTION}, {"messages": [*QUESTION, ANSWER]}):
        (prompt,) = load(row)
        assert (text_of(prompt), prompt.text) == (rendered, QUESTION)


def test_removed_assistant_turn_stays_in_the_columns(load):
    (prompt,) = load({"messages": [*QUESTION, ANSWER]})
    assert prompt.columns["messages"][-1] == ANSWER


def test_chat_option_makes_plain_text_a_user_message_after_the_system_message(load):
    (prompt,) = load({"prompt": "how many eggs?"}, chat=True, system="be brief")
    system = {"role": "system", "content": "be brief"}
    assert prompt.text == [system, *QUESTION]
    (own,) = load({"prompt": [{"role": "system", "content": "mine"}, *QUESTION]}, system="be brief")
    assert own.text[0]["content"] == "mine"


def test_system_message_without_a_chat_is_an_error(load):
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: .*cannot have a `system` message.*chat: true"
    ):
        load({"prompt": "how many eggs?"}, system="be brief")


def test_prompt_that_ends_with_an_assistant_turn_is_refused(load):
    with pytest.raises(DataError, match="ends with an assistant turn"):
        load({"prompt": [*QUESTION, ANSWER]})


def test_dialogues_of_a_pair_give_their_common_prompt(load):
    dialogue = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: eggs?\n\nAssistant:"
    pair = {"chosen": dialogue + " 31", "rejected": dialogue + " 30"}
    (prompt,) = load(pair)
    assert prompt.text == dialogue
    assert prompt.columns == pair


def test_equal_dialogues_give_no_prompt(load):
    pair = {"chosen": "two eggs are", "rejected": "two eggs are"}
    (prompt,) = load(pair, {"prompt": "eggs?"})
    assert prompt.text == "eggs?"


def test_error_for_a_missing_prompt_lists_the_columns(load):
    with pytest.raises(DataError, match=r"rows.jsonl:2: no column `prompt`; the columns are promt"):
        load({"prompt": "x"}, {"promt": "x"})


@pytest.mark.parametrize(("value", "reason"), [(3, "is 3"), ({}, "is {}"), ("\ud800", "surrogate")])
def test_prompt_that_is_not_text_is_refused(load, value, reason):
    with pytest.raises(DataError, match=reason):
        load({"prompt": value})


def test_empty_prompt_needs_a_bos(load, shared_dir, tmp_path):
    with pytest.raises(DataError, match="prompt is empty and the tokenizer adds no BOS"):
        load({"prompt": ""})
    stories = AutoTokenizer.from_pretrained(shared_dir / "checkpoints" / "stories260k")
    config = PromptsConfig(path=str(tmp_path / "rows.jsonl"))
    assert load_prompts(config, stories)[0].tokens == [stories.bos_token_id]


# --- limits ---------------------------------------------------------------------------------------


def test_long_prompts_are_errors_or_dropped_and_row_numbers_are_kept(load, tmp_path):
    rows = [{"prompt": "eggs " * 20}, {"prompt": "eggs"}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: the prompt has \d+ tokens.*is 9;.*drop"):
        load(*rows, max_prompt_tokens=9)
    (prompt,) = load(*rows, max_prompt_tokens=9, long_prompts="drop")
    assert prompt.index == 1
    config = PromptsConfig(
        path=str(tmp_path / "rows.jsonl"), max_prompt_tokens=9, long_prompts="drop"
    )
    assert read_prompts(config, BYTES)[1].dropped == {"prompt longer than 9 tokens": 1}


def test_prompt_of_exactly_the_limit_is_kept(load):
    length = len(encode(BYTES, "how many eggs?"))
    assert load({"prompt": "how many eggs?"}, max_prompt_tokens=length)
    with pytest.raises(DataError):
        load({"prompt": "how many eggs?"}, max_prompt_tokens=length - 1)


# --- templates ------------------------------------------------------------------------------------


def test_template_is_filled_from_columns_and_evaluates_nothing_else():
    row = Row({"q": "2+2 in {q}", "n": 3, "a.b": "x"}, 0, "here")
    assert fill_template("Q: {q} ({n}, {a.b}) {{q}}\n", row) == "Q: 2+2 in {q} (3, x) {q}\n"


@pytest.mark.parametrize("name", ["q.__class__", "q[0]", "q!r", "q:>9", "0", " q"])
def test_template_fields_are_plain_column_names(name):
    with pytest.raises(DataError, match="the columns are q"):
        fill_template(f"{{{name}}}", Row({"q": "x"}, 0, "here"))


def test_template_with_an_unknown_column_suggests_the_nearest():
    with pytest.raises(
        DataError, match=r"names \{qestion\}.*question, answer; did you mean \{ques"
    ):
        fill_template("{qestion}", Row({"question": "x", "answer": "y"}, 0, "here"))


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, True])
def test_template_takes_text_and_numbers_only(value):
    with pytest.raises(DataError, match="takes text or numbers"):
        fill_template("{q}", Row({"q": value}, 0, "here"))


@pytest.mark.parametrize("template", ["{", "a } b", "{}", "{{{", "{a{b}"])
def test_template_with_unmatched_braces_is_refused(template):
    with pytest.raises(ValidationError, match="for a brace"):
        PromptsConfig(path="x", template=template)


@pytest.mark.parametrize(
    "options",
    [{"template": "{q}", "columns": {"prompt": "q"}}, {"long_prompts": "drop"}],
)
def test_conflicting_options_are_refused(options):
    with pytest.raises(ValidationError, match=r"keep one|needs a limit"):
        PromptsConfig(path="x", **options)


def test_gsm8k_gives_prompts_with_their_answers(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "checkpoints" / "stories260k")
    prompts = load_prompts(
        PromptsConfig(
            path=str(shared_dir / "datasets" / "gsm8k"),
            split="test",
            template="Question: {question}\nAnswer:",
        ),
        tokenizer,
    )
    assert len(prompts) == 1319
    assert [prompt.index for prompt in prompts] == list(range(1319))
    for prompt in prompts:
        assert prompt.text == f"Question: {prompt.columns['question']}\nAnswer:"
        assert prompt.tokens[0] == tokenizer.bos_token_id
        assert "####" in prompt.columns["answer"]
