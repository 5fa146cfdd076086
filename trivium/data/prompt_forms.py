"""Forms of a row's prompt: text or a chat, with its system message and tools.

A prompt is plain text, used verbatim, or a chat that the tokenizer's template renders up to the
assistant turn. ``prompts`` finds it in a row, and ``encoder`` makes tokens of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator

from trivium.config.base import Conflict
from trivium.data.chat_columns import checked_messages, checked_tools
from trivium.data.messages import checked_text, nearest, shortened
from trivium.data.rows import Notes, Row, RowsConfig
from trivium.data.template import Messages, Tools
from trivium.errors import DataError

_TAKEN = frozenset(
    "messages tools documents add_generation_prompt tokenize chat_template conversation "
    "continue_final_message return_dict return_tensors return_assistant_tokens_mask padding "
    "truncation max_length tokenizer_kwargs".split()
)
"""Arguments of the library's rendering that are not variables of a template."""
CONTEXT_COLUMNS = frozenset({"tools", "system"})
"""Columns that belong to a chat beside its messages."""
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class TextConfig(RowsConfig):
    """Form and limits of the prompts in the data."""

    template: str | None = None
    """The prompt written from columns, as in "Question: {question}\\nAnswer:"; {{ is a brace."""
    chat: bool = False
    """Whether a plain-text prompt becomes the user message of a chat."""
    system: str | None = None
    """System message of chats that do not begin with one, in rows without a column `system`."""
    template_arguments: dict[str, Any] | None = None
    """Variables for the chat template, as in {enable_thinking: false}; null gives none, and to
    held-out data those of the training data."""
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

    @field_validator("template_arguments")
    @classmethod
    def _check_arguments(cls, arguments: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in arguments or {}:
            if name in _TAKEN or not name.isidentifier():
                raise ValueError(
                    f"`{name}` is not a variable that can be set; name a variable of the chat "
                    "template, such as enable_thinking (tools are a column of the rows)"
                )
        return arguments

    @property
    def template_columns(self) -> set[str]:
        """The columns that `template` names."""
        return {match[1] for match in _FIELD.finditer(self.template or "") if match[1]}

    def uses_column(self, column: str) -> bool:
        return column in self.template_columns or super().uses_column(column)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.template is not None and "prompt" in self.columns:
            yield "template", "`template` and `columns.prompt` both give the prompt; keep one"
        if self.long_prompts != "error" and self.max_prompt_tokens is None:
            yield "long_prompts", "`long_prompts` needs a limit; set `max_prompt_tokens`"


TextConfigT = TypeVar("TextConfigT", bound=TextConfig)


def with_arguments_of(data: TextConfigT, training: TextConfig | None) -> TextConfigT:
    """Return held-out data with the training data's template arguments, unless it has its own."""
    if training is None or data.template_arguments is not None:
        return data
    return data.model_copy(update={"template_arguments": training.template_arguments})


def prompt_form(prompt: str | Messages) -> str:
    """Return a name of the prompt's form; the load report notes files with several forms."""
    return "plain text" if isinstance(prompt, str) else "a chat"


def explicit_prompt(row: Row, config: TextConfig) -> str | Messages:
    """Return the prompt from the template or the column `prompt`."""
    if config.template is not None:
        return as_prompt(fill_template(config.template, row), config, "`template`", row)
    return as_prompt(row.column("prompt"), config, "column `prompt`", row)


def is_alpaca(row: Row) -> bool:
    """Whether the row has the columns of Alpaca, whose prompt is in two of them."""
    return {"instruction", "output"} <= row.columns.keys()


def alpaca_prompt(row: Row, config: TextConfig) -> str | Messages:
    """Return the user's message from `instruction` and, below a blank line, a nonempty `input`.

    Raises DataError without `chat`, because there are several plain-text forms of these rows.
    """
    if not config.chat:
        raise DataError(
            "has `instruction` and `output`, as in Alpaca's data, which has no one form in plain "
            "text; set `chat: true` to make instruction and input the user's message, or "
            'write the form: `template: "### Instruction:\\n{instruction}\\n\\n### Response:\\n"` '
            "and, for SFT, `columns: {completion: output}`"
        )
    if row.columns.get("history"):
        raise DataError("`history` holds earlier turns, which are not read; write `messages`")
    parts = [row.text("instruction"), row.text("input") if row.has("input") else ""]
    text = "\n\n".join(part for part in parts if part.strip())
    return as_prompt(text, config, "column `instruction`", row)


def tools_of(
    row: Row, prompt: str | Messages | None, config: TextConfig, notes: Notes
) -> Tools | None:
    """Return the tools of a chat; note columns for chats in a row that is plain text."""
    if prompt is not None and not isinstance(prompt, str):
        return checked_tools(row.columns["tools"]) if row.has("tools") else None
    for name in ("tools", "system"):
        if row.columns.get(name) and name not in config.template_columns:
            notes.remark(f"column `{name}` is not used: the prompt is plain text, not a chat")
    return None


def as_prompt(value: Any, config: TextConfig, label: str, row: Row | None = None) -> str | Messages:
    """Return text or messages as a prompt, with `chat` and `system` applied.

    Raises DataError, which calls the value `label`, if it cannot be a prompt.
    """
    if isinstance(value, str):
        text = checked_text(value, label)
        if config.chat:
            return with_system([{"role": "user", "content": text}], config, row)
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
    return with_system(messages, config, row)


def with_system(messages: Messages, config: TextConfig, row: Row | None = None) -> Messages:
    """Return the chat after a system message, unless it begins with its own.

    The system message is that of the row's column `system`, or else the configured one.
    """
    own = None if row is None or "system" in config.template_columns else row.columns.get("system")
    system = own if isinstance(own, str) and own.strip() else config.system
    if system is None or messages[0]["role"] in ("system", "developer"):
        return messages
    return [{"role": "system", "content": system}, *messages]


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
