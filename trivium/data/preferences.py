"""Preference pairs and labeled reasoning steps: what reward models and DPO learn from.

A pair is one prompt with a chosen and a rejected response, given apart or as two whole dialogues.
Labeled steps are one response whose steps were each judged. What is learned from them is for the
algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from trivium.data.chat import (
    Encoder,
    Messages,
    Reply,
    checked_messages,
    decode_response,
    reply_text,
    step_ends,
)
from trivium.data.demonstrations import (
    ResponsesConfig,
    check_context,
    exchanged,
    fitted,
    reply_of,
    require_reply,
    texts_of,
)
from trivium.data.group import Group
from trivium.data.messages import shortened
from trivium.data.prompts import (
    ASSISTANT_MARK,
    as_prompt,
    check_prompt,
    explicit_prompt,
    form_of,
    split_dialogues,
)
from trivium.data.rows import Dropped, LoadReport, Notes, Row, checked_text, collect
from trivium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_EQUAL = "chosen equals rejected"


class PreferencesConfig(ResponsesConfig):
    """Pairs of a chosen and a rejected response."""

    assistant_mark: str = Field(default=ASSISTANT_MARK, min_length=1)
    """What begins the assistant's turn in plain-text dialogues that hold prompt and response."""

    known_columns: ClassVar = frozenset({"prompt", "chosen", "rejected"})


class StepLabelsConfig(ResponsesConfig):
    """Responses in steps, each step with its label."""

    separator: str = "\n"
    """What stands between two steps in the response."""

    known_columns: ClassVar = frozenset({"prompt", "completions", "labels"})


@dataclass(frozen=True)
class Preference:
    """A prompt with its chosen and rejected responses, `group.responses` in this order."""

    group: Group
    prompt: str | Messages
    chosen: str
    rejected: str
    index: int


@dataclass(frozen=True)
class StepLabels:
    """A response, the index of each step's last token in it, and each step's label in [0, 1]."""

    group: Group
    ends: list[int]
    labels: list[float]


def load_preferences(
    config: PreferencesConfig, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> list[Preference]:
    """Return the pairs of the rows, in order; see `read_preferences`."""
    return read_preferences(config, tokenizer, context)[0]


def read_preferences(
    config: PreferencesConfig, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> tuple[list[Preference], LoadReport]:
    """Return the pairs and the count of rows used.

    A row has `chosen` and `rejected`, and a prompt (`prompt` or `template`) unless these are whole
    dialogues. Pairs that are equal or hold an empty response are dropped and counted. Raises
    DataError for rows that are no pairs, or longer than the model's context.
    """
    encoder = Encoder(tokenizer)

    def convert(row: Row, notes: Notes) -> Preference:
        prompt, *replies = written_pair(row, config, notes, encoder)
        exchanges = [exchanged(encoder, prompt, reply, notes) for reply in replies]
        tokens = exchanges[0].prompt
        check_prompt(tokens, config)
        responses = [fitted(exchange.response, config, notes) for exchange in exchanges]
        check_context(len(tokens) + max(map(len, responses)), context)
        if responses[0] == responses[1]:
            raise Dropped(_EQUAL)
        chosen, rejected = map(reply_text, replies)
        return Preference(Group(tokens, responses), prompt, chosen, rejected, row.index)

    return collect(config, convert, same=lambda pair: texts_of(pair.group))


def written_pair(
    row: Row, config: PreferencesConfig, notes: Notes, encoder: Encoder | None = None
) -> tuple[str | Messages, Reply, Reply]:
    """Return prompt, chosen and rejected, checked as far as that needs no tokenizer.

    Without an encoder, a prompt that two texts share may be off by words.
    """
    prompt, chosen, rejected = _pair(row, config, notes, encoder)
    require_reply(chosen)
    require_reply(rejected)
    if chosen == rejected:
        raise Dropped(_EQUAL)
    notes.forms[form_of(prompt)] += 1
    return prompt, chosen, rejected


def _pair(
    row: Row, config: PreferencesConfig, notes: Notes, encoder: Encoder | None
) -> tuple[str | Messages, Reply, Reply]:
    chosen, rejected = row.column("chosen"), row.column("rejected")
    whole = _is_dialogue(chosen) and _is_dialogue(rejected)
    if whole and config.template is not None:
        raise DataError(
            "`chosen` and `rejected` are whole dialogues, which hold their prompt, and `template` "
            "gives another; remove `template`"
        )
    if whole or (config.template is None and not row.has("prompt")):
        return split_dialogues(row, config, config.assistant_mark, notes, encoder)
    prompt = explicit_prompt(row, config)
    replies = reply_of(chosen, "column `chosen`"), reply_of(rejected, "column `rejected`")
    if isinstance(prompt, str) and all(reply_text(reply).startswith(prompt) for reply in replies):
        notes["chosen and rejected both repeat the prompt (if they hold it, name no prompt)"] += 1
    if isinstance(prompt, str) and not all(isinstance(reply, str) for reply in replies):
        prompt = as_prompt([{"role": "user", "content": prompt}], config, "the prompt")
    return prompt, *replies


def _is_dialogue(value: Any) -> bool:
    """Whether it is messages of which the first is not the assistant's: a prompt is among them."""
    if not isinstance(value, list):
        return False
    return checked_messages(value, "a dialogue")[0]["role"] != "assistant"


def load_step_labels(
    config: StepLabelsConfig, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> list[StepLabels]:
    """Return the labeled responses of the rows, in order; see `read_step_labels`."""
    return read_step_labels(config, tokenizer, context)[0]


def read_step_labels(
    config: StepLabelsConfig, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> tuple[list[StepLabels], LoadReport]:
    """Return the labeled responses and the count of rows used.

    A row has a prompt (`prompt` or `template`), its steps' texts in `completions` and as many
    `labels`, true, false or numbers in [0, 1]. A step ends with its last character that is not
    space. Raises DataError for rows that are otherwise, or longer than the model's context.
    """
    encoder = Encoder(tokenizer)

    def convert(row: Row, notes: Notes) -> StepLabels:
        prompt, steps, labels = written_steps(row, config, notes)
        text = config.separator.join(steps)
        exchange = exchanged(encoder, prompt, text, notes)
        check_prompt(exchange.prompt, config)
        ends = _token_ends(steps, text, config.separator, exchange.response, encoder)
        response = fitted(exchange.response, config, notes)
        check_context(len(exchange.prompt) + len(response), context)
        ends = [end for end in ends if end < len(response)]
        if not ends:
            raise Dropped("no step within `max_response_tokens`")
        return StepLabels(Group(exchange.prompt, [response]), ends, labels[: len(ends)])

    return collect(config, convert, same=lambda labeled: texts_of(labeled.group))


def written_steps(
    row: Row, config: StepLabelsConfig, notes: Notes
) -> tuple[str | Messages, list[str], list[float]]:
    """Return prompt, steps and labels, checked as far as that needs no tokenizer."""
    steps, labels = _steps(row), _labels(row)
    if len(steps) != len(labels):
        raise DataError(
            f"has {len(steps)} `completions` and {len(labels)} `labels`; each step needs one"
        )
    prompt = explicit_prompt(row, config)
    require_reply(config.separator.join(steps))
    notes.forms[form_of(prompt)] += 1
    return prompt, steps, labels


def _token_ends(
    steps: list[str], text: str, separator: str, response: list[int], encoder: Encoder
) -> list[int]:
    """Return the index of each step's last token in the response."""
    found = decode_response(encoder.tokenizer, response).find(text.strip())
    if found < 0:
        raise DataError(
            "the steps' text does not come back from the tokens, so where a step ends cannot be "
            "told: the tokenizer or its chat template changes it; write the text as it keeps it"
        )
    begins = found - (len(text) - len(text.lstrip()))
    stops = accumulate(len(step) + len(separator) for step in steps)
    starts = [0, *stops][:-1]
    ends = [begins + start + len(step.rstrip()) for start, step in zip(starts, steps, strict=True)]
    tokens = step_ends(encoder.tokenizer, response, ends)
    for number, (end, following) in enumerate(pairwise(tokens), 1):
        if end == following:
            raise DataError(
                f"steps {number} and {number + 1} end in the same token; set `separator` to text "
                "that parts them, such as a line break"
            )
    return tokens


def _steps(row: Row) -> list[str]:
    steps = row.column("completions")
    if not isinstance(steps, list):
        raise DataError(
            f"column `completions` is {shortened(steps)}; it takes a list of texts, one per step"
        )
    if not steps:
        raise Dropped("empty response")
    for number, step in enumerate(steps, 1):
        if not checked_text(step, f"step {number} of `completions`").strip():
            raise DataError(f"step {number} of `completions` is empty; remove it and its label")
    return steps


def _labels(row: Row) -> list[float]:
    labels = row.column("labels")
    if not isinstance(labels, list):
        raise DataError(f"column `labels` is {shortened(labels)}; it takes a list, one per step")
    for number, label in enumerate(labels, 1):
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise DataError(
                f"label {number} is {shortened(label)}; write true, false or a number in [0, 1]"
            )
    return [float(label) for label in labels]
