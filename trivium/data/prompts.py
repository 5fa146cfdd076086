"""Prompts for rollouts, and functions for prompts shared by the loaders.

A prompt is read from a column, written by a template from several columns (``prompt_forms``), or
is the common part of a chosen and a rejected dialogue. Responses are in the other modules of this
package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trivium.data.chat import common_prefix_length
from trivium.data.chat_columns import checked_messages
from trivium.data.encoder import Encoder, Reply
from trivium.data.prompt_forms import (
    TextConfig,
    alpaca_prompt,
    as_prompt,
    explicit_prompt,
    is_alpaca,
    prompt_form,
    tools_of,
)
from trivium.data.rows import DropRow, LoadReport, Notes, Row, collect
from trivium.data.template import Messages
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT_MARK = "\n\nAssistant:"

_PROMPT_NAMES = ("instruction", "question", "query", "problem", "input", "user")


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
    encoder = Encoder(tokenizer, config.template_arguments)

    def convert(row: Row, notes: Notes) -> Prompt:
        text = parse_prompt(row, config, notes, encoder)
        tools = tools_of(row, text, config, notes)
        tokens, remarks = encoder.prompt_and_remarks(text, tools)
        for remark in remarks:
            notes.remark(remark)
        if row.has("prompt") or config.template is not None:
            encoder.tell_of_chat(text)
        check_prompt(tokens, config)
        if max_prompt_length is not None and len(tokens) > max_prompt_length:
            raise DataError(
                f"the prompt has {len(tokens)} tokens, and the response leaves room for "
                f"{max(max_prompt_length, 0)} in the model's context; lower the response's "
                "`max_tokens`, or set `max_prompt_tokens` and `long_prompts: drop`"
            )
        columns = {name: value for name, value in row.columns.items() if name != "prompt"}
        if "tools" in columns and not isinstance(text, str):
            columns["tools"] = tools
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


def _find_prompt(
    row: Row, config: PromptsConfig, notes: Notes, encoder: Encoder | None
) -> str | Messages:
    if config.template is None and not row.has("prompt"):
        if row.has("messages"):
            messages = checked_messages(row.column("messages"), "column `messages`")
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            return as_prompt(messages, config, "column `messages`", row)
        if row.has("chosen") and row.has("rejected"):
            return split_dialogues(row, config, config.assistant_mark, notes, encoder)[0]
        if is_alpaca(row):
            return alpaca_prompt(row, config)
    return explicit_prompt(row, config)


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
        _require_no_prompt_column(row)
        end = _prompt_end(chosen, rejected, length, encoder)
        notes[f"prompt is the longest common prefix (it does not contain {mark!r})"] += 1
    return chosen[:end], chosen[end:], rejected[end:]


def _require_no_prompt_column(row: Row) -> None:
    """Raise DataError if another column looks like the prompt of `chosen` and `rejected`."""
    name = next((n for n in _PROMPT_NAMES if isinstance(row.columns.get(n), str)), None)
    if name is not None:
        raise DataError(
            f"there is no `prompt`, and column `{name}` looks like it; set `columns: {{prompt: "
            f"{name}}}`, or rename `{name}` if `chosen` and `rejected` contain the prompt"
        )


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
    return as_prompt(chosen[:common], config, label, row), *replies
