"""The one file that a command writes: whether it may be written, and how it appears complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trivium.errors import ConfigurationError
from trivium.runs.store import json_line


def require_free(path: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, unless it may go, or that has no place."""
    if path.exists() and not (overwrite and path.is_file()):
        what = "is there already" if path.is_file() else "is a directory"
        remedy = ", or write overwrite=true to replace it" if path.is_file() else ""
        raise ConfigurationError(f"output = {path}: {what}; name another file{remedy}")
    require_directory(path.parent, f"output = {path}")


def require_directory(path: Path, what: str) -> None:
    """Refuse a directory that would stand where a file is, or below one; `what` needs it."""
    held = next(one for one in [path, *path.parents] if one.exists())
    if not held.is_dir():
        raise ConfigurationError(
            f"{what}: {held} is a file, where a directory is needed: name another place"
        )


@contextmanager
def rows_written(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give a function that writes a row; the file gets its name once the block is through.

    Rows that had been written when the block raises stay beside it, in a file named `.partial`.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        with file:
            yield lambda row: print(json_line(row), file=file)
        partial.replace(path)
    finally:
        if partial.exists() and partial.stat().st_size == 0:
            partial.unlink()


def unwritable(path: Path, error: OSError) -> ConfigurationError:
    """The error for an output that the file system refuses."""
    return ConfigurationError(f"output = {path}: cannot be written: {error.strerror}")
