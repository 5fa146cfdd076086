"""A reward's function: finding it, fitting it to the data's columns, and calling it in time.

What its return value must be is ``reward``'s business. A function is the user's own code and runs
with the user's rights; a hung call can be given up but not ended, so its thread is left behind,
and a call that holds the interpreter's lock (a single long C call) cannot be given up at all.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Collection, Mapping
from contextvars import ContextVar
from typing import Any

from trivium.config.functions import Function, nearest
from trivium.config.renamed import RENAMED_ARGUMENTS

# What every function may name besides the data's columns; one entry per response.
GIVEN = ("prompts", "responses", "prompt_tokens", "response_tokens", "finish_reasons")


_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)


def time_left() -> float | None:
    """Seconds that the reward call in progress may still take; None where it has no limit."""
    deadline = _DEADLINE.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class PastLimit(Exception):
    """A call took longer than it may."""


# --- Fitting -------------------------------------------------------------------------------------


def _parameters(function: Function) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _named(parameters: Mapping[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in parameters.items() if p.kind not in variable}


def signature_faults(
    function: Function, arguments: Mapping[str, Any], columns: Mapping[str, str]
) -> list[str]:
    """Return what keeps a function from being called as a reward, whatever the data's columns."""
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError):
        return ["its parameters cannot be inspected: wrap it in a function of your own"]
    named, anything = _named(parameters), _takes_any(parameters)
    faults = [
        f"parameter {name!r} is positional-only, but calls are made with keywords: remove the '/'"
        for name, p in named.items()
        if p.kind is p.POSITIONAL_ONLY
    ]
    if not anything and not {"responses", "response_tokens"} & set(named):
        faults.append(
            f"it does not accept 'responses' (its parameters are: {', '.join(named) or 'none'}): "
            "write 'def reward(prompts, responses, **columns)'"
        )
    for setting, names in (("arguments", arguments), ("columns", columns)):
        for name in names:
            if name in GIVEN:
                faults.append(f"{setting} sets {name!r}, which every call sets itself: rename it")
            elif not anything and name not in named:
                faults.append(
                    f"{setting} sets {name!r}, which it does not accept{nearest(name, named)}"
                )
    faults += [f"{n!r} is both in arguments and in columns" for n in arguments if n in columns]
    return faults


def fit(
    function: Function,
    arguments: Mapping[str, Any],
    columns: Mapping[str, str],
    available: Collection[str],
) -> tuple[dict[str, str], list[str]]:
    """Return which column each parameter is given (parameter → column), and what is missing.

    A function is given the columns that it names, with ``**columns`` all of them; an argument hides
    the column of its name, and what every call gives (``GIVEN``) does too.
    """
    parameters = _parameters(function)
    named = _named(parameters)
    chosen = {}
    if _takes_any(parameters):
        chosen = {c: c for c in available if c not in GIVEN and c not in arguments}
    faults = []
    for name in dict.fromkeys([*named, *columns]):
        column = columns.get(name, name)
        if name in arguments or name in GIVEN:
            continue
        if column in available:
            chosen[name] = column
        elif name in RENAMED_ARGUMENTS and name not in columns:
            faults.append(f"parameter {name!r} is now {RENAMED_ARGUMENTS[name]!r}: rename it")
        elif name in columns or named[name].default is inspect.Parameter.empty:
            faults.append(
                f"parameter {name!r} needs a data column {column!r}{nearest(column, available)}, "
                f"and the data has {_listed(available)}: name one in 'columns: {{{name}: …}}', or "
                "set a value in 'arguments'"
            )
    return chosen, faults


def _listed(columns: Collection[str]) -> str:
    names = ", ".join(map(repr, sorted(columns)))
    return f"the columns {names}" if columns else "no further column"


def given(function: Function) -> list[str]:
    """Return which of ``GIVEN`` a function takes: those it names; ``**columns`` takes the texts."""
    parameters = _parameters(function)
    texts = ("prompts", "responses") if _takes_any(parameters) else ()
    return [name for name in GIVEN if name in parameters or name in texts]


def objection_to_arguments(function: Function, arguments: Mapping[str, Any]) -> list[str]:
    """Return what a built-in reward, called with no responses, objects to in its arguments.

    Its parameters annotated as lists are data, and all others without a default are arguments.
    """
    required = {
        name: str(parameter.annotation).startswith("list")
        for name, parameter in _named(_parameters(function)).items()
        if parameter.default is parameter.empty and name not in arguments
    }
    missing = [name for name, is_data in required.items() if not is_data]
    if missing:
        return [f"it needs {name!r}: set it in 'arguments'" for name in missing]
    try:
        function(**{name: [] for name in required}, **arguments)
    except (TypeError, ValueError) as error:
        return [str(error)]
    return []


# --- Calling -------------------------------------------------------------------------------------

_this_call = threading.local()


def deadline() -> float | None:
    """Return when, by ``time.monotonic``, the call that this thread is in will be given up.

    A function with processes of its own can end them by then, and raise PastLimit itself.
    """
    return getattr(_this_call, "deadline", None)


async def _awaited(result: Awaitable[Any], seconds: float | None) -> Any:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await result
    except TimeoutError:
        if limit.expired():
            raise PastLimit from None
        raise


def call(function: Function, keywords: Mapping[str, Any], seconds: float | None) -> Any:
    """Return a function's result within `seconds`, or raise PastLimit or what it raises.

    It runs in a daemon thread, an ``async def`` in an event loop there (and is canceled at its
    limit). Without a limit it runs in the caller's thread, which signal handlers need.
    """

    def run() -> Any:
        _DEADLINE.set(None if seconds is None else time.monotonic() + seconds)
        result = function(**keywords)
        if inspect.isawaitable(result):
            return asyncio.run(_awaited(result, seconds))
        # A generator's body has not run yet: run it here, within the limit.
        return list(result) if inspect.isgenerator(result) else result

    if seconds is None:
        return run()
    outcome: dict[str, Any] = {}
    done = threading.Event()

    def work() -> None:
        _this_call.deadline = time.monotonic() + seconds
        try:
            outcome["result"] = run()
        except BaseException as error:  # SystemExit, too, must reach the caller, not end a thread
            outcome["error"] = error
        done.set()

    threading.Thread(target=work, daemon=True, name="trivium reward").start()
    if not done.wait(seconds):
        raise PastLimit
    error = outcome.get("error")
    if isinstance(error, KeyboardInterrupt):
        # The user's own reaches the main thread alone.
        raise RuntimeError("it raised KeyboardInterrupt itself") from error
    if error is not None:
        raise error
    return outcome["result"]
