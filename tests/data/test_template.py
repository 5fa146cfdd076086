"""Chat templates: their arguments, their clock, and what they leave out."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from helpers.data_tokenizers import CHATML, chatml_tokenizer
from pydantic import ValidationError
from transformers.utils import chat_template_utils

from trivium.data import encoder
from trivium.data.demonstrations import DemonstrationsConfig, load_demonstrations
from trivium.data.encoder import Encoder
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    load_preferences,
    load_step_labels,
)
from trivium.data.prompt_forms import with_arguments_of
from trivium.data.prompts import PromptsConfig, load_prompts
from trivium.data.template import omissions, render, set_template_time, template_time
from trivium.errors import ConfigurationError

ASK = {"role": "user", "content": "how many eggs?"}
THINKING: Any = chatml_tokenizer("{% if enable_thinking %}THINK {% endif %}" + CHATML)
CLOCK: Any = chatml_tokenizer("{{ strftime_now('%d %b %Y %H:%M:%S %z') }}\n" + CHATML)
ROW = {"prompt": [ASK], "completion": "31", "chosen": "31", "rejected": "30"}
STEPS = {"prompt": [ASK], "completions": ["31"], "labels": [1]}
LOADERS = {
    "prompts": (PromptsConfig, load_prompts, ROW),
    "demonstrations": (DemonstrationsConfig, load_demonstrations, ROW),
    "preferences": (PreferencesConfig, load_preferences, ROW),
    "steps": (StepLabelsConfig, load_step_labels, STEPS),
}


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOADERS)
def test_template_arguments_reach_the_template_in_every_loader(tmp_path, name):
    config, load, row = LOADERS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for arguments, begins in (({"enable_thinking": True}, True), (None, False)):
        (item,) = load(config(path=str(path), template_arguments=arguments), THINKING)
        tokens = item.tokens if name == "prompts" else item.group.prompt
        assert THINKING.decode(tokens).startswith("THINK ") == begins


def test_argument_that_the_template_does_not_read_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigurationError, match=r"enable_thinkin, .*did you mean enable_thinking"):
        Encoder(THINKING, {"enable_thinkin": False})
    with pytest.raises(ConfigurationError, match=r"enable_thinking, .* is missing"):
        Encoder(chatml_tokenizer(None), {"enable_thinking": False})


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize", "a b"])
def test_argument_that_is_no_variable_of_a_template_is_refused(name):
    with pytest.raises(ValidationError, match=f"`{name}` is not a variable that can be set"):
        PromptsConfig(path="rows.jsonl", template_arguments={name: True})


def test_held_out_data_has_the_arguments_of_the_training_data_unless_it_has_its_own():
    training = PromptsConfig(path="a", template_arguments={"enable_thinking": False})
    held_out = PromptsConfig(path="b")
    own = PromptsConfig(path="b", template_arguments={})
    assert with_arguments_of(held_out, training).template_arguments == {"enable_thinking": False}
    assert with_arguments_of(held_out, training).path == "b"
    assert with_arguments_of(own, training).template_arguments == {}
    assert with_arguments_of(held_out, None) is held_out


# --- the clock ------------------------------------------------------------------------------------


@pytest.fixture
def _clock():
    yield
    set_template_time(None)


@pytest.mark.usefixtures("_clock")
def test_template_sees_the_time_that_is_set_with_its_offset():
    set_template_time(datetime(2024, 2, 29, 23, 59, 58, tzinfo=timezone(timedelta(hours=2))))
    for _ in range(2):
        assert render(CLOCK, [ASK]).startswith("29 Feb 2024 23:59:58 +0200\n")
    assert chat_template_utils.datetime is datetime


@pytest.mark.usefixtures("_clock")
def test_time_stands_still_from_the_first_rendering_on():
    set_template_time(None)
    before = datetime.now(UTC).replace(microsecond=0)
    first = template_time()
    assert before <= first <= datetime.now(UTC)
    assert template_time() is first


@pytest.mark.usefixtures("_clock")
def test_time_is_told_once_where_a_template_writes_it(caplog):
    caplog.set_level(logging.INFO)
    set_template_time(datetime(2024, 2, 29, tzinfo=UTC))
    for tokenizer in (THINKING, CLOCK, CLOCK):
        render(tokenizer, [ASK])
    told = [r.getMessage() for r in caplog.records if "writes the time" in r.getMessage()]
    assert told == [
        "the chat template writes the time: every chat of a run has 2024-02-29 00:00:00+00:00"
    ]


# --- what a template leaves out -------------------------------------------------------------------


def says(content: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extra}


CALL = {"function": {"name": "add", "arguments": {"unit": 'a "b" é', "n": 3}}}
CHATS: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    "all": ([ASK, says("31 ")], "U how many eggs? A 31", []),
    "trimmed": ([ASK, says("\n 31\n")], "U how many eggs? A 31", []),
    "empty": ([ASK, says("")], "U how many eggs? A ", []),
    "a message": ([ASK, says("31")], "U how many eggs? A 30", ["the text of assistant messages"]),
    "an earlier message": ([ASK, says("31"), ASK], "A 31 U how many eggs?",
                           ["the text of assistant messages", "the text of user messages"]),
    "a moved system message": ([{"role": "system", "content": "Brief"}, ASK],
                               "U how many eggs? S Brief", []),
    "white space of thoughts": ([ASK, says("<think>so</think>31")],
                                "U how many eggs? A <think>\nso\n</think>\n\n31", []),
    "thoughts": ([ASK, says("<think>so</think>31")], "U how many eggs? A 31",
                 ["the thoughts of assistant messages, up to </think>"]),
    "reasoning": ([ASK, says("31", reasoning="31")], "U how many eggs? A 31",
                  ["the reasoning of assistant messages"]),
    "reasoning before the text": ([ASK, says("31", reasoning="31")], "how many eggs? 31 31", []),
    "reasoning behind the text": ([ASK, says("31", reasoning="so")], "how many eggs? 31 so",
                                  ["the reasoning of assistant messages"]),
    "a call": ([ASK, says("", tool_calls=[CALL])],
               r'how many eggs? add {"unit": "a \"b\" é"}', []),
    "an escaped call": ([ASK, says("", tool_calls=[CALL])],
                        r'how many eggs? add {"unit": "a \"b\" \u00e9"}', []),
    "a call in plain text": ([ASK, says("", tool_calls=[CALL])],
                             'how many eggs? <add><unit>a "b" é</unit>', []),
    "no call": ([ASK, says("31", tool_calls=[CALL])], "how many eggs? 31",
                ["tool calls of assistant messages"]),
    "a call without its argument": ([ASK, says("", tool_calls=[CALL])], "how many eggs? add",
                                    ["tool calls of assistant messages"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_omissions_are_the_parts_of_messages_that_the_text_does_not_contain(name):
    messages, text, expected = CHATS[name]
    assert omissions(messages, text) == expected


# --- plain prompts of a model with a template -----------------------------------------------------


@pytest.fixture
def _nothing_told(monkeypatch):
    monkeypatch.setattr(encoder, "_TOLD", set())


def told_of_chat(caplog, path, prompts: list[Any], **settings: Any) -> int:
    """Load the prompts with two equal tokenizers, and count the messages about `chat`."""
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    caplog.clear()
    template = settings.pop("template", CHATML)
    for _ in range(2):
        load_prompts(PromptsConfig(path=str(path), **settings), chatml_tokenizer(template))
    return sum("set `chat: true`" in record.getMessage() for record in caplog.records)


@pytest.mark.usefixtures("_nothing_told")
def test_plain_prompts_of_a_model_with_a_template_are_told_of_chat_once(caplog, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert told_of_chat(caplog, path, ["how many?", "how far?"]) == 1
    assert told_of_chat(caplog, path, ["how many?"], chat=True) == 0
    assert told_of_chat(caplog, path, [[ASK]]) == 0
    assert told_of_chat(caplog, path, ["how many?"], template=None) == 0


@pytest.mark.usefixtures("_nothing_told")
def test_plain_prompts_in_the_form_of_the_template_are_not_told_of_chat(caplog, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert told_of_chat(caplog, path, ["<|im_start|>user\nhow many?<|im_end|>\n"]) == 0
    inst = "{% for m in messages %}{{ '[U]' + m.content }}{% endfor %}"
    inst += "{% if add_generation_prompt %}[A]{% endif %}"
    assert told_of_chat(caplog, path, ["[U]how many?[A]"], template=inst) == 0
    assert told_of_chat(caplog, path, ["how many?"], template=inst) == 1
