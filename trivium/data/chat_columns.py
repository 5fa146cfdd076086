"""Columns that hold chats, in the forms that data sets and file formats give them.

The same chat reads the same from JSON lines, Parquet and a saved dataset: Arrow gives every object
the keys of all objects, with nulls, so a null is a key that is not there. Chats may be JSON in
text, and messages may have the keys of ShareGPT. What is ambiguous is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from trivium.data.messages import checked_text, shortened
from trivium.data.template import Messages, Tools
from trivium.errors import DataError

Remark = Callable[[str], None]
"""Counts a remark about the current row."""

CHAT_COLUMNS = ("prompt", "completion", "messages", "chosen", "rejected")
"""Columns that may hold messages."""
SHAREGPT = "conversations"
"""The column of ShareGPT's chats."""
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
"""The role of a message by its `from` in ShareGPT's form, but for tool calls."""
_CALL = "function_call"
_OTHER_NAMES = {"human": "user", "ai": "assistant", "bot": "assistant", "gpt": "assistant"}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_chats(columns: dict[str, Any], remark: Remark) -> dict[str, Any]:
    """Return the columns with their chats as lists of messages with `role` and `content`.

    ShareGPT's `conversations` becomes `messages`, or `prompt` beside `chosen` and `rejected`.
    Raises DataError for a message whose meaning is unknown.
    """
    columns = dict(columns)
    present = {name for name, value in columns.items() if value is not None}
    if SHAREGPT in present and not present & {"messages", "prompt"}:
        is_prompt = {"chosen", "rejected"} <= present
        chat = _parsed(columns[SHAREGPT])
        if not _is_chat(chat):
            raise DataError(
                f"column `{SHAREGPT}` is {shortened(columns[SHAREGPT])}, not a list of messages"
            )
        columns["prompt" if is_prompt else "messages"] = chat
    for name in CHAT_COLUMNS:
        value = columns.get(name)
        chat = [value] if isinstance(value, dict) else _parsed(value)
        if not _is_chat(chat):
            continue
        if isinstance(value, str):
            remark(f"`{name}` is JSON text of messages, and is read as these messages")
        columns[name] = [
            _read_message(message, f"message {number} of column `{name}`", remark)
            for number, message in enumerate(chat, 1)
        ]
    return columns


def checked_messages(value: Any, label: str) -> Messages:
    """Return the messages in `value` without null entries.

    Raises DataError, which calls the value `label`, if it is not a list of messages.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{label} is {shortened(value)}, not messages; write a list such as "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        )
    return [
        _checked_message(message, f"message {number} of {label}")
        for number, message in enumerate(value, 1)
    ]


def checked_tools(value: Any) -> Tools | None:
    """Return the tools in a row's column `tools`; None for an empty list.

    The column is a list of JSON schemas, or JSON text of the list or of each schema. Raises
    DataError for anything else.
    """
    tools = _json(value) if isinstance(value, str) else without_nulls(value)
    if isinstance(tools, list):
        tools = [_json(tool) if isinstance(tool, str) else tool for tool in tools]
    if not isinstance(tools, list) or not all(_tool_name(tool) for tool in tools):
        raise DataError(
            f"column `tools` is {shortened(value)}, not a list of JSON schemas, each with a name, "
            'such as [{"type": "function", "function": {"name": "add", "parameters": {...}}}]; '
            "rename the column if it holds something else"
        )
    return tools or None


def without_nulls(value: Any) -> Any:
    """Return the value without the keys of objects, at any depth, whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _checked_message(value: Any, label: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{label} is {shortened(value)}, not an object with `role` and `content`")
    message = {key: entry for key, entry in value.items() if entry is not None}
    calls_tools = bool(message.get("tool_calls"))
    for key in ("role",) if calls_tools and "content" not in message else ("role", "content"):
        if key not in message:
            keys = ", ".join(map(str, message)) or "nothing"
            raise DataError(f"{label} has no `{key}`; it has {keys}. Write `role` and `content`")
        checked_text(message[key], f"`{key}` of {label}")
    role = message["role"]
    meant = _OTHER_NAMES.get(role.lower(), role.lower())
    if role != meant and meant in _KNOWN_ROLES:
        raise DataError(
            f"`role` of {label} is {role!r}, which templates do not know; write {meant}"
        )
    if message.get("weight", 1) not in (0, 1):
        raise DataError(
            f"`weight` of {label} is {shortened(message['weight'])}; write 1 to train on the "
            "message, or 0 to only read it"
        )
    return message


# --- one message ----------------------------------------------------------------------------------


def _is_chat(value: Any) -> bool:
    """Whether the value is a list of objects that are meant as messages."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return _is_sharegpt(value) or ("role" in value and bool({"content", "tool_calls"} & set(value)))


def _is_sharegpt(message: dict[str, Any]) -> bool:
    return message.get("role") is None and "from" in message and "value" in message


def _read_message(message: dict[str, Any], label: str, remark: Remark) -> dict[str, Any]:
    """Return a message with `role` and `content`, and its tool calls as objects."""
    calls = message.get("tool_calls")
    arguments = map(_arguments, calls if isinstance(calls, list) else ())
    if any(without_nulls(entry) != entry for entry in arguments):
        remark(
            "nulls in the arguments of tool calls are left out, because Parquet and saved datasets "
            "add them (arguments as JSON text keep theirs)"
        )
    message = without_nulls(message)
    if _is_sharegpt(message):
        message = _from_sharegpt(message, label)
    calls = _parsed(message.get("tool_calls"))
    if isinstance(calls, list):
        message = {key: entry for key, entry in message.items() if key != "tool_calls"}
        if calls:
            message["tool_calls"] = [_read_call(_parsed(call)) for call in calls]
    if isinstance(message.get("content"), list):
        message["content"] = _text_of_parts(message["content"], label)
    return message


def _arguments(call: Any) -> Any:
    function = call.get("function") or call if isinstance(call, dict) else {}
    return function.get("arguments") if isinstance(function, dict) else None


def _text_of_parts(parts: list[Any], label: str) -> str:
    """Return the text of content that is a list of one part."""
    kinds = [part.get("type") if isinstance(part, dict) else shortened(part) for part in parts]
    if kinds == ["text"]:
        return checked_text(parts[0].get("text"), f"the text of {label}")
    raise DataError(
        f"`content` of {label} has the parts {', '.join(map(str, kinds)) or '(none)'}; write one "
        "text (images, audio and several parts are not supported)"
    )


def _from_sharegpt(message: dict[str, Any], label: str) -> dict[str, Any]:
    sender, value = message["from"], message["value"]
    others = {key: entry for key, entry in message.items() if key not in ("from", "value")}
    if sender in _ROLES:
        return {**others, "role": _ROLES[sender], "content": value}
    call = _parsed(value)
    if sender == _CALL and isinstance(call, dict) and "name" in call:
        calls = [{"type": "function", "function": call}]
        return {**others, "role": "assistant", "content": "", "tool_calls": calls}
    known = ", ".join([*_ROLES, f"{_CALL} (with JSON of a name and arguments)"])
    raise DataError(
        f"{label} is from {shortened(sender)}, and known are {known}; write `role` and `content`"
    )


def _read_call(call: Any) -> Any:
    """Return a tool call with its arguments as an object, where they are JSON text of one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _read_call(call["function"])}
    arguments = _parsed(call.get("arguments"))
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _tool_name(tool: Any) -> Any:
    function = tool.get("function") or tool if isinstance(tool, dict) else {}
    return function.get("name") if isinstance(function, dict) else None


def _json(text: str) -> Any:
    """Return the value of JSON text; the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _parsed(value: Any) -> Any:
    """Return the object or list that JSON text holds; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    parsed = _json(value)
    return parsed if isinstance(parsed, dict | list) else value
