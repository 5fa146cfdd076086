"""Prompts for rollouts, and what every loader shares about prompts: their text and their length.

A prompt is plain text, used verbatim, or a chat that the tokenizer's template renders up to the
assistant's turn. Its text comes from a column, from a template over several, or from what a chosen
and a rejected dialogue have in common. What follows a prompt is for the modules beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from trivium.config.base import Conflict
from trivium.data.chat import Encoder, Messages, Reply, checked_messages, shared_length
from trivium.data.messages import nearest, shortened
from trivium.data.rows import Dropped, LoadReport, Notes, Row, RowsConfig, checked_text, collect
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT_MARK = "\n\nAssistant:"

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class TextConfig(RowsConfig):
    """How a row's prompt is written."""

    template: str | None = None
    """The prompt written from columns, as in "Question: {question}\\nAnswer:"; {{ is a brace."""
    chat: bool = False
    """Make a plain-text prompt the user's message of a chat."""
    system: str | None = None
    """The system message of chats that do not begin with one of their own."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """The longest prompt that is used."""
    long_prompts: Literal["error", "drop"] = "error"
    """What becomes of a row whose prompt is longer: an error, or dropped and counted."""

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

    def reads(self, column: str) -> bool:
        named = [match[1] for match in _FIELD.finditer(self.template or "")]
        return column in named or super().reads(column)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.template is not None and "prompt" in self.columns:
            yield "template", "`template` and `columns.prompt` both give the prompt; keep one"
        if self.long_prompts != "error" and self.max_prompt_tokens is None:
            yield "long_prompts", "`long_prompts` needs a limit; set `max_prompt_tokens`"


class PromptsConfig(TextConfig):
    """The prompts of a rollout."""

    assistant_mark: str = Field(default=ASSISTANT_MARK, min_length=1)
    """What begins the assistant's turn in plain-text dialogues that hold prompt and response."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, its text or messages, the row's other columns and its number."""

    tokens: list[int]
    text: str | Messages
    columns: dict[str, Any]
    index: int


def load_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, room: int | None = None
) -> list[Prompt]:
    """Return the prompts of the rows, in order; see `read_prompts`."""
    return read_prompts(config, tokenizer, room)[0]


def read_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, room: int | None = None
) -> tuple[list[Prompt], LoadReport]:
    """Return the prompts and the count of rows used.

    A row gives its prompt by `template`, in `prompt`, in `messages` (up to a closing assistant's
    turn), or as what `chosen` and `rejected` share. `room` is how many tokens of the model's
    context are the prompt's. Raises DataError for rows that give none, or one that is longer.
    """
    encoder = Encoder(tokenizer)

    def convert(row: Row, notes: Notes) -> Prompt:
        text = written_prompt(row, config, notes, encoder)
        tokens = encoder.prompt(text)
        check_prompt(tokens, config)
        if room is not None and len(tokens) > room:
            raise DataError(
                f"the prompt has {len(tokens)} tokens, and beside the response the model's context "
                f"has room for {max(room, 0)}; lower the response's `max_tokens`, or set "
                "`max_prompt_tokens` and `long_prompts: drop`"
            )
        others = {name: value for name, value in row.columns.items() if name != "prompt"}
        return Prompt(tokens, text, others, row.index)

    return collect(config, convert, same=lambda prompt: tuple(prompt.tokens))


def written_prompt(
    row: Row, config: PromptsConfig, notes: Notes, encoder: Encoder | None = None
) -> str | Messages:
    """Return the row's prompt; without an encoder, one that two texts share may be off by words."""
    text = _any_prompt(row, config, notes, encoder)
    notes.forms[form_of(text)] += 1
    return text


def form_of(prompt: str | Messages) -> str:
    """What a prompt is, where the rows of one file differ in it."""
    return "plain text" if isinstance(prompt, str) else "a chat"


def _any_prompt(
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
    """Return the prompt that the template or the column `prompt` gives."""
    if config.template is not None:
        return as_prompt(fill(config.template, row), config, "`template`")
    return as_prompt(row.column("prompt"), config, "column `prompt`")


def as_prompt(value: Any, config: TextConfig, what: str) -> str | Messages:
    """Return text or messages as the prompt: with `chat` and `system` applied, and checked."""
    if isinstance(value, str):
        text = checked_text(value, what)
        if config.chat:
            return with_system([{"role": "user", "content": text}], config)
        if config.system is not None:
            raise DataError(
                f"{what} is plain text, which has no place for `system`; set `chat: true` to make "
                "it a user's message, or write the system text into `template`"
            )
        return text
    messages = checked_messages(value, what)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            f"{what} ends with the assistant's turn, which is the response's place; end it with "
            "another's, or give plain text to be continued"
        )
    return with_system(messages, config)


def with_system(messages: Messages, config: TextConfig) -> Messages:
    """Return the chat behind the configured system message, unless it begins with its own."""
    if config.system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": config.system}, *messages]


def fill(template: str, row: Row) -> str:
    """Return the template with each {column} replaced by that column's text or number.

    Nothing else is evaluated: a name is a whole column name, and what a column holds is not read
    for braces. Raises DataError for an unknown column, listing those there are.
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
        held = row.columns[name]
        if isinstance(held, bool) or not isinstance(held, str | int | float):
            raise DataError(
                f"`template` names {{{name}}}, which is {shortened(held)}; it takes text or numbers"
            )
        return str(held)

    return checked_text(_FIELD.sub(value, template), "`template`")


def check_prompt(tokens: list[int], config: TextConfig) -> None:
    """Refuse a prompt without tokens, or one that is longer than the limit."""
    if not tokens:
        raise DataError(
            "the prompt is empty and the tokenizer adds no BOS, so nothing would predict the first "
            "token; give a prompt, or the column `text` for text without one"
        )
    limit = config.max_prompt_tokens
    if limit is not None and len(tokens) > limit:
        if config.long_prompts == "drop":
            raise Dropped(f"prompt longer than {limit} tokens")
        raise DataError(
            f"the prompt has {len(tokens)} tokens and `max_prompt_tokens` is {limit}; raise it, or "
            "set `long_prompts: drop`"
        )


# --- the prompt that two dialogues share ----------------------------------------------------------


def split_dialogues(
    row: Row, config: TextConfig, mark: str, notes: Notes, encoder: Encoder | None
) -> tuple[str | Messages, Reply, Reply]:
    """Return the prompt that `chosen` and `rejected` share, and what each says next.

    Chats share their first messages, and each must then hold one assistant's turn. Plain texts
    share the text up to the last `mark` that is in both before they differ. Without a mark it is
    the longest common text that ends with a word, at the last place where the tokenizer puts a
    border between tokens in both; without an encoder the last word's end is taken.
    """
    chosen, rejected = row.column("chosen"), row.column("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_chats(row, config)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if config.chat or config.system is not None:
        raise DataError(
            "`chosen` and `rejected` are whole dialogues in plain text, which `chat` and `system` "
            "cannot render; give messages, a `prompt` column, or leave the two out"
        )
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    length = shared_length(chosen, rejected)
    at = chosen.rfind(mark, 0, length)
    if at >= 0:
        end = at + len(mark)
    else:
        end = _word_border(chosen, rejected, length, encoder)
        notes[f"prompt is the longest common beginning (there is no {mark!r} in it)"] += 1
    return chosen[:end], chosen[end:], rejected[end:]


def _word_border(chosen: str, rejected: str, length: int, encoder: Encoder | None) -> int:
    ends = list(_word_ends(chosen, rejected, length))
    if not ends:
        raise DataError(
            "no `prompt`, and `chosen` and `rejected` do not begin with a word in common that "
            "could be it; name the prompt's column (`columns: {prompt: ...}`) or write a `template`"
        )
    if encoder is None:
        return ends[0]
    for end in ends:
        tokens = encoder.bare(chosen[:end])
        texts = (chosen[end:], rejected[end:])
        if not any(encoder.continuation(chosen[:end], tokens, text)[1] for text in texts):
            return end
    return ends[0]


def _word_ends(chosen: str, rejected: str, length: int) -> Iterator[int]:
    """Yield where words end in both texts' common beginning, the last first."""
    for end in range(length, 0, -1):
        follows = chosen[end : end + 1], rejected[end : end + 1]
        if not chosen[end - 1].isspace() and all(after.isspace() for after in follows):
            yield end


def _split_chats(row: Row, config: TextConfig) -> tuple[str | Messages, Messages, Messages]:
    chosen = checked_messages(row.column("chosen"), "column `chosen`")
    rejected = checked_messages(row.column("rejected"), "column `rejected`")
    if chosen == rejected:
        raise Dropped("chosen equals rejected")
    same = 0
    while chosen[same : same + 1] == rejected[same : same + 1]:
        same += 1
    if same == 0:
        raise DataError(
            "no `prompt`, and `chosen` and `rejected` share no first message that could be it; "
            "name the prompt's column (`columns: {prompt: ...}`)"
        )
    replies = chosen[same:], rejected[same:]
    if any([message["role"] for message in reply] != ["assistant"] for reply in replies):
        raise Dropped("the dialogues differ before their last turn")
    return as_prompt(chosen[:same], config, "what `chosen` and `rejected` share"), *replies
