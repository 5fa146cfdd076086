"""Text to tokens and back: templates, ends of responses, and tokens of characters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from helpers.data_tokenizers import CHATML, chatml_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from trivium.data.chat import decode_response, encode, end_tokens, leading_tokens, step_ends
from trivium.data.chat_columns import checked_messages
from trivium.data.encoder import Encoder
from trivium.data.template import render
from trivium.errors import DataError, ModelError

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "how many eggs?"},
    {"role": "assistant", "content": "31 eggs"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "46 eggs"},
]
BYTES: Any = chatml_tokenizer()
THINKING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
"""Opens an assistant turn with <think>, and does not write it in a finished turn."""


@pytest.fixture(scope="module")
def stories(shared_dir):
    return AutoTokenizer.from_pretrained(shared_dir / "checkpoints" / "stories260k")


def trained_text(tokens, loss_mask):
    """Return the text of the tokens with a loss, with | at each gap."""
    parts, text = [], ""
    for token, has_loss in zip(tokens, loss_mask, strict=True):
        if has_loss:
            text += BYTES.decode([token])
        elif text:
            parts.append(text)
            text = ""
    return "|".join([*parts, text] if text else parts)


# --- ends of responses ----------------------------------------------------------------------------


def test_plain_response_continues_the_prompt_and_ends_with_one_eos():
    exchange = Encoder(BYTES).exchange("Question: eggs?\nAnswer:", " 31 eggs")
    joint = encode(BYTES, "Question: eggs?\nAnswer: 31 eggs")
    assert exchange.prompt + exchange.response == [*joint, BYTES.eos_token_id]
    assert exchange.loss_mask == [True] * len(exchange.response)
    assert not exchange.encoded_separately


@pytest.mark.parametrize("tail", ["<|endoftext|>", "<|im_end|>", "<|im_end|>\n<|endoftext|>\n"])
def test_response_with_an_end_token_gets_no_second_one(tail):
    response = Encoder(BYTES).exchange("Answer:", f" 4.\n{tail}").response
    assert BYTES.decode(response) == f" 4.\n{tail.split('>')[0]}>"


@pytest.mark.parametrize("text", [" 4<|endoftext|>5", " 4<|endoftext|><|im_start|>"])
def test_end_token_inside_a_response_does_not_end_it(text):
    response = Encoder(BYTES).exchange("Answer:", text).response
    assert BYTES.decode(response) == f"{text}<|endoftext|>"


def test_rendered_response_ends_with_the_end_of_turn_not_its_line_break():
    exchange = Encoder(BYTES).exchange(CHAT[:1], "31 eggs")
    assert BYTES.decode(exchange.prompt) == render(BYTES, CHAT[:1], open_turn=True)
    assert BYTES.decode(exchange.response) == "31 eggs<|im_end|>"


def test_response_gets_the_eos_if_the_template_has_no_end_of_turn():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    exchange = Encoder(chatml_tokenizer(template)).exchange(CHAT[:1], "31 eggs")
    assert BYTES.decode(exchange.response) == "31 eggs\n<|endoftext|>"


def test_tokenizer_without_an_eos_is_refused():
    tokenizer = chatml_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        Encoder(tokenizer).exchange("Answer:", " 4")


def test_end_tokens_come_from_tokenizer_generation_config_and_template():
    eos, start, end = (BYTES.convert_tokens_to_ids(f"<|{n}|>") for n in
                       ("endoftext", "im_start", "im_end"))  # fmt: skip
    assert end_tokens(BYTES) == {eos, end}
    assert end_tokens(chatml_tokenizer(None)) == {eos}
    one: Any = SimpleNamespace(eos_token_id=start)
    several: Any = SimpleNamespace(eos_token_id=[7, 8])
    assert end_tokens(BYTES, one) == {eos, end, start}
    assert end_tokens(BYTES, several) == {eos, end, 7, 8}


def test_special_token_of_the_next_turn_is_not_an_end_of_turn():
    template = CHATML.replace("'<|im_end|>\n'", "'\nuser: <|im_start|>'")
    assert end_tokens(chatml_tokenizer(template)) == {BYTES.eos_token_id}


# --- prompts --------------------------------------------------------------------------------------


def test_prompt_has_exactly_one_bos_even_if_its_text_contains_it(stories):
    assert leading_tokens(stories) == [stories.bos_token_id]
    assert leading_tokens(BYTES) == []
    plain = Encoder(stories).prompt("Once upon a time")
    assert plain == stories.encode("Once upon a time")
    assert Encoder(stories).prompt("<s>Once upon").count(stories.bos_token_id) == 1


def test_eos_added_by_the_tokenizer_is_not_part_of_the_prompt(stories):
    from tokenizers.processors import TemplateProcessing

    changed = AutoTokenizer.from_pretrained(stories.name_or_path)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    exchange = Encoder(changed).exchange("Once upon", " a time")
    assert exchange.prompt == [1, *encode(stories, "Once upon")]
    assert exchange.response == [
        *encode(stories, "Once upon a time")[len(exchange.prompt) - 1 :],
        2,
    ]


def test_document_is_predicted_from_its_bos_or_its_first_token(stories):
    with_bos = Encoder(stories).document("Once upon a time")
    assert with_bos.prompt == [1]
    assert with_bos.response == [*encode(stories, "Once upon a time"), 2]
    no_bos = Encoder(BYTES).document("two and two")
    assert [*no_bos.prompt, *no_bos.response] == [*encode(BYTES, "two and two"), BYTES.eos_token_id]
    assert len(no_bos.prompt) == 1


def test_text_that_would_share_a_token_with_the_prompt_is_encoded_separately(stories):
    for tokenizer in (BYTES, stories):
        encoder = Encoder(tokenizer)
        exchange = encoder.exchange("the answer is ", "the answer")
        assert exchange.encoded_separately
        assert exchange.prompt == encoder.prompt("the answer is ")
        assert decode_response(tokenizer, exchange.response) == "the answer"


def test_separately_encoded_text_gains_no_space(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories.name_or_path)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    exchange = Encoder(tokenizer).exchange("Once\n", "\nupon")
    assert exchange.encoded_separately
    assert decode_response(tokenizer, exchange.response) == "\nupon"


def test_messages_without_a_template_are_an_error_with_a_remedy():
    with pytest.raises(ModelError, match=r"no chat template.*chat_template.jinja"):
        Encoder(chatml_tokenizer(None)).prompt(CHAT[:1])


def test_error_of_the_template_is_quoted():
    raising = chatml_tokenizer("{{ raise_exception('no system role here') }}")
    with pytest.raises(DataError, match="no system role here"):
        Encoder(raising).prompt(CHAT[:1])


# --- chats of several turns -----------------------------------------------------------------------


def test_only_assistant_tokens_of_a_chat_have_a_loss():
    exchange = Encoder(BYTES).dialogue(CHAT, 1)
    assert BYTES.decode(exchange.prompt + exchange.response) == render(BYTES, CHAT).removesuffix(
        "\n"
    )
    assert BYTES.decode(exchange.prompt) == render(BYTES, CHAT[:1], open_turn=True)
    assert (
        trained_text(exchange.response, exchange.loss_mask) == "31 eggs<|im_end|>|46 eggs<|im_end|>"
    )


def test_earlier_assistant_turns_may_belong_to_the_prompt():
    exchange = Encoder(BYTES).dialogue(CHAT, 3)
    assert BYTES.decode(exchange.prompt) == render(BYTES, CHAT[:3], open_turn=True)
    assert trained_text(exchange.response, exchange.loss_mask) == "46 eggs<|im_end|>"


def test_turns_without_an_end_token_are_separated_by_rendering():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    exchange = Encoder(chatml_tokenizer(template)).dialogue(CHAT, 1)
    assert trained_text(exchange.response, exchange.loss_mask) == "31 eggs\n|46 eggs\n<|endoftext|>"


def test_second_end_token_after_a_turn_is_left_out():
    closing = "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
    exchange = Encoder(chatml_tokenizer(CHATML + closing)).dialogue(CHAT, 1)
    assert (
        trained_text(exchange.response, exchange.loss_mask) == "31 eggs<|im_end|>|46 eggs<|im_end|>"
    )


def test_template_that_changes_the_prompt_is_an_error_with_both_texts():
    counting = "{{ messages | length }} messages\n" + CHATML
    with pytest.raises(DataError, match=r"(?s)before message 2 .*1 messages.*4 messages"):
        Encoder(chatml_tokenizer(counting)).dialogue(CHAT, 1)


def test_template_that_does_not_write_what_it_opens_a_turn_with_names_a_completion_in_plain_text():
    with pytest.raises(DataError, match=r"'<think>', which .* message 2.* `completion` in plain"):
        Encoder(chatml_tokenizer(THINKING)).dialogue(CHAT, 1)


@pytest.mark.parametrize("text", ["<think>hm</think>31", "hm</think>31"])
def test_text_follows_the_turn_that_the_template_opens(text):
    exchange = Encoder(chatml_tokenizer(THINKING)).exchange(CHAT[:1], text)
    assert BYTES.decode(exchange.prompt) == render(chatml_tokenizer(THINKING), CHAT[:1], True)
    assert BYTES.decode(exchange.response) == "hm</think>31<|im_end|>"
    assert exchange.loss_mask == [True] * len(exchange.response)


def test_response_that_begins_with_a_line_break_keeps_the_prompt_tokens():
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens(["\n\n"])
    encoder = Encoder(tokenizer)
    exchange = encoder.exchange(CHAT[:1], "\n\n31 eggs")
    assert exchange.encoded_separately
    assert exchange.prompt == encoder.prompt(CHAT[:1])
    assert decode_response(tokenizer, exchange.response) == "\n\n31 eggs"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("text", "not messages"),
        ([], "not messages"),
        ([3], "message 1 of `m` is 3"),
        ([{"from": "user", "value": "x"}], r"has no `role`; it has from, value"),
        ([{"role": "user", "content": None}], "has no `content`"),
        ([{"role": "user", "content": [{"type": "image"}]}], "`content` of message 1 of `m`"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_invalid_messages_are_refused_with_their_label(value, reason):
    with pytest.raises(DataError, match=reason):
        checked_messages(value, "`m`")


def test_null_entries_of_messages_are_removed_and_tool_calls_need_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    assert checked_messages([call], "m") == [{"role": "assistant", "tool_calls": [{"name": "add"}]}]


# --- characters and tokens ------------------------------------------------------------------------


def ends_by_definition(tokenizer, tokens, char_ends):
    """Return the index at which the decoded tokens first contain the characters, without caches."""
    text = decode_response(tokenizer, tokens)
    return [
        next(i for i in range(len(tokens))
             if decode_response(tokenizer, tokens[: i + 1])[:end] == text[:end])
        for end in char_ends
    ]  # fmt: skip


def test_response_keeps_its_leading_space(stories):
    tokens = encode(stories, "Once upon a time")
    assert decode_response(stories, tokens[2:]) == stories.decode(tokens)[len("Once upon") :]
    assert decode_response(stories, [*tokens[2:], 2]).startswith(" ")


def test_step_ends_are_the_tokens_of_the_last_characters():
    text = "31+9=40.\n40+6=46."
    tokens = [*encode(BYTES, text), BYTES.eos_token_id]
    (first, last) = step_ends(BYTES, tokens, [8, len(text)])
    assert BYTES.decode(tokens[: first + 1]).startswith("31+9=40.")
    assert not BYTES.decode(tokens[:first]).startswith("31+9=40.")
    assert last == len(tokens) - 2


def test_character_of_several_tokens_ends_at_its_last_token():
    tokens = encode(BYTES, "é✓x")
    assert [len(encode(BYTES, c)) for c in "é✓x"] == [2, 3, 1]
    assert step_ends(BYTES, tokens, [1, 2, 3]) == [1, 4, 5]


def test_character_of_byte_fallback_tokens_ends_at_its_last_byte(stories):
    tokens = encode(stories, "a ✓ test")[1:]
    text = decode_response(stories, tokens)
    end = text.index("✓") + 1
    assert stories.convert_ids_to_tokens(tokens)[step_ends(stories, tokens, [end])[0]] == "<0x93>"


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("aé✓ \n.4🙂"), min_size=1, max_size=12), st.data())
def test_step_ends_agree_with_their_definition(text, data):
    tokens = encode(BYTES, text)
    ends = data.draw(st.lists(st.integers(1, len(text)), min_size=1, max_size=4))
    assert step_ends(BYTES, tokens, ends) == ends_by_definition(BYTES, tokens, ends)


def test_step_ends_of_a_sentencepiece_tokenizer_agree_with_their_definition(stories):
    for text in (" Lily has 31 eggs.\nShe finds 9.", "  two  spaces é and ✓."):
        tokens = encode(stories, f"a{text}")[1:]
        ends = list(range(1, len(decode_response(stories, tokens)) + 1))
        assert step_ends(stories, tokens, ends) == ends_by_definition(stories, tokens, ends)


def test_step_ends_of_plain_characters_need_one_decode_call(stories, monkeypatch):
    tokens = encode(stories, "a Lily has 31 eggs.\nShe finds 9.")[1:]
    step_ends(stories, tokens, [1])
    calls = []
    decode = stories.decode
    monkeypatch.setattr(stories, "decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    step_ends(stories, tokens, range(1, 20))
    assert len(calls) == 1


@pytest.mark.parametrize("end", [0, 4, -1])
def test_step_end_outside_the_text_is_refused(end):
    with pytest.raises(ValueError, match="of a text of 3"):
        step_ends(BYTES, encode(BYTES, "4.\n"), [end])
