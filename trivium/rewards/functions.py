"""A reward's function: finding it, fitting it to the data's columns, and calling it in time.

What its return value must be is ``reward``'s business. A function is the user's own code and runs
with the user's rights; a hung call can be given up but not ended, so its thread is left behind,
and a call that holds the interpreter's lock (a single long C call) cannot be given up at all.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from trivium.config.paths import looked_up
from trivium.config.renamed import RENAMED_ARGUMENTS
from trivium.errors import ConfigurationError

Function = Callable[..., Any]

# What every function may name besides the data's columns; one entry per response.
GIVEN = ("prompts", "responses", "prompt_tokens", "response_tokens", "finish_reasons")


_DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)


def time_left() -> float | None:
    """Seconds that the reward call in progress may still take; None where it has no limit."""
    deadline = _DEADLINE.get()
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class PastLimit(Exception):
    """A call took longer than it may."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or nothing where no name is near."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# --- Finding -------------------------------------------------------------------------------------


def load_function(
    source: str, directories: Sequence[Path], built_in: Mapping[str, Function]
) -> Function:
    """Return the function that ``file.py:function``, ``module:function`` or a built-in name means.

    A relative file is looked for in each of `directories` in turn. Modules may come from there too,
    and a reward's file may import its neighbors: both are added at the end of the import path.
    Raises ConfigurationError.
    """
    place, colon, name = source.rpartition(":")
    if not colon:
        if source in built_in:
            return built_in[source]
        raise ConfigurationError(
            f"{source!r} is no built-in reward{nearest(source, built_in)}: write one of "
            f"{', '.join(sorted(built_in))}, or 'file.py:function', or 'package.module:function'"
        )
    if not place or not name:
        raise ConfigurationError(
            f"{source!r} names no function: write 'file.py:function' or 'package.module:function'"
        )
    for directory in directories:
        _extend_import_path(directory)
    if place.endswith(".py"):
        module = _load_file(place, directories)
    else:
        module = _import(lambda: importlib.import_module(place), source, None, place)
    return _attribute(module, name, place)


def anchored(source: str, directory: Path | None) -> str:
    """Return `source` so that it names the same file from anywhere, if it names one there.

    A relative file that the current directory lacks and `directory` holds gets its whole path.
    """
    place, colon, name = source.rpartition(":")
    try:
        file = looked_up(place)
    except ConfigurationError:  # told when the function is looked for
        return source
    if directory is None or not place.endswith(".py") or file.is_absolute() or file.exists():
        return source
    there = directory.resolve() / file
    return f"{there}{colon}{name}" if there.is_file() else source


def _extend_import_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def find_file(place: str, directories: Sequence[Path]) -> Path:
    """Return the first of the directories' files of this name; ConfigurationError if none has."""
    candidates = [directory / looked_up(place) for directory in directories]
    path = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
    if path is None:
        tried = " and ".join(dict.fromkeys(str(candidate.resolve()) for candidate in candidates))
        raise ConfigurationError(
            f"no such file {place!r} (looked at {tried}): write a path relative to the current "
            "directory or to the configuration's, or an absolute one"
        )
    return path


def _load_file(place: str, directories: Sequence[Path]) -> ModuleType:
    path = find_file(place, directories)
    _extend_import_path(path.parent)
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"trivium_reward_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    loader, module = spec.loader, importlib.util.module_from_spec(spec)

    def execute() -> ModuleType:
        sys.modules[name] = module
        loader.exec_module(module)
        return module

    return _import(execute, place, path, name)


def _import(
    load: Callable[[], ModuleType], source: str, path: Path | None, name: str
) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if path is None and missing and (name == missing or name.startswith(f"{missing}.")):
            raise ConfigurationError(
                f"no module named {missing!r}: {source!r} is looked for among the installed "
                "packages, in the current directory and in the configuration's; for a file write "
                "'file.py:function'"
            ) from None
        sys.modules.pop(name, None)
        raise ConfigurationError(
            f"{source!r} cannot be imported: {located(error, _is_users)}"
        ) from error


def located(error: BaseException, own: Callable[[str], bool]) -> str:
    """Return ``file:line: Type: message`` for an error, at its last line in an `own` file."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename and own(error.filename):
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg}"
    message = f"{kind}: {printable(words_of(error))}".rstrip(": ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if own(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {message}" if frames else message


def words_of(error: BaseException) -> str:
    """Return an error's message, whatever its class makes of it."""
    try:
        return str(error)
    except Exception as fault:
        return f"(its message raises {type(fault).__name__})"


def _is_users(file: str) -> bool:
    return "importlib" not in file and file != __file__


def printable(text: str, limit: int = 300) -> str:
    """Return a text, shortened, in which a control character cannot reach the terminal."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _attribute(module: ModuleType, name: str, place: str) -> Function:
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigurationError(f"{place!r} has no function {name!r}{nearest(name, public)}")
    found = getattr(module, name)
    if not callable(found) or inspect.isclass(found):
        kind = "a class" if inspect.isclass(found) else f"{type(found).__name__} {found!r:.60}"
        raise ConfigurationError(
            f"{name!r} in {place!r} is not a function but {kind}: name a function "
            "'def reward(prompts, responses, **columns)' that returns a number per response"
        )
    return found


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
