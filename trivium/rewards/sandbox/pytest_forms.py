"""Stand-in for the parts of pytest that test code of data sets uses.

Programs and tests run with the standard library alone. ``raises``, ``approx``, ``fail`` and
``mark.parametrize`` work as in pytest; other marks change nothing. ``code_tests`` refuses tests
that use more of it.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_NUMBERS = (int, float, complex)
CASES = "trivium_cases"  # attribute of a parametrized test: its keyword arguments, one per case


def module() -> types.ModuleType:
    """Return the module that ``import pytest`` finds."""
    found = types.ModuleType("pytest")
    vars(found).update(
        raises=raises, approx=_Approx, fail=_fail, mark=_Marks(), param=_Param,
        main=lambda *arguments, **options: 0,
    )  # fmt: skip
    return found


def cases(function: Any) -> list[dict[str, Any]]:
    """Return the keyword arguments of each call of a test function."""
    return list(getattr(function, CASES, [{}]))


class _Raises:
    """Context that requires an error."""

    def __init__(self, kinds: Any, match: str | None) -> None:
        self._kinds, self._match = kinds, match
        self.type: Any = None
        self.value: Any = None

    def __enter__(self) -> _Raises:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        assert kind is not None, f"DID NOT RAISE {self._kinds}"
        if not issubclass(kind, self._kinds):
            return False
        self.type, self.value = kind, error
        if self._match is not None:
            assert re.search(self._match, str(error)), f"{str(error)!r} has no {self._match!r}"
        return True

    def match(self, pattern: str) -> bool:
        """Require that the error's message has a match of the pattern."""
        assert re.search(pattern, str(self.value)), f"{str(self.value)!r} has no {pattern!r}"
        return True


def raises(kinds: Any, *call: Any, match: str | None = None, **keywords: Any) -> Any:
    """Require an error, in a ``with`` block or of a call."""
    context = _Raises(kinds, match)
    if not call:
        return context
    function, *arguments = call
    with context:
        function(*arguments, **keywords)
    return context


def _fail(reason: str = "", **options: Any) -> None:
    raise AssertionError(reason)


class _Approx:
    """Number, or list, tuple or dict of numbers, that equals others within a tolerance."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self._expected, self._rel, self._abs = expected, rel, abs

    def __eq__(self, actual: Any) -> bool:
        return self._is_near(actual, self._expected)

    def _is_near(self, actual: Any, expected: Any) -> bool:
        if isinstance(expected, Mapping):
            is_dict = isinstance(actual, Mapping) and actual.keys() == expected.keys()
            return is_dict and all(self._is_near(actual[k], expected[k]) for k in expected)
        if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
            is_list = isinstance(actual, Sequence) and len(actual) == len(expected)
            return is_list and all(map(self._is_near, actual, expected))
        if not isinstance(expected, _NUMBERS) or not isinstance(actual, _NUMBERS):
            return actual == expected
        if actual == expected:
            return True
        relative = 1e-6 if self._rel is None and self._abs is None else (self._rel or 0.0)
        absolute = 1e-12 if self._abs is None else self._abs
        distance, size = abs(complex(actual) - complex(expected)), abs(complex(expected))
        return distance <= max(relative * size, absolute) and distance != float("inf")

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class _Param(tuple[Any, ...]):
    """One case of ``parametrize``; its id and marks are ignored."""

    def __new__(cls, *values: Any, **options: Any) -> _Param:
        return super().__new__(cls, values)


def _parametrize(names: Any, values: Any, **options: Any) -> Callable[[Any], Any]:
    keys = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    single = len(keys) == 1
    own = [
        dict(zip(keys, v if isinstance(v, _Param) or not single else [v], strict=True))
        for v in values
    ]

    def decorate(function: Any) -> Any:
        product = itertools.product(cases(function), own)
        setattr(function, CASES, [{**first, **second} for first, second in product])
        return function

    return decorate


class _Marks:
    """``pytest.mark``: a mark is a decorator, with or without arguments."""

    def __getattr__(self, name: str) -> Any:
        if name == "parametrize":
            return _parametrize
        return _mark


def _mark(*arguments: Any, **options: Any) -> Any:
    is_decorator = len(arguments) == 1 and callable(arguments[0]) and not options
    return arguments[0] if is_decorator else lambda function: function


def methods(instance: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the test methods of an instance of a test class, and the arguments of each call."""
    for name in dir(instance):
        if name.startswith("test"):
            method = getattr(instance, name)
            for keywords in cases(method):
                yield method, keywords
