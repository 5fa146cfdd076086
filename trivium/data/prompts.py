"""Prompts for rollouts, and functions for prompts shared by the loaders.

A prompt is plain text, used verbatim, or a chat that the tokenizer's template renders up to the
assistant turn. It is read from a column, written by a template from several columns, or is the
common part of a chosen and a rejected dialogue. Responses are in the other modules of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from trivium.config.base import Conflict
from trivium.data.chat import Encoder, Messages, Reply, checked_messages, common_prefix_length
from trivium.data.messages import nearest, shortened
from trivium.data.rows import DropRow, LoadReport, Notes, Row, RowsConfig, checked_text, collect
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT_MARK = "\n\nAssistant:"

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class TextConfig(RowsConfig):
    """Form and limits of the prompts in the data."""

    template: str | None = None
    """The prompt written from columns, as in "Question: {question}\\nAnswer:"; {{ is a brace."""
    chat: bool = False
    """Whether a plain-text prompt becomes the user message of a chat."""
    system: str | None = None
    """System message of chats that do not begin with a system message."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens of a prompt."""
    long_prompts: Literal["error", "drop"] = "error"
    """Treatment of a row with a longer prompt: raise an error, or drop and count the row."""

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        for match in _FIELD.finditer(template or ""):
            if match[0] in "{}" or match[1] == "":
                raise ValueError(
                    f"`{match[0]}` at character {match.start()} names no column; write {{name}} "
                    "for a column, {{ or }} for a brace"
                )
        return template

    def uses_column(self, column: str) -> bool:
        in_template = [match[1] for match in _FIELD.finditer(self.template or "")]
        return column in in_template or super().uses_column(column)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.template is not None and "prompt" in self.columns:
            yield "template", "`template` and `columns.prompt` both give the prompt; keep one"
        if self.long_prompts != "error" and self.max_prompt_tokens is None:
            yield "long_prompts", "`long_prompts` needs a limit; set `max_prompt_tokens`"


class PromptsConfig(TextConfig):
    """Prompts for rollouts."""

    assistant_mark: str = Field(default=ASSISTANT_MARK, min_length=1)
    """Text before an assistant turn in plain-text dialogues that contain prompt and response."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, its text or messages, the row's other columns and its number."""

    tokens: list[int]
    text: str | Messages
    columns: dict[str, Any]
    index: int


def load_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int | None = None
) -> list[Prompt]:
    """Return the prompts in the order of the rows; see `read_prompts`."""
    return read_prompts(config, tokenizer, max_prompt_length)[0]


def read_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int | None = None
) -> tuple[list[Prompt], LoadReport]:
    """Return the prompts and the report of rows kept and dropped.

    The prompt of a row comes from `template`, `prompt`, `messages` (without assistant turns at the
    end), or the common part of `chosen` and `rejected`. `max_prompt_length` is the number of tokens
    that the response leaves of the model's context. Raises DataError for a row without a prompt,
    or with a longer one.
    """
    encoder = Encoder(tokenizer)

    def convert(row: Row, notes: Notes) -> Prompt:
        text = parse_prompt(row, config, notes, encoder)
        tokens = encoder.prompt(text)
        check_prompt(tokens, config)
        if max_prompt_length is not None and len(tokens) > max_prompt_length:
            raise DataError(
                f"the prompt has {len(tokens)} tokens, and the response leaves room for "
                f"{max(max_prompt_length, 0)} in the model's context; lower the response's "
                "`max_tokens`, or set `max_prompt_tokens` and `long_prompts: drop`"
            )
        columns = {name: value for name, value in row.columns.items() if name != "prompt"}
        return Prompt(tokens, text, columns, row.index)

    return collect(config, convert, dedup_key=lambda prompt: tuple(prompt.tokens))


def parse_prompt(
    row: Row, config: PromptsConfig, notes: Notes, encoder: Encoder | None = None
) -> str | Messages:
    """Return the row's prompt, with every check that needs no tokenizer.

    Without an encoder, the common prompt of two plain texts may be a few words too long.
    """
    text = _find_prompt(row, config, notes, encoder)
    notes.forms[prompt_form(text)] += 1
    return text


def prompt_form(prompt: str | Messages) -> str:
    """Return a name of the prompt's form; the load report notes files with several forms."""
    return "plain text" if isinstance(prompt, str) else "a chat"


def _find_prompt(
    row: Row, config: PromptsConfig, notes: Notes, encoder: Encoder | None
) -> str | Messages:
    if config.template is None and not row.has("prompt"):
        if row.has("messages"):
            messages = checked_messages(row.column("messages"), "column `messages`")
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return as_prompt(messages, config, "column `messages`")
        if row.has("chosen") and row.has("rejected"):
            return split_dialogues(row, config, config.assistant_mark, notes, encoder)[0]
    return explicit_prompt(row, config)


def explicit_prompt(row: Row, config: TextConfig) -> str | Messages:
    """Return the prompt from the template or the column `prompt`."""
    if config.template is not None:
        return as_prompt(fill_template(config.template, row), config, "`template`")
    return as_prompt(row.column("prompt"), config, "column `prompt`")


def as_prompt(value: Any, config: TextConfig, label: str) -> str | Messages:
    """Return text or messages as a prompt, with `chat` and `system` applied.

    Raises DataError, which calls the value `label`, if it cannot be a prompt.
    """
    if isinstance(value, str):
        text = checked_text(value, label)
        if config.chat:
            return with_system([{"role": "user", "content": text}], config)
        if config.system is not None:
            raise DataError(
                f"{label} is plain text, which cannot have a `system` message; set `chat: true` to "
                "make it a user message, or write the system text into `template`"
            )
        return text
    messages = checked_messages(value, label)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{label} ends with an assistant turn, which belongs to the response; end it with "
            "another turn, or give plain text to be continued"
        )
    return with_system(messages, config)


def with_system(messages: Messages, config: TextConfig) -> Messages:
    """Return the chat after the configured system message, unless it begins with its own."""
    if config.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": config.system}, *messages]


def fill_template(template: str, row: Row) -> str:
    """Return the template with each {column} replaced by that column's text or number.

    Nothing else is evaluated: a name is a whole column name, and braces in a column's value are
    kept. Raises DataError, with the names of all columns, for an unknown column.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return match[0][0]
        if name not in row.columns:
            near = nearest(name, row.columns)
            guess = f"; did you mean {{{near}}}?" if near else ""
            raise DataError(
                f"`template` names {{{name}}}, and the columns are {row.names()}{guess}"
            )
        content = row.columns[name]
        if isinstance(content, bool) or not isinstance(content, str | int | float):
            raise DataError(
                f"`template` names {{{name}}}, which is {shortened(content)}; a template takes "
                "text or numbers"
            )
        return str(content)

    return checked_text(_FIELD.sub(value, template), "`template`")


def check_prompt(tokens: list[int], config: TextConfig) -> None:
    """Apply `max_prompt_tokens`.

    Raises DataError for a prompt without tokens; DropRow or DataError, as `long_prompts` says, for
    a prompt above the limit.
    """
    if not tokens:
        raise DataError(
            "the prompt is empty and the tokenizer adds no BOS, so no position could predict the "
            "first token; give a prompt, or the column `text` for text without a prompt"
        )
    limit = config.max_prompt_tokens
    if limit is not None and len(tokens) > limit:
        if config.long_prompts == "drop":
            raise DropRow(f"prompt longer than {limit} tokens")
        raise DataError(
            f"the prompt has {len(tokens)} tokens and `max_prompt_tokens` is {limit}; raise the "
            "limit, or set `long_prompts: drop`"
        )


# --- the common prompt of two dialogues -----------------------------------------------------------


def split_dialogues(
    row: Row, config: TextConfig, mark: str, notes: Notes, encoder: Encoder | None
) -> tuple[str | Messages, Reply, Reply]:
    """Return the common prompt of `chosen` and `rejected`, and the rest of each.

    The prompt of two chats is their common first messages; each must then have one assistant turn
    left. The prompt of two plain texts ends with the last `mark` in their common prefix. Without a
    mark it ends with the last word of the common prefix after which the tokenizer begins a new
    token in both texts; without an encoder, with the last word.
    """
    chosen, rejected = row.column("chosen"), row.column("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_chats(row, config)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if config.chat or config.system is not None:
        raise DataError(
            "`chosen` and `rejected` are whole dialogues in plain text, to which `chat` and "
            "`system` do not apply; give messages or a `prompt` column, or remove `chat` and "
            "`system`"
        )
    if chosen == rejected:
        raise DropRow("chosen equals rejected")
    length = common_prefix_length(chosen, rejected)
    start = chosen.rfind(mark, 0, length)
    if start >= 0:
        end = start + len(mark)
    else:
        end = _prompt_end(chosen, rejected, length, encoder)
        notes[f"prompt is the longest common prefix (it does not contain {mark!r})"] += 1
    return chosen[:end], chosen[end:], rejected[end:]


def _prompt_end(chosen: str, rejected: str, length: int, encoder: Encoder | None) -> int:
    ends = list(_word_ends(chosen, rejected, length))
    if not ends:
        raise DataError(
            "there is no `prompt`, and `chosen` and `rejected` do not begin with the same word; "
            "name the prompt's column (`columns: {prompt: ...}`) or write a `template`"
        )
    if encoder is None:
        return ends[0]
    for end in ends:
        tokens = encoder.encode_plain(chosen[:end])
        texts = (chosen[end:], rejected[end:])
        if not any(encoder.continuation(chosen[:end], tokens, text)[1] for text in texts):
            return end
    return ends[0]


def _word_ends(chosen: str, rejected: str, length: int) -> Iterator[int]:
    """Yield the ends of the words in the texts' common prefix, the last first."""
    for end in range(length, 0, -1):
        next_characters = chosen[end : end + 1], rejected[end : end + 1]
        if not chosen[end - 1].isspace() and all(c.isspace() for c in next_characters):
            yield end


def _split_chats(row: Row, config: TextConfig) -> tuple[str | Messages, Messages, Messages]:
    chosen = checked_messages(row.column("chosen"), "column `chosen`")
    rejected = checked_messages(row.column("rejected"), "column `rejected`")
    if chosen == rejected:
        raise DropRow("chosen equals rejected")
    common = 0
    while chosen[common : common + 1] == rejected[common : common + 1]:
        common += 1
    if common == 0:
        raise DataError(
            "there is no `prompt`, and `chosen` and `rejected` do not begin with the same message; "
            "name the prompt's column (`columns: {prompt: ...}`)"
        )
    replies = chosen[common:], rejected[common:]
    if any([message["role"] for message in reply] != ["assistant"] for reply in replies):
        raise DropRow("the dialogues differ before their last turn")
    label = "the common part of `chosen` and `rejected`"
    return as_prompt(chosen[:common], config, label), *replies
