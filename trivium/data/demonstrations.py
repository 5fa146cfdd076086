"""Demonstrations for supervised fine-tuning, and what every loader shares about responses.

A demonstration is a prompt and the response to imitate, or a chat of several turns of which only
the assistant's are imitated, or a bare text. Which tokens those are is decided here, once, so that
no trainer needs to know about templates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trivium.config.base import Conflict
from trivium.data.chat import Encoder, Exchange, Messages, Reply, checked_messages, reply_text
from trivium.data.group import Group
from trivium.data.prompts import (
    TextConfig,
    check_prompt,
    explicit_prompt,
    form_of,
    with_system,
)
from trivium.data.rows import Dropped, LoadReport, Notes, Row, checked_text, collect
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STRADDLED = (
    "prompt and response would share a token, and were encoded apart (move spaces from the "
    "prompt's end to the response's beginning)"
)


class ResponsesConfig(TextConfig):
    """How long the data's responses may be."""

    max_response_tokens: int | None = Field(default=None, ge=1)
    """The longest response that is used whole, its EOS included."""
    long_responses: Literal["error", "drop", "truncate"] = "error"
    """What becomes of a longer one: an error, its row dropped, or cut off there without an EOS."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.long_responses != "error" and self.max_response_tokens is None:
            yield "long_responses", "`long_responses` needs a limit; set `max_response_tokens`"


class DemonstrationsConfig(ResponsesConfig):
    """The demonstrations of supervised fine-tuning."""

    known_columns: ClassVar = frozenset({"prompt", "completion", "messages", "text"})


@dataclass(frozen=True)
class Demonstration:
    """A prompt and one response, and for each response token whether it is to be learned."""

    group: Group
    trained: list[bool]


@dataclass(frozen=True)
class Written:
    """What a row says, before it is tokens; without a prompt, a text that is learned whole."""

    prompt: str | Messages | None
    reply: Reply


def load_demonstrations(
    config: DemonstrationsConfig, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> list[Demonstration]:
    """Return the demonstrations of the rows, in order; see `read_demonstrations`."""
    return read_demonstrations(config, tokenizer, context)[0]


def read_demonstrations(
    config: DemonstrationsConfig, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> tuple[list[Demonstration], LoadReport]:
    """Return the demonstrations and the count of rows used.

    A row is a prompt (`prompt` or `template`) with a `completion`, a chat in `messages`, or a bare
    `text`, the first of these that it has. Raises DataError for rows that are none, or longer than
    the model's context.
    """
    encoder = Encoder(tokenizer)

    def convert(row: Row, notes: Notes) -> Demonstration:
        written = written_demonstration(row, config, notes)
        if written.prompt is None:
            exchange = encoder.passage(reply_text(written.reply))
        else:
            exchange = exchanged(encoder, written.prompt, written.reply, notes)
        check_prompt(exchange.prompt, config)
        response = fitted(exchange.response, config, notes)
        check_context(len(exchange.prompt) + len(response), context)
        trained = exchange.trained[: len(response)]
        if not any(trained):
            raise Dropped("nothing to learn within `max_response_tokens`")
        return Demonstration(Group(exchange.prompt, [response]), trained)

    return collect(config, convert, same=lambda one: texts_of(one.group))


def written_demonstration(row: Row, config: DemonstrationsConfig, notes: Notes) -> Written:
    """Return what the row says, checked as far as that needs no tokenizer."""
    written = _written(row, config, notes)
    require_reply(written.reply)
    form = "text without a prompt" if written.prompt is None else form_of(written.prompt)
    notes.forms[form] += 1
    return written


def _written(row: Row, config: DemonstrationsConfig, notes: Notes) -> Written:
    if config.template is not None or row.has("completion"):
        prompt = explicit_prompt(row, config)
        reply = reply_of(row.column("completion"), "column `completion`")
        if isinstance(prompt, str) and not isinstance(reply, str):
            raise DataError(
                "`completion` is messages and the prompt is plain text; set `chat: true` to make "
                "it a user's message"
            )
        return Written(prompt, reply)
    if row.has("messages"):
        return _chat(row, config, notes)
    if row.has("text"):
        if config.chat or config.system is not None:
            raise DataError("column `text` is no chat; remove `chat` and `system`")
        return Written(None, row.text("text"))
    raise DataError(
        f"no demonstration: the columns are {row.names()}, and it takes `prompt` and `completion`, "
        "or `messages`, or `text`; name them, as in `columns: {prompt: question, completion: "
        "answer}`"
    )


def _chat(row: Row, config: DemonstrationsConfig, notes: Notes) -> Written:
    messages = checked_messages(row.column("messages"), "column `messages`")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise DataError(
            "column `messages` has no assistant's turn that answers another's; a demonstration "
            "needs one"
        )
    if turns[-1] + 1 < len(messages):
        notes["turns after the assistant's last are left out"] += 1
    messages = with_system(messages[: turns[-1] + 1], config)
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return Written(messages[:first], messages[first:])


# --- responses ------------------------------------------------------------------------------------


def reply_of(value: Any, what: str) -> Reply:
    """Return a response's text, or its messages, which must begin and end with the assistant's."""
    if isinstance(value, str):
        return checked_text(value, what)
    messages = checked_messages(value, what)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{what} runs from a message of {messages[0]['role']!r} to one of "
            f"{messages[-1]['role']!r}; a response begins and ends with the assistant's"
        )
    return messages


def exchanged(encoder: Encoder, prompt: str | Messages, reply: Reply, notes: Notes) -> Exchange:
    """Return the tokens of prompt and response."""
    exchange = encoder.exchange(prompt, reply)
    notes.update([_STRADDLED] if exchange.straddled else [])
    return exchange


def require_reply(reply: Reply) -> None:
    """Drop the row of an empty response; one that only calls tools is not empty."""
    if (isinstance(reply, str) or "tool_calls" not in reply[-1]) and not reply_text(reply).strip():
        raise Dropped("empty response")


def texts_of(group: Group) -> tuple[tuple[int, ...], ...]:
    """Prompt and responses in a form by which equal rows are found."""
    return (tuple(group.prompt), *map(tuple, group.responses))


def check_context(length: int, context: int | None) -> None:
    """Refuse a prompt with its response that the model cannot read at once."""
    if context is not None and length > context:
        raise DataError(
            f"prompt and response have {length} tokens, and the model's context holds {context}; "
            "set `max_prompt_tokens` with `long_prompts: drop`, or `max_response_tokens` with "
            "`long_responses: drop` or `truncate`"
        )


def fitted(response: list[int], config: ResponsesConfig, notes: Notes) -> list[int]:
    """Return the response within the limit, or refuse it, as the configuration says."""
    limit = config.max_response_tokens
    if limit is None or len(response) <= limit:
        return response
    if config.long_responses == "drop":
        raise Dropped(f"response longer than {limit} tokens")
    if config.long_responses == "truncate":
        notes[f"response cut at {limit} tokens"] += 1
        return response[:limit]
    raise DataError(
        f"a response has {len(response)} tokens and `max_response_tokens` is {limit}; raise it, or "
        "set `long_responses` to drop or truncate"
    )
