"""Demonstrations for supervised fine-tuning, and functions for responses shared by the loaders.

A demonstration is a prompt with a response, or a chat of several turns with a loss on the assistant
turns, or a text without a prompt. The loss mask is computed here, so that trainers do not depend on
chat templates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trivium.config.base import Conflict
from trivium.data.chat_columns import checked_messages
from trivium.data.encoder import Encoder, Exchange, Reply, reply_text
from trivium.data.group import Group
from trivium.data.messages import checked_text
from trivium.data.prompt_forms import (
    CONTEXT_COLUMNS,
    TextConfig,
    alpaca_prompt,
    explicit_prompt,
    is_alpaca,
    prompt_form,
    tools_of,
    with_system,
)
from trivium.data.prompts import check_prompt
from trivium.data.rows import DropRow, LoadReport, Notes, Row, collect
from trivium.data.template import Messages, Tools
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENCODED_SEPARATELY = (
    "prompt and response would share a token, so they were encoded separately (move spaces from "
    "the prompt's end to the response's beginning)"
)


class ResponsesConfig(TextConfig):
    """Limits on the responses in the data."""

    max_response_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens of a response, including its EOS."""
    long_responses: Literal["error", "drop", "truncate"] = "error"
    """Treatment of a longer response: raise an error, drop its row, or truncate it without EOS."""

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.long_responses != "error" and self.max_response_tokens is None:
            yield "long_responses", "`long_responses` needs a limit; set `max_response_tokens`"


class DemonstrationsConfig(ResponsesConfig):
    """Demonstrations for supervised fine-tuning."""

    known_columns: ClassVar = CONTEXT_COLUMNS | {
        *("prompt", "completion", "messages", "text", "conversations"),
        *("instruction", "input", "output", "label"),
    }


@dataclass(frozen=True)
class Demonstration:
    """A prompt and one response, with a loss mask over the response tokens."""

    group: Group
    loss_mask: list[bool]


@dataclass(frozen=True)
class ParsedDemonstration:
    """The prompt and reply of a row, not yet tokenized; a text without a prompt has None."""

    prompt: str | Messages | None
    reply: Reply
    tools: Tools | None = None


def load_demonstrations(
    config: DemonstrationsConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None = None,
) -> list[Demonstration]:
    """Return the demonstrations in the order of the rows; see `read_demonstrations`."""
    return read_demonstrations(config, tokenizer, context_length)[0]


def read_demonstrations(
    config: DemonstrationsConfig,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None = None,
) -> tuple[list[Demonstration], LoadReport]:
    """Return the demonstrations and the report of rows kept and dropped.

    A row has a prompt (`prompt` or `template`) with a `completion`, or a chat in `messages`, or a
    `text` without a prompt; the first of these that is present is used. A row that KTO labels
    false is dropped. Raises DataError for a row without any of them, or one that exceeds the
    model's context.
    """
    encoder = Encoder(tokenizer, config.template_arguments)

    def convert(row: Row, notes: Notes) -> Demonstration:
        parsed = parse_demonstration(row, config, notes)
        if parsed.prompt is None:
            exchange = encoder.document(reply_text(parsed.reply))
        else:
            exchange = encode_exchange(encoder, parsed.prompt, parsed.reply, notes, parsed.tools)
            encoder.tell_of_chat(parsed.prompt)
        check_prompt(exchange.prompt, config)
        response = limit_response(exchange.response, config, notes)
        check_context(len(exchange.prompt) + len(response), context_length)
        loss_mask = exchange.loss_mask[: len(response)]
        if not any(loss_mask):
            raise DropRow("no token to train on within `max_response_tokens`")
        return Demonstration(Group(exchange.prompt, [response]), loss_mask)

    return collect(config, convert, dedup_key=lambda item: group_key(item.group))


def parse_demonstration(
    row: Row, config: DemonstrationsConfig, notes: Notes
) -> ParsedDemonstration:
    """Return the row's prompt and reply, with every check that needs no tokenizer."""
    parsed = _parse(row, config, notes)
    _drop_if_rejected(row, config)
    drop_if_empty(parsed.reply)
    tools = tools_of(row, parsed.prompt, config, notes)
    form = "text without a prompt" if parsed.prompt is None else prompt_form(parsed.prompt)
    notes.forms[form] += 1
    return replace(parsed, tools=tools)


def _drop_if_rejected(row: Row, config: DemonstrationsConfig) -> None:
    """Raise DropRow for a row of KTO's whose label says that its response is not desired."""
    label = row.columns.get("label")
    if not row.has("completion") or "label" in config.template_columns:
        return
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):
        raise DropRow("labeled false, as in KTO's data: its response is not a demonstration")


def _parse(row: Row, config: DemonstrationsConfig, notes: Notes) -> ParsedDemonstration:
    if config.template is not None or row.has("completion"):
        prompt = explicit_prompt(row, config)
        reply = parse_reply(row.column("completion"), "column `completion`")
        if isinstance(prompt, str) and not isinstance(reply, str):
            raise DataError(
                "`completion` is messages and the prompt is plain text; set `chat: true` to make "
                "it a user's message"
            )
        return ParsedDemonstration(prompt, reply)
    if row.has("messages"):
        return _parse_chat(row, config, notes)
    if is_alpaca(row):
        return ParsedDemonstration(alpaca_prompt(row, config), row.text("output"))
    if row.has("text"):
        if config.chat or config.system is not None:
            raise DataError("column `text` is not a chat; remove `chat` and `system`")
        return ParsedDemonstration(None, row.text("text"))
    raise DataError(
        f"no demonstration: the columns are {row.names()}, and a demonstration needs `prompt` and "
        f"`completion`, or `messages`, or `text`; name them, as in `columns: {_mapping(row)}`"
    )


def _mapping(row: Row) -> str:
    """Return an example of names of columns; of a pair, its chosen response is learned."""
    if not row.has("chosen"):
        return "{prompt: question, completion: answer}"
    if row.has("prompt"):
        return "{completion: chosen}"
    return f"{{{'text' if isinstance(row.columns['chosen'], str) else 'messages'}: chosen}}"


def _parse_chat(row: Row, config: DemonstrationsConfig, notes: Notes) -> ParsedDemonstration:
    messages = checked_messages(row.column("messages"), "column `messages`")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[0] == 0:
        raise DataError(
            "column `messages` has no assistant turn after another turn; a demonstration needs one"
        )
    if turns[-1] + 1 < len(messages):
        notes["turns after the last assistant turn are left out"] += 1
    messages = with_system(messages[: turns[-1] + 1], config, row)
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return ParsedDemonstration(messages[:first], messages[first:])


# --- responses ------------------------------------------------------------------------------------


def parse_reply(value: Any, label: str) -> Reply:
    """Return a response's text or messages.

    Raises DataError, which calls the value `label`, unless it is text, or messages that begin and
    end with an assistant turn.
    """
    if isinstance(value, str):
        return checked_text(value, label)
    messages = checked_messages(value, label)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{label} begins with a message of {messages[0]['role']!r} and ends with one of "
            f"{messages[-1]['role']!r}; a response begins and ends with the assistant"
        )
    return messages


def encode_exchange(
    encoder: Encoder,
    prompt: str | Messages,
    reply: Reply,
    notes: Notes,
    tools: Tools | None = None,
) -> Exchange:
    """Return the tokens of prompt and response; note how they differ from the row."""
    exchange = encoder.exchange(prompt, reply, tools)
    notes.update([_ENCODED_SEPARATELY] if exchange.encoded_separately else [])
    for remark in exchange.remarks:
        notes.remark(remark)
    return exchange


def drop_if_empty(reply: Reply) -> None:
    """Raise DropRow if the response is empty; a response of tool calls is not empty."""
    if (isinstance(reply, str) or "tool_calls" not in reply[-1]) and not reply_text(reply).strip():
        raise DropRow("empty response")


def group_key(group: Group) -> tuple[tuple[int, ...], ...]:
    """Return prompt and responses as a hashable value that identifies duplicate rows."""
    return (tuple(group.prompt), *map(tuple, group.responses))


def check_context(length: int, context_length: int | None) -> None:
    """Raise DataError if a prompt with its response exceeds the model's context."""
    if context_length is not None and length > context_length:
        raise DataError(
            f"prompt and response have {length} tokens, and the model's context holds "
            f"{context_length}; set `max_prompt_tokens` with `long_prompts: drop`, or "
            "`max_response_tokens` with `long_responses: drop` or `truncate`"
        )


def limit_response(response: list[int], config: ResponsesConfig, notes: Notes) -> list[int]:
    """Apply `max_response_tokens`: return the response, whole or truncated.

    Raises DropRow or DataError for a longer response if `long_responses` says so.
    """
    limit = config.max_response_tokens
    if limit is None or len(response) <= limit:
        return response
    if config.long_responses == "drop":
        raise DropRow(f"response longer than {limit} tokens")
    if config.long_responses == "truncate":
        notes[f"response truncated at {limit} tokens"] += 1
        return response[:limit]
    raise DataError(
        f"a response has {len(response)} tokens and `max_response_tokens` is {limit}; raise the "
        "limit, or set `long_responses` to drop or truncate"
    )
