"""Demonstrations for supervised fine-tuning, and what every loader shares about responses.

A demonstration is a prompt and the response to imitate, or a chat of several turns of which only
the assistant's are imitated, or a bare text. Which tokens those are is decided here, once, so that
no trainer needs to know about templates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from trivium.config import Contradiction
from trivium.data.chat import Encoder, Exchange, Reply, checked_messages, reply_text
from trivium.data.group import Group
from trivium.data.prompts import TextConfig, check_prompt, explicit_prompt, with_system
from trivium.data.rows import Dropped, LoadReport, Row, checked_text, collect
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

    def contradictions(self) -> Iterator[Contradiction]:
        yield from super().contradictions()
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


def load_demonstrations(
    config: DemonstrationsConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Demonstration]:
    """Return the demonstrations of the rows, in order; see `read_demonstrations`."""
    return read_demonstrations(config, tokenizer)[0]


def read_demonstrations(
    config: DemonstrationsConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Demonstration], LoadReport]:
    """Return the demonstrations and the count of rows used.

    A row is a prompt (`prompt` or `template`) with a `completion`, a chat in `messages`, or a bare
    `text`, the first of these that it has. Raises DataError for rows that are none.
    """
    encoder = Encoder(tokenizer)

    def convert(row: Row, notes: Counter[str]) -> Demonstration:
        exchange = _exchange(row, config, encoder, notes)
        check_prompt(exchange.prompt, config)
        response = fitted(exchange.response, config, notes)
        trained = exchange.trained[: len(response)]
        if not any(trained):
            raise Dropped("nothing to learn within `max_response_tokens`")
        return Demonstration(Group(exchange.prompt, [response]), trained)

    return collect(config, convert)


def _exchange(
    row: Row, config: DemonstrationsConfig, encoder: Encoder, notes: Counter[str]
) -> Exchange:
    if config.template is not None or row.has("completion"):
        prompt = explicit_prompt(row, config)
        reply = reply_of(row.column("completion"), "column `completion`")
        if isinstance(prompt, str) and not isinstance(reply, str):
            raise DataError(
                "`completion` is messages and the prompt is plain text; set `chat: true` to make "
                "it a user's message"
            )
        return exchanged(encoder, prompt, reply, notes)
    if row.has("messages"):
        return _chat(row, config, encoder, notes)
    if row.has("text"):
        if config.chat or config.system is not None:
            raise DataError("column `text` is no chat; remove `chat` and `system`")
        return encoder.passage(nonempty(row.text("text")))
    raise DataError(
        f"no demonstration: the columns are {row.names()}, and it takes `prompt` and `completion`, "
        "or `messages`, or `text`; name them, as in `columns: {prompt: question, completion: "
        "answer}`"
    )


def _chat(
    row: Row, config: DemonstrationsConfig, encoder: Encoder, notes: Counter[str]
) -> Exchange:
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
    return exchanged(encoder, messages[:first], messages[first:], notes)


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


def exchanged(
    encoder: Encoder, prompt: str | list[dict[str, Any]], reply: Reply, notes: Counter[str]
) -> Exchange:
    """Return the tokens of prompt and response; an empty response drops the row."""
    if isinstance(reply, str) or "tool_calls" not in reply[-1]:
        nonempty(reply_text(reply))
    exchange = encoder.exchange(prompt, reply)
    notes.update([_STRADDLED] if exchange.straddled else [])
    return exchange


def nonempty(text: str) -> str:
    """Return the text, or drop its row when there is nothing in it but space."""
    if not text.strip():
        raise Dropped("empty response")
    return text


def fitted(response: list[int], config: ResponsesConfig, notes: Counter[str]) -> list[int]:
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
