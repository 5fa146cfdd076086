"""Output files of commands: checks before a command starts, and atomic writing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trivium.errors import ConfigurationError
from trivium.runs.store import json_line


def require_free(path: Path, overwrite: bool) -> None:
    """Raise ConfigurationError if the file exists and may not be replaced, or cannot be created."""
    if path.exists() and not (overwrite and path.is_file()):
        reason = "already exists" if path.is_file() else "is a directory"
        remedy = ", or write overwrite=true to replace it" if path.is_file() else ""
        raise ConfigurationError(f"output = {path}: {reason}; name another file{remedy}")
    require_directory(path.parent, f"output = {path}")


def require_directory(path: Path, setting: str) -> None:
    """Raise ConfigurationError, which names the setting, if a file is at the path or above it."""
    existing = next(candidate for candidate in [path, *path.parents] if candidate.exists())
    if not existing.is_dir():
        raise ConfigurationError(
            f"{setting}: {existing} is a file, but a directory is needed: name another path"
        )


@contextmanager
def rows_written(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Return a context with a function that writes a row. The file appears when the block ends.

    If the block raises, the rows written so far stay in a file named `….partial`.
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
    """Return the error for an output that the file system cannot write."""
    return ConfigurationError(f"output = {path}: cannot be written: {error.strerror}")
