"""Reward functions: loading, matching parameters to data columns, and calling with a timeout.

``component`` checks the return values. A reward function is the user's own code and runs with the
user's permissions. A call that exceeds its timeout is abandoned but not ended, so its thread keeps
running. A call that holds the GIL (a single long C call) cannot be abandoned.
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
from trivium.errors import ConfigurationError

SPECIAL_TOKEN_INPUTS = ("raw_responses", "response_tokens", "response_ids", "tokenizer")
"""Inputs that show the special tokens of a response."""
CALL_INPUTS = ("prompts", "responses", "prompt_tokens", "finish_reasons", *SPECIAL_TOKEN_INPUTS)
"""Inputs that every function can take besides the data columns.

Each has one entry per response, but for the policy's tokenizer."""

_RESPONSES = {"responses", "raw_responses", "response_tokens", "response_ids"}
_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)


def time_left() -> float | None:
    """Return the seconds left for the current reward call, or None if it has no timeout."""
    deadline = _DEADLINE.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class CallTimeout(Exception):
    """Raised when a call exceeds its timeout."""


# --- Fitting -------------------------------------------------------------------------------------


def _parameters(function: Function) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _has_var_keyword(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _named_parameters(parameters: Mapping[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: p for name, p in parameters.items() if p.kind not in variable}


def signature_faults(
    function: Function, arguments: Mapping[str, Any], columns: Mapping[str, str]
) -> list[str]:
    """Return why a function cannot be called as a reward, regardless of the data columns."""
    try:
        parameters = _parameters(function)
    except (TypeError, ValueError):
        return ["its parameters cannot be inspected: wrap it in your own function"]
    named, has_var_keyword = _named_parameters(parameters), _has_var_keyword(parameters)
    faults = [
        f"parameter {name!r} is positional-only, but calls use keyword arguments: remove the '/'"
        for name, p in named.items()
        if p.kind is p.POSITIONAL_ONLY
    ]
    if not has_var_keyword and not _RESPONSES & set(named):
        faults.append(
            f"it does not accept 'responses' (its parameters are: {', '.join(named) or 'none'}): "
            "write 'def reward(prompts, responses, **columns)'"
        )
    for setting, names in (("arguments", arguments), ("columns", columns)):
        for name in names:
            if name in CALL_INPUTS:
                faults.append(f"{setting} sets {name!r}, which every call sets: rename it")
            elif not has_var_keyword and name not in named:
                faults.append(
                    f"{setting} sets {name!r}, which it does not accept{nearest(name, named)}"
                )
    faults += [f"{n!r} is both in arguments and in columns" for n in arguments if n in columns]
    return faults


def match_columns(
    function: Function,
    arguments: Mapping[str, Any],
    columns: Mapping[str, str],
    available: Collection[str],
) -> tuple[dict[str, str], list[str]]:
    """Return the column of each parameter (parameter → column), and errors for missing columns.

    A function gets the columns that its parameters name, or all columns with ``**columns``. An
    argument and the inputs of every call (``CALL_INPUTS``) take precedence over a column of the
    same name.
    """
    parameters = _parameters(function)
    named = _named_parameters(parameters)
    column_of = {}
    if _has_var_keyword(parameters):
        column_of = {c: c for c in available if c not in CALL_INPUTS and c not in arguments}
    faults = []
    for name in dict.fromkeys([*named, *columns]):
        column = columns.get(name, name)
        if name in arguments or name in CALL_INPUTS:
            continue
        if column in available:
            column_of[name] = column
        elif name in RENAMED_ARGUMENTS and name not in columns:
            faults.append(f"parameter {name!r} is now {RENAMED_ARGUMENTS[name]!r}: rename it")
        elif name in columns or named[name].default is inspect.Parameter.empty:
            faults.append(
                f"parameter {name!r} needs a data column {column!r}{nearest(column, available)}, "
                f"and the data has {_listed(available)}: name one in 'columns: {{{name}: …}}', or "
                "set a value in 'arguments'"
            )
    return column_of, faults


def _listed(columns: Collection[str]) -> str:
    names = ", ".join(map(repr, sorted(columns)))
    return f"the columns {names}" if columns else "no other columns"


def accepted_inputs(function: Function, has_tokenizer: bool = True) -> list[str]:
    """Return the ``CALL_INPUTS`` of a function; ``**columns`` includes prompts and responses.

    Without a tokenizer, optional inputs that need one are left out. Raises ConfigurationError for
    a required one.
    """
    parameters = _parameters(function)
    texts = ("prompts", "responses") if _has_var_keyword(parameters) else ()
    names = [name for name in CALL_INPUTS if name in parameters or name in texts]
    if has_tokenizer:
        return names
    needing = [name for name in names if name in ("raw_responses", "tokenizer")]
    for name in needing:
        if parameters[name].default is inspect.Parameter.empty:
            raise ConfigurationError(
                f"a reward's parameter {name!r} needs the policy's tokenizer: pass it, as in "
                "Rewards(configs, tokenizer=policy.tokenizer)"
            )
    return [name for name in names if name not in needing]


def argument_faults(function: Function, arguments: Mapping[str, Any]) -> list[str]:
    """Return the errors that a built-in reward raises for its arguments, without responses.

    Parameters annotated as lists are data; all others without a default are arguments.
    """
    required = {
        name: str(parameter.annotation).startswith("list")
        for name, parameter in _named_parameters(_parameters(function)).items()
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

_current_call = threading.local()


def deadline() -> float | None:
    """Return the ``time.monotonic`` time at which this thread's reward call exceeds its timeout.

    A function with child processes can end them by then and raise CallTimeout itself.
    """
    return getattr(_current_call, "deadline", None)


async def _await_within(result: Awaitable[Any], seconds: float | None) -> Any:
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await result
    except TimeoutError:
        if limit.expired():
            raise CallTimeout from None
        raise


def call(function: Function, keywords: Mapping[str, Any], seconds: float | None) -> Any:
    """Call a function and return its result; raise CallTimeout after `seconds`.

    The call runs in a daemon thread. An ``async def`` runs in an event loop in that thread and is
    canceled at its timeout. Without a timeout the call runs in the caller's thread, which functions
    with signal handlers need.
    """

    def run() -> Any:
        _DEADLINE.set(None if seconds is None else time.monotonic() + seconds)
        result = function(**keywords)
        if inspect.isawaitable(result):
            return asyncio.run(_await_within(result, seconds))
        # A generator's body has not run yet: run it here, within the timeout.
        return list(result) if inspect.isgenerator(result) else result

    if seconds is None:
        return run()
    outcome: dict[str, Any] = {}
    done = threading.Event()

    def work() -> None:
        _current_call.deadline = time.monotonic() + seconds
        try:
            outcome["result"] = run()
        except BaseException as error:  # the caller raises it, SystemExit included
            outcome["error"] = error
        done.set()

    threading.Thread(target=work, daemon=True, name="trivium reward").start()
    if not done.wait(seconds):
        raise CallTimeout
    error = outcome.get("error")
    if isinstance(error, KeyboardInterrupt):
        # A Ctrl-C by the user raises in the main thread only.
        raise RuntimeError("it raised KeyboardInterrupt itself") from error
    if error is not None:
        raise error
    return outcome["result"]
