"""Job of a sandboxed process: run a program, serve calls to it, or run tests against it.

``serve_program`` holds the program and never sees a test. ``run_tests`` holds the tests and never
runs a line of the program: its calls go over a channel to the other process, and only plain values
come back. So nothing that the program can reach knows, or decides, whether the program is correct.
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

_NO_VERDICT = 3  # exit status of tests that stopped before their end
_TESTS, _NUMBER = " tests", " number"  # not valid as attribute names


class Channel:
    """Channel to another process: one JSON message per line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._read = descriptor, b""

    def send(self, message: Any) -> None:
        """Send one message."""
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def receive(self) -> Any:
        """Return the next message; raise EOFError if the other side has closed the channel."""
        parts = [self._read]
        while b"\n" not in parts[-1]:
            parts.append(os.read(self._descriptor, 1 << 16))
            if not parts[-1]:
                raise EOFError
        line, _, self._read = b"".join(parts).partition(b"\n")
        return json.loads(line)


def _new_module(name: str) -> dict[str, Any]:
    """Register a new module under `name` and return its namespace."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return vars(module)


def run(source: str) -> int:
    """Run a program as a script, wait for its threads, and return its exit status."""
    status = 0
    try:
        exec(compile(source, "program.py", "exec"), _new_module("__main__"))
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


# --- The program's side --------------------------------------------------------------------------


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
        self._names = _new_module("program")
        self._objects: list[Any] = []
        exec(compile(source, "program.py", "exec"), self._names)

    def _reference_to(self, value: Any) -> Any:
        if isinstance(value, types.ModuleType):
            return {"module": value.__name__}
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
            return {"error": type(error).__name__, "text": str(error)[:200]}

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


# --- The tests' side -----------------------------------------------------------------------------


class _TestCodeError(BaseException):
    """The test code passes a value that cannot be sent; the tests are at fault."""


class _WrongAnswer(BaseException):
    """The program gave an invalid answer; ``except Exception`` in a test does not catch this."""


def _refuse_comparison(self: Any, other: Any = None) -> Any:
    raise _WrongAnswer("a test compares an object of the program's own class or uses its truth")


class _Remote:
    """Proxy of an object in the program's process; the program executes its operations.

    Comparison and truth value are refused, because the program could forge them.
    """

    def __init__(self, tests: _TestSession, number: int) -> None:
        self.__dict__.update({_TESTS: tests, _NUMBER: number})

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__dict__[_TESTS].request(self, "call", arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__dict__[_TESTS].request(self, "getattr", (name,), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[_TESTS].request(self, "setattr", (name, value), {})

    def __iter__(self) -> Any:
        return self.__dict__[_TESTS].request(self, "iter", (), {})

    def __next__(self) -> Any:
        return self.__dict__[_TESTS].request(self, "next", (), {}, is_next=True)

    def __len__(self) -> int:
        return self.__dict__[_TESTS].request(self, "len", (), {})

    def __str__(self) -> str:
        return self.__dict__[_TESTS].request(self, "str", (), {})

    def __repr__(self) -> str:
        return self.__dict__[_TESTS].request(self, "repr", (), {})

    def __getitem__(self, key: Any) -> Any:
        return self.__dict__[_TESTS].request(self, "getitem", (key,), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__dict__[_TESTS].request(self, "setitem", (key, value), {})

    def __contains__(self, key: Any) -> bool:
        return self.__dict__[_TESTS].request(self, "contains", (key,), {})

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse_comparison
    __hash__ = None  # pyright: ignore[reportAssignmentType]


class _TestSession:
    """Connection of test code to the program."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        self._channel.send({"request": request})
        try:
            reply = self._channel.receive()
        except EOFError:  # the program has ended; a test must not see this as an expected error
            os._exit(_NO_VERDICT)
        if not isinstance(reply, dict):
            raise _WrongAnswer("the program's process gave no answer")
        return reply

    def find(self, name: str) -> tuple[bool, Any]:
        """Return whether the program defines a name, and its value.

        A module is imported in this process, because the program may have changed its copy.
        """
        reply = self._exchange({"name": name})
        match reply.get("value"):
            case {"reference": {"module": str(module)}}:
                return True, _import_stdlib(module)
            case value:
                return "value" in reply, self._decode(value)

    def request(
        self,
        remote: _Remote,
        operation: str,
        arguments: Any,
        keywords: dict[str, Any],
        is_next: bool = False,
    ) -> Any:
        """Execute an operation in the program; return its value or raise its error.

        In-place changes of lists, sets and dicts are copied back. A StopIteration is accepted only
        for ``next`` (`is_next`); elsewhere it could end a loop of the tests before its last
        comparison.
        """
        request = {
            "object": remote.__dict__[_NUMBER],
            "operation": operation,
            "arguments": [self._encode(argument) for argument in arguments],
            "keywords": {name: self._encode(value) for name, value in keywords.items()},
        }
        reply = self._exchange(request)
        if "error" in reply:
            raise _to_exception(reply, is_next)
        if "value" not in reply:
            raise _WrongAnswer("the program's process gave no answer")
        if isinstance(reply.get("arguments"), list):
            for argument, encoded in zip(arguments, reply["arguments"], strict=True):
                _copy_content(argument, self._decode(encoded))
        return self._decode(reply["value"])

    def _encode(self, value: Any) -> Any:
        return encode(value, _reference_to)

    def _decode(self, encoded: Any) -> Any:
        return decode(encoded, self._resolve)

    def _resolve(self, reference: Any) -> Any:
        if type(reference) is not int:
            raise _WrongAnswer("the program gave a module for a value")
        return _Remote(self, reference)


def _import_stdlib(module: str) -> types.ModuleType:
    if module.partition(".")[0] not in sys.stdlib_module_names:
        raise _WrongAnswer(f"the tests use the program's module {module!r}")
    return importlib.import_module(module)


def _reference_to(value: Any) -> Any:
    if type(value) is _Remote:
        return value.__dict__[_NUMBER]
    name = getattr(value, "__name__", None)
    if isinstance(name, str) and getattr(builtins, name, None) is value:
        return {"builtin": name}
    raise _TestCodeError(f"a test passes the program {type(value).__name__} {value!r:.80}")


def _to_exception(reply: dict[str, Any], is_next: bool) -> BaseException:
    name, text = str(reply["error"]), str(reply.get("text"))
    if name == "StopIteration" and is_next:
        return StopIteration()
    error_class: Any = getattr(builtins, name, None)
    if not isinstance(error_class, type) or not issubclass(error_class, Exception):
        return _WrongAnswer(f"{name}: {text}")
    if issubclass(error_class, StopIteration | StopAsyncIteration | UnicodeError):
        return _WrongAnswer(f"{name}: {text}")
    return error_class(text)


def _copy_content(argument: Any, value: Any) -> None:
    """Copy the program's changes of an argument into the container of the tests."""
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


_NAMING_NODES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)


def _undefined_names(tree: ast.AST, entry_point: str | None) -> list[str]:
    """Return the names that test code uses but does not define, in order."""
    used: dict[str, None] = {entry_point: None} if entry_point else {}
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used[node.id] = None
            else:
                defined.add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, _NAMING_NODES):
            defined.add(str(node.name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined.update((a.asname or a.name).partition(".")[0] for a in node.names)
    return [n for n in used if n == entry_point or not (n in defined or hasattr(builtins, n))]


def run_tests(tests: str, entry_point: str | None, channel: Channel) -> int:
    """Run test code against the program at the other end of the channel; send the verdict."""
    names = _new_module("tests")
    try:
        tree = ast.parse(tests)
        code = compile(tree, "tests.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        channel.send({"test_error": f"{type(error).__name__}: {error}"})
        return _NO_VERDICT
    session = _TestSession(channel)
    try:
        for name in _undefined_names(tree, entry_point):
            exists, value = session.find(name)
            if exists:
                names[name] = value
        exec(code, names)
    except _TestCodeError as error:
        channel.send({"test_error": str(error)})
        return _NO_VERDICT
    except BaseException as error:
        channel.send({"passed": False, "failure": f"{type(error).__name__}: {error}"[:200]})
        return 0
    channel.send({"passed": True})
    return 0
