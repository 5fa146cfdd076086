"""What a sealed process does: run a program, answer calls to it, or put tests to one.

``answer`` holds the program and never sees a test; ``ask`` holds the tests and never runs a line of
the program: its calls travel over a channel to the other process, and only plain values come back.
So there is nothing in the program's reach that knows, or decides, whether it is right.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import operator
import os
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable
from typing import Any

from .codec import decode, encode

_UNDECIDED = 3  # the exit status of tests that stopped before their end
_TESTS, _NUMBER = " tests", " number"  # no attribute can be called so


class Channel:
    """Lines of JSON to and from the other side."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read = descriptor, b""

    def send(self, message: Any) -> None:
        """Write one message."""
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def receive(self) -> Any:
        """Return the next message; raises EOFError where the other side has gone."""
        parts = [self._read]
        while b"\n" not in parts[-1]:
            parts.append(os.read(self._descriptor, 1 << 16))
            if not parts[-1]:
                raise EOFError
        line, _, self._read = b"".join(parts).partition(b"\n")
        return json.loads(line)


def _module(name: str) -> dict[str, Any]:
    """Return the namespace of a new module, in which a program finds itself by its name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return vars(module)


def run(source: str) -> int:
    """Run a program as a script and return its exit status; its threads are waited for."""
    status = 0
    try:
        exec(compile(source, "program.py", "exec"), _module("__main__"))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    _finish()
    return status & 0xFF


def _finish() -> None:
    """Do what an interpreter does at its end: wait for threads, write what is still held back."""
    shutdown: Callable[[], None] | None = getattr(threading, "_shutdown", None)
    if shutdown is not None:
        shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


# --- The program's side --------------------------------------------------------------------------


_DEEDS: dict[str, Callable[..., Any]] = {
    **{deed.__name__: deed for deed in (getattr, setattr, iter, next, len, str, repr)},
    **{deed.__name__: deed for deed in (operator.getitem, operator.setitem, operator.contains)},
}


class _Program:
    """A program whose functions can be called from outside, and whose objects stay here."""

    def __init__(self, source: str) -> None:
        self._names = _module("program")
        self._objects: list[Any] = []
        exec(compile(source, "program.py", "exec"), self._names)

    def _refer(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
        self._objects.append(value)
        return len(self._objects) - 1

    def _encode(self, value: Any) -> Any:
        return encode(value, self._refer)

    def _decode(self, code: Any) -> Any:
        return decode(code, self._resolve)

    def _resolve(self, reference: Any) -> Any:
        if isinstance(reference, int):
            return self._objects[reference]
        return getattr(builtins, reference["builtin"])

    def reply(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one question: a value, an error, or that there is no such name."""
        try:
            if "name" in asked:
                if asked["name"] not in self._names:
                    return {"missing": True}
                return {"value": self._encode(self._names[asked["name"]])}
            return self._call(asked)
        except Exception as error:
            return {"error": type(error).__name__, "text": str(error)[:200]}

    def _call(self, asked: dict[str, Any]) -> dict[str, Any]:
        target = self._objects[asked["of"]]
        before = json.dumps(asked["arguments"])
        arguments = [self._decode(argument) for argument in asked["arguments"]]
        named = {name: self._decode(code) for name, code in asked["named"].items()}
        if asked["do"] == "call":
            value = self._encode(target(*arguments, **named))
        else:
            value = self._encode(_DEEDS[asked["do"]](target, *arguments))
        after = [self._encode(argument) for argument in arguments]
        changed = json.dumps(after) != before
        return {"value": value, "arguments": after} if changed else {"value": value}


def answer(source: str, channel: Channel) -> int:
    """Run a program's definitions, then answer calls to them until the other side closes."""
    try:
        program = _Program(source)
    except BaseException:
        traceback.print_exc()
        _finish()
        return 1
    while True:
        try:
            asked = channel.receive()
        except EOFError:
            return 0
        channel.send(program.reply(asked))


# --- The tests' side -----------------------------------------------------------------------------


class _Unfit(BaseException):
    """The tests ask for what cannot be carried to the program: the tests' fault, not its."""


class _Wrong(BaseException):
    """The program gave what is no answer; no ``except Exception`` of a test's hides it."""


def _uncomparable(self: Any, other: Any = None) -> Any:
    raise _Wrong("an object of the program's own class is compared or asked for its truth")


class _Remote:
    """An object that stays in the program's process. What it is asked, the program answers.

    It cannot be compared or be true: those answers would be the program's verdict on itself.
    """

    def __init__(self, tests: _Tests, number: int) -> None:
        self.__dict__.update({_TESTS: tests, _NUMBER: number})

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__dict__[_TESTS].ask(self, "call", arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__[_TESTS].ask(self, "getattr", (name,), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[_TESTS].ask(self, "setattr", (name, value), {})

    def __iter__(self) -> Any:
        return self.__dict__[_TESTS].ask(self, "iter", (), {})

    def __next__(self) -> Any:
        return self.__dict__[_TESTS].ask(self, "next", (), {}, ends=True)

    def __len__(self) -> int:
        return self.__dict__[_TESTS].ask(self, "len", (), {})

    def __str__(self) -> str:
        return self.__dict__[_TESTS].ask(self, "str", (), {})

    def __repr__(self) -> str:
        return self.__dict__[_TESTS].ask(self, "repr", (), {})

    def __getitem__(self, key: Any) -> Any:
        return self.__dict__[_TESTS].ask(self, "getitem", (key,), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__[_TESTS].ask(self, "setitem", (key, value), {})

    def __contains__(self, key: Any) -> bool:
        return self.__dict__[_TESTS].ask(self, "contains", (key,), {})

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _uncomparable
    __hash__ = None  # pyright: ignore[reportAssignmentType]


class _Tests:
    """Test code, and its line to the program."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def _exchange(self, question: dict[str, Any]) -> dict[str, Any]:
        self._channel.send({"ask": question})
        try:
            reply = self._channel.receive()
        except EOFError:  # the program has ended; a test that expects an error must not take it so
            os._exit(_UNDECIDED)
        if not isinstance(reply, dict):
            raise _Wrong("the program's process gave no answer")
        return reply

    def find(self, name: str) -> tuple[bool, Any]:
        """Return whether the program has a name, and its value.

        A module is imported here, not taken from the program, which may have changed it.
        """
        reply = self._exchange({"name": name})
        match reply.get("value"):
            case {"reference": {"module": str(module)}}:
                return True, _standard(module)
            case value:
                return "value" in reply, self._decode(value)

    def ask(
        self, of: _Remote, do: str, arguments: Any, named: dict[str, Any], ends: bool = False
    ) -> Any:
        """Return what the program answers, or raise what it raised.

        Lists, sets and dicts that it changed in place are changed here. That an iterator has come
        to its end is believed only where an iterator is asked (`ends`): elsewhere a StopIteration
        of the program's would end a loop of the tests' before its last comparison.
        """
        question = {
            "of": of.__dict__[_NUMBER],
            "do": do,
            "arguments": [self._encode(argument) for argument in arguments],
            "named": {name: self._encode(value) for name, value in named.items()},
        }
        reply = self._exchange(question)
        if "error" in reply:
            raise _raised(reply, ends)
        if "value" not in reply:
            raise _Wrong("the program's process gave no answer")
        if isinstance(reply.get("arguments"), list):
            for argument, code in zip(arguments, reply["arguments"], strict=True):
                _change(argument, self._decode(code))
        return self._decode(reply["value"])

    def _encode(self, value: Any) -> Any:
        return encode(value, _refer)

    def _decode(self, code: Any) -> Any:
        return decode(code, self._resolve)

    def _resolve(self, reference: Any) -> Any:
        if type(reference) is not int:
            raise _Wrong("the program gave a module for a value")
        return _Remote(self, reference)


def _standard(module: str) -> types.ModuleType:
    if module.partition(".")[0] not in sys.stdlib_module_names:
        raise _Wrong(f"the tests use the program's module {module!r}")
    return importlib.import_module(module)


def _refer(value: Any) -> Any:
    if type(value) is _Remote:
        return value.__dict__[_NUMBER]
    name = getattr(value, "__name__", None)
    if isinstance(name, str) and getattr(builtins, name, None) is value:
        return {"builtin": name}
    raise _Unfit(f"a test gives the program {type(value).__name__} {value!r:.80}")


def _raised(reply: dict[str, Any], ends: bool) -> BaseException:
    name, text = str(reply["error"]), str(reply.get("text"))
    if name == "StopIteration" and ends:
        return StopIteration()
    kind: Any = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return _Wrong(f"{name}: {text}")
    if issubclass(kind, StopIteration | StopAsyncIteration | UnicodeError):
        return _Wrong(f"{name}: {text}")
    return kind(text)


def _change(argument: Any, value: Any) -> None:
    """Give a container of the tests' the content that the program left in its copy."""
    if type(argument) is not type(value):
        return
    if isinstance(argument, list | bytearray):
        argument[:] = value
    elif isinstance(argument, set | dict):
        argument.clear()
        argument.update(value)
    elif isinstance(argument, deque):
        argument.clear()
        argument.extend(value)


_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)


def _asked_of_program(tree: ast.AST, also: str | None) -> list[str]:
    """Return the names that test code uses without defining them, in order."""
    used: dict[str, None] = {also: None} if also else {}
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used[node.id] = None
            else:
                defined.add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, _NAMED):
            defined.add(str(node.name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined.update((a.asname or a.name).partition(".")[0] for a in node.names)
    return [n for n in used if n == also or not (n in defined or hasattr(builtins, n))]


def ask(tests: str, entry_point: str | None, channel: Channel) -> int:
    """Run test code against the program at the other end, and send the verdict."""
    names = _module("tests")
    try:
        tree = ast.parse(tests)
        code = compile(tree, "tests.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        channel.send({"unfit": f"{type(error).__name__}: {error}"})
        return _UNDECIDED
    line = _Tests(channel)
    try:
        for name in _asked_of_program(tree, entry_point):
            has, value = line.find(name)
            if has:
                names[name] = value
        exec(code, names)
    except _Unfit as error:
        channel.send({"unfit": str(error)})
        return _UNDECIDED
    except BaseException as error:
        channel.send({"passed": False, "why": f"{type(error).__name__}: {error}"[:200]})
        return 0
    channel.send({"passed": True})
    return 0
