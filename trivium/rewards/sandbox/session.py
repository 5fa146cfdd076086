"""Connection of test code to a program in another process.

Nothing here runs a line of the program. Operations on its objects go over a channel to its process,
and only plain values come back. A comparison with an object of the program's own class, or its
truth value, is an error, because the program could forge it.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
import types
from collections import deque
from typing import Any

from .channel import Channel
from .codec import decode, encode

NO_VERDICT = 3  # exit status of tests that stopped before their end
_TESTS, _NUMBER = " tests", " number"  # not valid as attribute names
_CONTROL_FLOW = (StopIteration, StopAsyncIteration, UnicodeError)


class TestCodeError(BaseException):
    """The test code itself cannot be run; the tests are at fault."""


class WrongAnswer(BaseException):
    """The program gave an invalid answer; ``except Exception`` in a test does not catch this."""


def _refuse_comparison(self: Any, other: Any = None) -> Any:
    raise WrongAnswer("a test compares an object of the program's own class or uses its truth")


class _Remote:
    """Proxy of an object in the program's process; the program executes its operations.

    Comparison and truth value are refused, because the program could forge them.
    """

    def __init__(self, tests: TestSession, number: int) -> None:
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


class TestSession:
    """Connection of test code to the program.

    Attributes:
        test_error: why the test code cannot be run, also if the test code caught the error.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._exceptions: dict[str, type[Exception]] = {}
        self.test_error: str | None = None

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        self._channel.send({"request": request})
        try:
            reply = self._channel.receive()
        except EOFError:  # the program has ended; a test must not see this as an expected error
            os._exit(NO_VERDICT)
        if not isinstance(reply, dict):
            raise WrongAnswer("the program's process gave no answer")
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
            "arguments": [self.encode(argument) for argument in arguments],
            "keywords": {name: self.encode(value) for name, value in keywords.items()},
        }
        reply = self._exchange(request)
        if "error" in reply:
            raise self._to_exception(reply, is_next)
        if "value" not in reply:
            raise WrongAnswer("the program's process gave no answer")
        if isinstance(reply.get("arguments"), list):
            for argument, encoded in zip(arguments, reply["arguments"], strict=True):
                _copy_content(argument, self._decode(encoded))
        return self._decode(reply["value"])

    def refuse(self, reason: str) -> TestCodeError:
        """Return the error for test code that cannot be run, and remember its reason."""
        self.test_error = self.test_error or reason
        return TestCodeError(reason)

    def encode(self, value: Any) -> Any:
        """Encode an argument of a call; raise TestCodeError if it cannot be sent."""
        return encode(value, self._reference_to)

    def _reference_to(self, value: Any) -> Any:
        if type(value) is _Remote:
            return value.__dict__[_NUMBER]
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return {"builtin": name}
        raise self.refuse(f"a test passes the program {type(value).__name__} {value!r:.80}")

    def _decode(self, encoded: Any) -> Any:
        return decode(encoded, self._resolve)

    def _resolve(self, reference: Any) -> Any:
        if type(reference) is int:
            return _Remote(self, reference)
        match reference:
            case {"exception": [*names]}:
                return self._exception_class([str(name) for name in names])
        raise WrongAnswer("the program gave a module for a value")

    def _exception_class(self, names: list[str]) -> type[Exception]:
        """Return a class for an exception class of the program, given its bases' names.

        It stands in this process, so that ``except`` and ``assertRaises`` can name it. Its
        instances refuse comparison as the program's other objects do.
        """
        base: type[Exception] = Exception
        own = names[: names.index("Exception")] if "Exception" in names else []
        for name in reversed(own):
            base = _builtin_exception(name) or self._exceptions.setdefault(
                name, type(name, (base,), _REFUSALS)
            )
        return base

    def _to_exception(self, reply: dict[str, Any], is_next: bool) -> BaseException:
        """Return the error of a call, as the nearest class that this process knows."""
        kinds = [str(kind) for kind in reply["error"]]
        text = str(reply.get("text"))
        if "StopIteration" in kinds and is_next:
            return StopIteration()
        if not any(getattr(builtins, kind, None) in _CONTROL_FLOW for kind in kinds):
            for kind in kinds:
                error_class = self._exceptions.get(kind) or _builtin_exception(kind)
                if error_class is not None:
                    return error_class(text)
        return WrongAnswer(f"{kinds[:1]}: {text}")


_REFUSALS = {
    **dict.fromkeys(
        ["__bool__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"],
        _refuse_comparison,
    ),
    "__hash__": Exception.__hash__,
}


def _builtin_exception(name: str) -> type[Exception] | None:
    found: Any = getattr(builtins, name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


class ProbeSession(TestSession):
    """A program that is certainly wrong, without a process.

    Args:
        defines_names: whether it defines every name that the tests ask for. Every call then returns
            an object that cannot be compared; otherwise it defines nothing.
    """

    def __init__(self, defines_names: bool) -> None:
        self._exceptions = {}
        self.test_error = None
        self._defines_names = defines_names

    def find(self, name: str) -> tuple[bool, Any]:
        return self._defines_names, _Remote(self, 0) if self._defines_names else None

    def request(
        self,
        remote: _Remote,
        operation: str,
        arguments: Any,
        keywords: dict[str, Any],
        is_next: bool = False,
    ) -> Any:
        for value in [*arguments, *keywords.values()]:
            self.encode(value)
        if operation in ("call", "getattr", "getitem", "next"):
            return _Remote(self, 0)
        if operation == "iter":
            return iter([_Remote(self, 0)])
        if operation in ("setattr", "setitem"):
            return None
        raise WrongAnswer(f"a test uses {operation} of a wrong result")


class ProgramModule(types.ModuleType):
    """The program as a module, for tests that write ``from solution import f``."""

    def __init__(self, name: str, session: TestSession) -> None:
        super().__init__(name)
        self.__dict__[_TESTS] = session
        self.__dict__["__all__"] = []

    def __getattr__(self, name: str) -> Any:
        exists, value = (False, None) if name.startswith("__") else self.__dict__[_TESTS].find(name)
        if not exists:
            raise AttributeError(f"the program does not define {name!r}")
        return value


def _import_stdlib(module: str) -> types.ModuleType:
    if module.partition(".")[0] not in sys.stdlib_module_names:
        raise WrongAnswer(f"the tests use the program's module {module!r}")
    return importlib.import_module(module)


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
