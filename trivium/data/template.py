"""Rendering of messages by the tokenizer's chat template.

A template is a program of the checkpoint's author. It may leave out parts of a chat, read the
clock, and know or not know tools. Here it gets everything that a row and the configuration give
it, the clock stands still, and what it leaves out is found. Tokens are in ``chat``.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Any

from trivium.data.messages import nearest
from trivium.data.template_limits import TemplateLimitError, limited_templates
from trivium.errors import ConfigurationError, DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("trivium")

Messages = list[dict[str, Any]]
"""A chat: each message has text under `role` and `content`."""
Tools = list[dict[str, Any]]
"""JSON schemas of the functions that a chat may call."""

_THOUGHTS = ("<think>", "</think>")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of a message's reasoning; `transformers` passes each as `reasoning_content`."""
_CLOCK = "strftime_now"


# --- the clock ------------------------------------------------------------------------------------


class _StoppedClock(datetime):
    """Stand-in for `datetime` in the library that renders templates."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return template_time()


_time: datetime | None = None
_told = False


def template_time() -> datetime:
    """Return the time that templates see: that of the run's start, or of the first rendering."""
    global _time
    if _time is None:
        _time = datetime.now().astimezone().replace(microsecond=0)
    return _time


def set_template_time(time: datetime | None) -> None:
    """Set the time that templates see; None takes that of the next rendering."""
    global _time, _told
    _time, _told = time, False


@contextmanager
def _stopped_clock(library: Any) -> Iterator[None]:
    """Make `strftime_now` read `template_time`: the library has no argument for its clock."""
    global _told
    if not _told:
        _told = True
        logger.info(
            "the chat template writes the time: every chat of a run has %s", template_time()
        )
    clock = library.datetime
    library.datetime = _StoppedClock
    try:
        yield
    finally:
        library.datetime = clock


# --- rendering ------------------------------------------------------------------------------------


class ChatTemplate:
    """The chat template of a tokenizer, with arguments of the configuration.

    Args:
        tokenizer: tokenizer with the template; one without a template renders no messages.
        arguments: variables for the template, such as ``enable_thinking``.

    Raises:
        ConfigurationError: the template reads none of the names of an argument.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._has_read_tools = False
        source = tokenizer.chat_template
        self.source = "\n".join(source.values()) if isinstance(source, dict) else source or ""
        for name in self.arguments:
            self._require_variable(name)

    def _require_variable(self, name: str) -> None:
        words = set(re.findall(r"[A-Za-z_]\w*", self.source))
        if name in words:
            return
        near = nearest(name, words)
        has = f"does not read it{f' (did you mean {near}?)' if near else ''}"
        raise ConfigurationError(
            f"template_arguments sets {name}, and the chat template of {self._owner} "
            f"{has if self.source else 'is missing'}: remove it, or correct its name"
        )

    @property
    def _owner(self) -> str:
        return self.tokenizer.name_or_path or "the model"

    @property
    def reads_clock(self) -> bool:
        """Whether the template writes a time."""
        return _CLOCK in self.source

    def render(
        self, messages: Messages, *, tools: Tools | None = None, open_turn: bool = False
    ) -> str:
        """Return the messages as text.

        With `open_turn`, the text ends with the beginning of an assistant turn. A template that
        cannot take the arguments of a tool call as an object gets them as JSON text. Raises
        ModelError if the tokenizer has no template, DataError if the template rejects the messages
        or does not read the tools.
        """
        if self.tokenizer.chat_template is None:
            raise ModelError(
                f"the tokenizer of {self._owner} has no chat template, and the data contains "
                "messages; use a chat model, put the model's chat_template.jinja next to its "
                "tokenizer, or write the data as plain text (see `template`)"
            )
        text = self._render_calls(messages, tools, open_turn)
        if tools and not self._has_read_tools:
            if self._render_calls(messages, None, open_turn) == text:
                raise DataError(
                    f"the chat template of {self._owner} does not read tools, so the model would "
                    "not see column `tools`; use a model whose template does, or rename the "
                    "column to leave it out"
                )
            self._has_read_tools = True
        return text

    def _render_calls(self, messages: Messages, tools: Tools | None, open_turn: bool) -> str:
        as_text = [_with_json_arguments(message) for message in messages]
        if as_text == messages:
            return self._apply(messages, tools, open_turn)
        try:
            text = self._apply(messages, tools, open_turn)
        except DataError:
            return self._apply(as_text, tools, open_turn)
        in_python = any(repr(a) in text for a in _call_arguments(messages) if a)
        return self._apply(as_text, tools, open_turn) if in_python else text

    def _apply(self, messages: Messages, tools: Tools | None, open_turn: bool) -> str:
        try:
            with (
                limited_templates() as library,
                _stopped_clock(library) if self.reads_clock else nullcontext(),
            ):
                text = self.tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=open_turn,
                    **self.arguments,
                )
        except TemplateLimitError as error:
            raise ModelError(
                f"the chat template of {self._owner} {error}: a template writes a chat and needs "
                "a fraction of that; take it from a source you trust"
            ) from None
        except Exception as error:  # A template can raise anything that Python code can.
            reason = str(error).strip() or type(error).__name__
            raise DataError(f"the chat template rejects these messages: {reason}") from None
        return str(text)


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, open_turn: bool = False) -> str:
    """Return the messages as text, without tools or arguments; see `ChatTemplate.render`."""
    return ChatTemplate(tokenizer).render(messages, open_turn=open_turn)


def _call_arguments(messages: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Yield the arguments of every tool call that are an object."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            arguments = _function_of(call).get("arguments")
            if isinstance(arguments, dict):
                yield arguments


def _function_of(call: Any) -> Mapping[str, Any]:
    """Return the object with the name and arguments of a tool call or of a tool."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function if isinstance(function, dict) else {}


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with the arguments of its tool calls as JSON text."""
    if not any(True for _ in _call_arguments([message])):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function_of(call)
        if isinstance(function.get("arguments"), dict):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            function = {**function, "arguments": text}
            call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return {**message, "tool_calls": calls}


# --- what a template leaves out -------------------------------------------------------------------


def omissions(messages: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """Return what the rendered chat leaves out or changes of its messages, each kind once.

    Texts are compared without white space at their ends. A message is searched for behind the one
    before it, but for a system message, which a template may move. Short texts can be found where
    they are not meant, so an omission may go unnoticed, but what is returned is missing.
    """
    found: dict[str, None] = {}
    at = 0
    for message in messages:
        role = str(message["role"])
        can_move = role in ("system", "developer")
        kinds, end = _missing_parts(message, text, 0 if can_move else at)
        found |= dict.fromkeys(kind.format(f"{role} messages") for kind in kinds)
        at = at if can_move else end
    return list(found)


def _missing_parts(message: Mapping[str, Any], text: str, begin: int) -> tuple[list[str], int]:
    """Return what `text` lacks of a message from `begin` on, and where the message's text ends."""
    missing = []
    reasoning = str(next((message[key] for key in _REASONING if message.get(key)), "")).strip()
    content = str(message.get("content") or "").strip()
    after = text.find(reasoning, begin) + len(reasoning)
    if reasoning and (after < len(reasoning) or content not in text[after:]):
        missing.append("the reasoning of {}")
        after = begin
    start = text.find(content, max(after, begin))
    if start < 0:
        thoughts, separator, content = content.rpartition(_THOUGHTS[1])
        content = content.strip()
        start = text.find(content, begin) if separator else -1
        inner = thoughts.rpartition(_THOUGHTS[0])[2].strip()
        if start < 0:
            missing.append("the text of {}")
        elif inner not in text[begin:start]:
            missing.append(f"the thoughts of {{}}, up to {_THOUGHTS[1]}")
    if not all(_is_written(call, text[begin:]) for call in message.get("tool_calls") or ()):
        missing.append("tool calls of {}")
    return missing, start + len(content) if start >= 0 else begin


def _is_written(call: Any, text: str) -> bool:
    """Whether the name and every text in the arguments of a tool call are in the rendered text."""
    function = _function_of(call)
    values = [function.get("name"), *_texts_in(function.get("arguments"))]
    return all(
        any(form in text for form in (value, _escaped(value, False), _escaped(value, True)))
        for value in values
        if isinstance(value, str)
    )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(entry)


def _escaped(text: str, ensure_ascii: bool) -> str:
    return json.dumps(text, ensure_ascii=ensure_ascii)[1:-1]
