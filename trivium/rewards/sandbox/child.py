"""Job of a sandboxed process that holds a program: run it, or serve calls to it.

``serve_program`` never sees a test. The tests are in another process (``checker``), which never
runs a line of the program: its calls go over a channel to this process, and only plain values go
back. So nothing that the program can reach knows, or decides, whether the program is correct.
"""

from __future__ import annotations

import builtins
import json
import operator
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from .channel import Channel
from .codec import decode, encode


def new_module(name: str) -> dict[str, Any]:
    """Register a new module under `name` and return its namespace."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return vars(module)


def run(source: str) -> int:
    """Run a program as a script, wait for its threads, and return its exit status."""
    status = 0
    try:
        exec(compile(source, "program.py", "exec"), new_module("__main__"))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    _wait_and_flush()
    return status & 0xFF


def _wait_and_flush() -> None:
    """Wait for threads and flush the streams, as an interpreter does at exit."""
    shutdown: Callable[[], None] | None = getattr(threading, "_shutdown", None)
    if shutdown is not None:
        shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


# --- Serving calls -------------------------------------------------------------------------------

_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{
        operation.__name__: operation
        for operation in (getattr, setattr, iter, next, len, str, repr)
    },
    **{
        operation.__name__: operation
        for operation in (operator.getitem, operator.setitem, operator.contains)
    },
}


class _Program:
    """A program whose functions another process can call; its objects stay in this process."""

    def __init__(self, source: str) -> None:
        self._names = new_module("program")
        self._objects: list[Any] = []
        exec(compile(source, "program.py", "exec"), self._names)

    def _reference_to(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        if isinstance(value, type) and issubclass(value, Exception):
            return {"exception": [kind.__name__ for kind in value.__mro__]}
        self._objects.append(value)
        return len(self._objects) - 1

    def _encode(self, value: Any) -> Any:
        return encode(value, self._reference_to)

    def _decode(self, encoded: Any) -> Any:
        return decode(encoded, self._resolve)

    def _resolve(self, reference: Any) -> Any:
        if isinstance(reference, int):
            return self._objects[reference]
        return getattr(builtins, reference["builtin"])

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to one request: a value, an error, or a missing name."""
        try:
            if "name" in request:
                if request["name"] not in self._names:
                    return {"missing": True}
                return {"value": self._encode(self._names[request["name"]])}
            return self._call(request)
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            return {"error": kinds, "text": str(error)[:200]}

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self._objects[request["object"]]
        before = json.dumps(request["arguments"])
        arguments = [self._decode(argument) for argument in request["arguments"]]
        keywords = {name: self._decode(encoded) for name, encoded in request["keywords"].items()}
        if request["operation"] == "call":
            value = self._encode(target(*arguments, **keywords))
        else:
            value = self._encode(_OPERATIONS[request["operation"]](target, *arguments))
        after = [self._encode(argument) for argument in arguments]
        changed = json.dumps(after) != before
        return {"value": value, "arguments": after} if changed else {"value": value}


def serve_program(source: str, channel: Channel) -> int:
    """Run a program's definitions, then serve calls to them until the other side closes."""
    try:
        program = _Program(source)
    except BaseException:
        traceback.print_exc()
        _wait_and_flush()
        return 1
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return 0
        channel.send(program.reply(request))
