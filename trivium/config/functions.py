"""Functions that a configuration names: ``file.py:function``, ``module:function`` or a built-in.

A relative file is looked for in given directories. A user's file is parsed before it is imported,
so that a missing function is reported before anything slow. The function runs with the user's
rights.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from trivium.config.paths import looked_up
from trivium.errors import ConfigurationError

Function = Callable[..., Any]


@dataclass(frozen=True)
class FunctionKind:
    """Kind of function that is looked for, for messages.

    Attributes:
        name: the kind in words, such as "reward".
        signature: an example of its first line, in quotes.
        result: what it returns, as in "that returns a number per response".
        built_in: the functions that a plain name may mean.
    """

    name: str
    signature: str
    result: str
    built_in: Mapping[str, Function] = field(default_factory=dict)


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or an empty text if no name is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load_function(source: str, directories: Sequence[Path], kind: FunctionKind) -> Function:
    """Return the function that ``file.py:function``, ``module:function`` or a built-in name means.

    A relative file is looked for in each of `directories` in turn. Modules may come from there too,
    and a user's file may import the files beside it: both directories are appended to the import
    path.

    Raises:
        ConfigurationError: the name means no function, or its module cannot be imported.
    """
    place, colon, name = source.rpartition(":")
    if not colon:
        if source in kind.built_in:
            return kind.built_in[source]
        raise ConfigurationError(
            f"{source!r} is not a built-in {kind.name}{nearest(source, kind.built_in)}: write one "
            f"of {', '.join(sorted(kind.built_in))}, or 'file.py:function', or "
            "'package.module:function'"
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
    return _attribute(module, name, place, kind)


def anchored(source: str, directory: Path | None) -> str:
    """Return `source` with the whole path of its file if only `directory` holds that file.

    The result names the same file from any current directory.
    """
    place, colon, name = source.rpartition(":")
    try:
        file = looked_up(place)
    except ConfigurationError:  # reported when the function is looked for
        return source
    if directory is None or not place.endswith(".py") or file.is_absolute() or file.exists():
        return source
    there = directory.resolve() / file
    return f"{there}{colon}{name}" if there.is_file() else source


def find_file(place: str, directories: Sequence[Path]) -> Path:
    """Return the file of this name in the first directory that has it.

    Raises:
        ConfigurationError: no directory has it.
    """
    candidates = [directory / looked_up(place) for directory in directories]
    path = next((candidate.resolve() for candidate in candidates if candidate.is_file()), None)
    if path is None:
        tried = " and ".join(dict.fromkeys(str(candidate.resolve()) for candidate in candidates))
        raise ConfigurationError(
            f"no such file {place!r} (looked at {tried}): write a path relative to the current "
            "directory or to the configuration's, or an absolute one"
        )
    return path


def file_faults(path: Path, place: str, name: str, kind: FunctionKind) -> Iterator[str]:
    """Yield why a file cannot define the function `name`, without importing the file."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        yield f"{path}:{error.lineno}: not valid Python: {error.msg}; correct the file"
        return
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path}: cannot be read as Python: {error}; correct the file"
        return
    defined = {*_mentioned_names(tree)}
    if name not in defined and not defined & {"*", "__getattr__", "globals", "exec"}:
        yield (
            f"{place!r} defines no {name!r}{nearest(name, defined)}: write the name of a "
            f"function {kind.signature} in this file"
        )


def error_with_location(error: BaseException, own: Callable[[str], bool]) -> str:
    """Return ``file:line: Type: message`` for an error, at its last line in an `own` file."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename and own(error.filename):
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg}"
    message = f"{kind}: {printable(message_of(error))}".rstrip(": ")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if own(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {message}" if frames else message


def message_of(error: BaseException) -> str:
    """Return an error's message, also if its class fails to produce one."""
    try:
        return str(error)
    except Exception as fault:
        return f"(its message raises {type(fault).__name__})"


def printable(text: str, limit: int = 300) -> str:
    """Return a text, shortened, in which a control character cannot reach the terminal."""
    text = text if len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _extend_import_path(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _load_file(place: str, directories: Sequence[Path]) -> ModuleType:
    path = find_file(place, directories)
    _extend_import_path(path.parent)
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:12]
    name = f"trivium_user_{path.stem}_{digest}"
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
            f"{source!r} cannot be imported: {error_with_location(error, _is_users)}"
        ) from error


def _is_users(file: str) -> bool:
    return "importlib" not in file and file != __file__


def _attribute(module: ModuleType, name: str, place: str, kind: FunctionKind) -> Function:
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigurationError(f"{place!r} has no function {name!r}{nearest(name, public)}")
    value = getattr(module, name)
    if not callable(value) or inspect.isclass(value):
        what = "a class" if inspect.isclass(value) else f"{type(value).__name__} {value!r:.60}"
        raise ConfigurationError(
            f"{name!r} in {place!r} is not a function but {what}: write the name of a "
            f"function {kind.signature} {kind.result}"
        )
    return value


def _mentioned_names(tree: ast.AST) -> Iterator[str]:
    """Yield every name that is bound, imported or mentioned anywhere in the file."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Name(id=name):
                yield name
            case ast.alias(name=name, asname=alias):
                yield (alias or name).split(".")[0]
