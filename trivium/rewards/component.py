"""The border between a reward function and a run: one function's values, checked one by one.

Everything a function returns is checked here, because a NaN or a shifted list would train a policy
for hours without a word. Each fault names the function and the response; a fallback value, where
the user chose one, takes the place of what could not be had.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

from trivium.config.functions import Function, located, printable, words_of
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.functions import (
    PastLimit,
    call,
    fit,
    given,
)

if TYPE_CHECKING:
    from trivium.data.prompts import Prompt
    from trivium.rewards.reward_config import RewardConfig
    from trivium.rollout.engine import Response

Step = tuple[int, float]  # where the step ends in the response's text, and its value
Value = float | list[Step]


@dataclass(frozen=True)
class Fault:
    """Why a response has no value from a function; `whole` where only the batch is at fault."""

    reason: str
    whole: bool = False
    cause: BaseException | None = None


Entry = Value | Fault
"""What a function said of one response, checked by itself."""


class _CallFailed(Exception):
    """A call gave nothing to read; `locatable` where calling one by one can find the culprit."""

    def __init__(self, reason: str, locatable: bool, cause: BaseException | None = None) -> None:
        super().__init__(reason)
        self.reason, self.locatable, self.cause = reason, locatable, cause


# --- Reading what a function returned ------------------------------------------------------------


def _number(value: Any) -> float:
    """Return a finite float, or raise ValueError with the reason why it is none."""
    try:
        if callable(getattr(value, "tolist", None)) and getattr(value, "ndim", 0) == 0:
            value = value.tolist()
        number = float(value) if isinstance(value, Real | Decimal) else None
    except OverflowError:
        raise ValueError("is too large a number") from None
    except Exception as error:
        raise ValueError(f"is {shown(value)}, which raises {type(error).__name__}") from None
    if number is None:
        raise ValueError(f"is {shown(value)}, not a number")
    if not math.isfinite(number):
        raise ValueError(f"is {number}, not a finite number")
    return number


def shown(value: Any, limit: int = 60) -> str:
    """Return a value's type and the beginning of its repr, whatever its class makes of it."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"(its repr raises {type(error).__name__})"
    return f"{type(value).__name__} {printable(text, limit)}"


def _position(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _step(entry: Any, previous_end: int, text_length: int) -> tuple[int, float]:
    """Return where a step ends and its value, or raise ValueError with the reason."""
    try:
        (start, end), value = entry
        start, end = _position(start), _position(end)
    except Exception:
        raise ValueError(f"is {shown(entry)}, not ((start, end), number)") from None
    if end <= start:
        raise ValueError(f"has the span ({start}, {end}), which is empty: end must be after start")
    if start < 0 or end > text_length:
        raise ValueError(
            f"has the span ({start}, {end}), outside the response's {text_length} characters"
        )
    if start < previous_end:
        raise ValueError(
            f"has the span ({start}, {end}), which begins before the end of the step before it "
            f"({previous_end}): steps must be in order and must not overlap"
        )
    return end, _number(value)


def read_value(value: Any, text: str) -> Value:
    """Return a function's value for one response, checked: a number, or its steps.

    Raises ValueError with the reason, to be read after "response 3 of 8 …".
    """
    if not isinstance(value, list | tuple):
        try:
            return _number(value)
        except ValueError as error:
            raise ValueError(f"its value {error}") from None
    found: list[Step] = []
    for index, entry in enumerate(value):
        try:
            found.append(_step(entry, found[-1][0] if found else 0, len(text)))
        except ValueError as error:
            raise ValueError(f"step {index} {error}") from None
    return found


def _entries(result: Any, count: int) -> list[Any]:
    """Return a call's result as one entry per response."""
    try:
        shape = tuple(getattr(result, "shape", ()))
        if callable(getattr(result, "tolist", None)) and len(shape) <= 1:
            result = result.tolist()
    except Exception as error:
        reason = f"returned {shown(result)}, which raises {type(error).__name__}"
        raise _CallFailed(reason, locatable=False, cause=error) from error
    if len(shape) > 1:
        kind = type(result).__name__
        raise _CallFailed(
            f"returned {kind} of the shape {shape}, not one value for each of {count}: flatten it",
            locatable=False,
        )
    if not isinstance(result, list | tuple):
        raise _CallFailed(
            f"returned {shown(result)}, not a list of {count} values", locatable=False
        )
    if len(result) != count:
        values = "value" if len(result) == 1 else "values"
        raise _CallFailed(f"returned {len(result)} {values} for {count}", locatable=True)
    return list(result)


def columns_of(prompts: Sequence[Prompt]) -> set[str]:
    """Return the columns that any of the prompts has."""
    return {column for prompt in prompts for column in prompt.columns}


# --- One reward ----------------------------------------------------------------------------------


class Component:
    """A configured function, and whether it has turned out to be a process reward."""

    def __init__(self, config: RewardConfig, function: Function) -> None:
        self.config, self.function = config, function
        self.name = config.label
        self.process: bool | None = None

    def values(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        early: list[Entry] | None = None,
    ) -> tuple[list[Value], int]:
        """Return every response's value, and how many are the fallback.

        `early` is what calls for some of the responses gave already; None calls for all of them.
        """
        found = self._scored(prompts, responses) if early is None else early
        values = self._consistent(found)
        faults = {i: value for i, value in enumerate(values) if isinstance(value, Fault)}
        fallback = self.config.fallback
        if faults and fallback is None:
            raise self._error(faults, prompts, responses)
        good = [
            self._fallback(responses[i].text) if isinstance(value, Fault) else value
            for i, value in enumerate(values)
        ]
        return good, len(faults)

    def score_subset(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        columns: Collection[str],
        seconds: float,
    ) -> list[Entry] | None:
        """Return what a call gives for some of a batch's responses, or None where it failed.

        `columns` are those of the batch's prompts. What a failed call means for its responses only
        a call for all of them can say.
        """
        try:
            entries = self._call(prompts, responses, seconds, columns)
        except _CallFailed:
            return None
        return [self._read(e, r.text) for e, r in zip(entries, responses, strict=True)]

    def _fallback(self, text: str) -> Value:
        assert self.config.fallback is not None, "faults without a fallback have been raised"
        if not self.process:
            return self.config.fallback
        return [(len(text), self.config.fallback)] if text else []

    def _call(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        seconds: float | None,
        columns: Collection[str] | None = None,
    ) -> list[Any]:
        available = columns_of(prompts) if columns is None else columns
        try:
            keywords = self._keywords(prompts, responses, available)
            result = call(self.function, keywords, seconds)
        except PastLimit:
            raise _CallFailed(f"ran past its limit of {seconds:g} s", locatable=False) from None
        except (KeyboardInterrupt, ConfigurationError):
            raise
        except RewardError as error:
            # The function knows what happened: there is no culprit to look for.
            raise _CallFailed(words_of(error), locatable=False, cause=error) from error
        except BaseException as error:
            file = getattr(getattr(self.function, "__code__", None), "co_filename", None)
            reason = f"raised {located(error, lambda frame: frame == file)}"
            if "main thread" in words_of(error):
                reason += "; 'timeout: null' calls it there, without a limit"
            raise _CallFailed(reason, locatable=True, cause=error) from error
        return _entries(result, len(responses))

    def _keywords(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        available: Collection[str],
    ) -> dict[str, Any]:
        chosen, faults = fit(self.function, self.config.arguments, self.config.columns, available)
        if faults:
            raise ConfigurationError("\n".join(f"reward {self.name!r}: {f}" for f in faults))
        everything: dict[str, Callable[[], list[Any]]] = {
            "prompts": lambda: [prompt.text for prompt in prompts],
            "responses": lambda: [response.text for response in responses],
            "prompt_tokens": lambda: [list(prompt.tokens) for prompt in prompts],
            "response_tokens": lambda: [list(response.tokens) for response in responses],
            "finish_reasons": lambda: [response.finish_reason for response in responses],
        }
        return {
            **{name: everything[name]() for name in given(self.function)},
            **{name: [p.columns.get(column) for p in prompts] for name, column in chosen.items()},
            **self.config.arguments,
        }

    def _scored(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Entry]:
        try:
            entries = self._call(prompts, responses, self.config.timeout)
        except _CallFailed as failed:
            if failed.locatable and len(responses) > 1:
                return self._one_by_one(failed, prompts, responses)
            whole = not failed.locatable
            return [Fault(failed.reason, whole, failed.cause)] * len(responses)
        return [self._read(e, r.text) for e, r in zip(entries, responses, strict=True)]

    def _read(self, entry: Any, text: str) -> Entry:
        if isinstance(entry, Exception):
            return Fault(words_of(entry) or type(entry).__name__, cause=entry)
        try:
            return read_value(entry, text)
        except ValueError as error:
            return Fault(str(error))

    def _one_by_one(
        self, failed: _CallFailed, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> list[Entry]:
        """Call again for each response alone, to learn which one made the batch's call fail.

        All these calls share one limit. Without a fallback the first culprit ends the search.
        """
        limit = self.config.timeout
        deadline = None if limit is None else time.monotonic() + limit
        values: list[Entry] = []
        for prompt, response in zip(prompts, responses, strict=True):
            left = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
            try:
                [entry] = self._call([prompt], [response], left)
                values.append(self._read(entry, response.text))
            except _CallFailed as alone:
                values.append(Fault(alone.reason, cause=alone.cause))
            if isinstance(values[-1], Fault) and self.config.fallback is None:
                return values
        if any(isinstance(value, Fault) for value in values):
            return values
        reason = f"{failed.reason}; each response alone, in a second call, was scored without error"
        return [Fault(reason, whole=True, cause=failed.cause)] * len(responses)

    def _consistent(self, values: list[Entry]) -> list[Entry]:
        """Turn values of the other form, number or steps, into faults; the first value decides."""
        form = self.process
        if form is None:
            form = next((isinstance(v, list) for v in values if not isinstance(v, Fault)), None)
        self.process = form
        reason = "its value is {}, where the first response that was scored got {}: mixed forms"
        texts = ("a number", "a list of steps") if form else ("a list of steps", "a number")
        return [
            value
            if isinstance(value, Fault) or isinstance(value, list) == form
            else Fault(reason.format(*texts))
            for value in values
        ]

    def _error(
        self, faults: dict[int, Fault], prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> RewardError:
        index, fault = next(iter(faults.items()))
        source = self.config.function
        who = f"reward {self.name!r}" + (f" ({source})" if source != self.name else "")
        text = responses[index].text
        quoted = f"{text[:80]!r}{'…' if len(text) > 80 else ''}"
        if fault.whole:
            where = f"a batch of {len(responses)} responses (the first is {quoted})"
        else:
            row = prompts[index].index
            where = f"response {index} of {len(responses)} (prompt row {row}), {quoted}"
        more = "" if fault.whole or len(faults) == 1 else f" ({len(faults) - 1} more fail as well)"
        error = RewardError(
            f"{who}, on {where}: {fault.reason}{more}. Correct the function, or set 'fallback' to "
            "the value that responses it cannot score shall get"
        )
        error.__cause__ = fault.cause
        return error
