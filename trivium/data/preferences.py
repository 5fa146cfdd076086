"""Preference pairs and step labels: the training data of DPO and of reward models.

A pair is one prompt with a chosen and a rejected response, in separate columns or as two whole
dialogues. Step labels are one response with a label for each of its steps. The losses are in the
algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trivium.data.chat import decode_response, step_ends
from trivium.data.chat_columns import checked_messages
from trivium.data.demonstrations import (
    ResponsesConfig,
    check_context,
    drop_if_empty,
    encode_exchange,
    group_key,
    limit_response,
    parse_reply,
)
from trivium.data.encoder import Encoder, Reply, reply_text
from trivium.data.group import Group
from trivium.data.messages import checked_text, shortened
from trivium.data.prompt_forms import (
    CONTEXT_COLUMNS,
    as_prompt,
    explicit_prompt,
    prompt_form,
    tools_of,
)
from trivium.data.prompts import ASSISTANT_MARK, check_prompt, split_dialogues
from trivium.data.rows import DropRow, LoadReport, Notes, Row, collect
from trivium.data.template import Messages
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_EQUAL = "chosen equals rejected"
_REPEATED_PROMPT = "chosen and rejected both repeat the prompt (if they contain it, give no prompt)"


class PreferencesConfig(ResponsesConfig):
    """Pairs of a chosen and a rejected response."""

    assistant_mark: str = Field(default=ASSISTANT_MARK, min_length=1)
    """Text before an assistant turn in plain-text dialogues that contain prompt and response."""

    known_columns: ClassVar = CONTEXT_COLUMNS | {"prompt", "chosen", "rejected", "conversations"}

    def margin(self, row: Row) -> float | None:
        """Return the margin by which the chosen response must win; None without margins."""
        return None


class StepLabelsConfig(ResponsesConfig):
    """Responses of several steps with a label for each step."""

    separator: str = "\n"
    """Text between two steps of the response."""

    known_columns: ClassVar = CONTEXT_COLUMNS | {"prompt", "completions", "labels"}


@dataclass(frozen=True)
class Preference:
    """A prompt with its chosen and rejected responses; `group.responses` has this order."""

    group: Group
    prompt: str | Messages
    chosen: str
    rejected: str
    index: int
    margin: float | None = None


@dataclass(frozen=True)
class StepLabels:
    """A response, the index of each step's last token in it, and each step's label in [0, 1]."""

    group: Group
    ends: list[int]
    labels: list[float]


def load_preferences(
    config: PreferencesConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> list[Preference]:
    """Return the pairs in the order of the rows; see `read_preferences`."""
    return read_preferences(config, tokenizer, context_length)[0]


def read_preferences(
    config: PreferencesConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> tuple[list[Preference], LoadReport]:
    """Return the pairs and the report of rows kept and dropped.

    A row has `chosen` and `rejected`, and a prompt (`prompt` or `template`) unless both are whole
    dialogues. Pairs with equal responses or an empty response are dropped and counted. Raises
    DataError for a row that is not a pair, or one that exceeds the model's context.
    """
    encoder = Encoder(tokenizer, config.template_arguments)

    def convert(row: Row, notes: Notes) -> Preference:
        prompt, *replies = parse_pair(row, config, notes, encoder)
        tools = tools_of(row, prompt, config, notes)
        exchanges = [encode_exchange(encoder, prompt, reply, notes, tools) for reply in replies]
        if row.has("prompt") or config.template is not None:
            encoder.tell_of_chat(prompt)
        tokens = exchanges[0].prompt
        check_prompt(tokens, config)
        responses = [limit_response(exchange.response, config, notes) for exchange in exchanges]
        check_context(len(tokens) + max(map(len, responses)), context_length)
        if responses[0] == responses[1]:
            raise DropRow(_EQUAL)
        chosen, rejected = map(reply_text, replies)
        group, margin = Group(tokens, responses), config.margin(row)
        return Preference(group, prompt, chosen, rejected, row.index, margin)

    return collect(config, convert, dedup_key=lambda pair: group_key(pair.group))


def parse_pair(
    row: Row, config: PreferencesConfig, notes: Notes, encoder: Encoder | None = None
) -> tuple[str | Messages, Reply, Reply]:
    """Return prompt, chosen and rejected, with every check that needs no tokenizer.

    Without an encoder, the common prompt of two plain texts may be a few words too long.
    """
    prompt, chosen, rejected = _split_pair(row, config, notes, encoder)
    drop_if_empty(chosen)
    drop_if_empty(rejected)
    if chosen == rejected:
        raise DropRow(_EQUAL)
    config.margin(row)
    notes.forms[prompt_form(prompt)] += 1
    return prompt, chosen, rejected


def _split_pair(
    row: Row, config: PreferencesConfig, notes: Notes, encoder: Encoder | None
) -> tuple[str | Messages, Reply, Reply]:
    _require_pair(row)
    chosen, rejected = row.column("chosen"), row.column("rejected")
    are_dialogues = _is_dialogue(chosen) and _is_dialogue(rejected)
    if are_dialogues and config.template is not None:
        raise DataError(
            "`chosen` and `rejected` are whole dialogues, which contain their prompt, and "
            "`template` gives another prompt; remove `template`"
        )
    if are_dialogues or (config.template is None and not row.has("prompt")):
        return split_dialogues(row, config, config.assistant_mark, notes, encoder)
    prompt = explicit_prompt(row, config)
    replies = parse_reply(chosen, "column `chosen`"), parse_reply(rejected, "column `rejected`")
    if isinstance(prompt, str) and all(reply_text(reply).startswith(prompt) for reply in replies):
        notes[_REPEATED_PROMPT] += 1
    if isinstance(prompt, str) and not all(isinstance(reply, str) for reply in replies):
        prompt = as_prompt([{"role": "user", "content": prompt}], config, "the prompt", row)
    return prompt, *replies


def _require_pair(row: Row) -> None:
    """Raise DataError, with what to write, for a row without `chosen` and `rejected`."""
    if {"chosen", "rejected"} & row.columns.keys():
        return
    if {"completion", "label"} <= row.columns.keys():
        raise DataError(
            "has `completion` and `label`, as in KTO's data: one response with a label, and a "
            "pair needs two; write rows of `prompt`, `chosen` (a completion labeled true) and "
            "`rejected` (one labeled false for the same prompt), or train by SFT, which reads the "
            "rows labeled true"
        )
    raise DataError(
        f"no pair: the columns are {row.names()}, and a pair needs `chosen` and `rejected`, which "
        "are two responses to a `prompt` or two whole dialogues; name them, as in `columns: "
        "{chosen: better, rejected: worse}` (rows with one response are for SFT)"
    )


def _is_dialogue(value: Any) -> bool:
    """Whether the value is messages that contain a prompt: the first is not the assistant's."""
    if not isinstance(value, list):
        return False
    return checked_messages(value, "a dialogue")[0]["role"] != "assistant"


def load_step_labels(
    config: StepLabelsConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> list[StepLabels]:
    """Return the labeled responses in the order of the rows; see `read_step_labels`."""
    return read_step_labels(config, tokenizer, context_length)[0]


def read_step_labels(
    config: StepLabelsConfig, tokenizer: PreTrainedTokenizerBase, context_length: int | None = None
) -> tuple[list[StepLabels], LoadReport]:
    """Return the labeled responses and the report of rows kept and dropped.

    A row has a prompt (`prompt` or `template`), the texts of its steps in `completions`, and a
    label for each step in `labels`: true, false or a number in [0, 1]. A step ends with its last
    character that is not whitespace. Raises DataError for any other row, or one that exceeds the
    model's context.
    """
    encoder = Encoder(tokenizer, config.template_arguments)

    def convert(row: Row, notes: Notes) -> StepLabels:
        prompt, steps, labels = parse_step_labels(row, config, notes)
        text = config.separator.join(steps)
        tools = tools_of(row, prompt, config, notes)
        exchange = encode_exchange(encoder, prompt, text, notes, tools)
        check_prompt(exchange.prompt, config)
        ends = token_ends(steps, text, config.separator, exchange.response, encoder)
        response = limit_response(exchange.response, config, notes)
        check_context(len(exchange.prompt) + len(response), context_length)
        ends = [end for end in ends if end < len(response)]
        if not ends:
            raise DropRow("no step within `max_response_tokens`")
        return StepLabels(Group(exchange.prompt, [response]), ends, labels[: len(ends)])

    return collect(config, convert, dedup_key=lambda item: group_key(item.group))


def parse_step_labels(
    row: Row, config: StepLabelsConfig, notes: Notes
) -> tuple[str | Messages, list[str], list[float]]:
    """Return prompt, steps and labels, with every check that needs no tokenizer."""
    steps, labels = _steps(row), _labels(row)
    if len(steps) != len(labels):
        raise DataError(
            f"has {len(steps)} `completions` and {len(labels)} `labels`; each step needs one"
        )
    prompt = explicit_prompt(row, config)
    drop_if_empty(config.separator.join(steps))
    notes.forms[prompt_form(prompt)] += 1
    return prompt, steps, labels


def token_ends(
    steps: list[str], text: str, separator: str, response: list[int], encoder: Encoder
) -> list[int]:
    """Return the index of each step's last token in the response.

    ``text`` is the steps, joined by the separator. Raises DataError if two steps end in one token.
    """
    found = decode_response(encoder.tokenizer, response).find(text.strip())
    if found < 0:
        raise DataError(
            "the decoded response does not contain the text of the steps, so the ends of the steps "
            "are unknown: the tokenizer or its chat template changes the text; write the text in a "
            "form that they keep"
        )
    offset = found - (len(text) - len(text.lstrip()))
    stops = accumulate(len(step) + len(separator) for step in steps)
    starts = [0, *stops][:-1]
    ends = [offset + start + len(step.rstrip()) for start, step in zip(starts, steps, strict=True)]
    last_tokens = step_ends(encoder.tokenizer, response, ends)
    for number, (end, next_end) in enumerate(pairwise(last_tokens), 1):
        if end == next_end:
            raise DataError(
                f"steps {number} and {number + 1} end in the same token; set `separator` to text "
                "that separates them, such as a line break"
            )
    return last_tokens


def _steps(row: Row) -> list[str]:
    steps = row.column("completions")
    if not isinstance(steps, list):
        raise DataError(
            f"column `completions` is {shortened(steps)}; write a list of texts, one per step"
        )
    if not steps:
        raise DropRow("empty response")
    for number, step in enumerate(steps, 1):
        if not checked_text(step, f"step {number} of `completions`").strip():
            raise DataError(f"step {number} of `completions` is empty; remove it and its label")
    return steps


def _labels(row: Row) -> list[float]:
    labels = row.column("labels")
    if not isinstance(labels, list):
        raise DataError(
            f"column `labels` is {shortened(labels)}; write a list of labels, one per step"
        )
    for number, label in enumerate(labels, 1):
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise DataError(
                f"label {number} is {shortened(label)}; write true, false or a number in [0, 1]"
            )
    return [float(label) for label in labels]
