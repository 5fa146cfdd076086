"""Files that are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trivium.errors import TrainingError

_PARTIAL, _PREVIOUS = ".partial", ".previous"
_REMOVED = ".removed"


@contextmanager
def placing(target: Path) -> Iterator[Path]:
    """Give a directory to write to, which becomes ``target`` once the block has ended.

    What stood there before stays until then, and for good if the block raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _sibling(target, _PARTIAL)
    partial.mkdir()
    try:
        yield partial
        flush_to_disk(partial)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        TrainingError: it cannot be written.
    """
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = _sibling(path, _PARTIAL)
    try:
        partial.write_bytes(data)
        flush_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def tidy(directory: Path) -> None:
    """Clear away what a process that was killed left half done in a directory.

    What it had moved aside, and not yet put something in the place of, goes back to its place.
    """
    if not directory.is_dir():
        return
    for path in directory.glob(f".*-*{_PREVIOUS}"):
        target = path.with_name(path.name[1:].rpartition("-")[0])
        if target.exists():
            remove(path)
        else:
            path.rename(target)
    for ending in (_PARTIAL, _REMOVED):
        for path in directory.glob(f".*{ending}"):
            remove(path)


def is_left_over(path: Path) -> bool:
    """Whether a path is what ``tidy`` clears away."""
    return path.name.startswith(".") and path.name.endswith((_PARTIAL, _PREVIOUS, _REMOVED))


def remove(path: Path) -> None:
    """Delete a file, a link, or a directory with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_aside(path: Path) -> None:
    """Delete a directory under another name, so that half of it never bears the name of the
    whole."""
    aside = path.with_name(f".{path.name}{_REMOVED}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def flush_to_disk(path: Path, *, below: bool = True) -> None:
    """Wait until a file, or a directory and what is below it, has reached the disk."""
    if below and path.is_dir():
        for entry in path.iterdir():
            flush_to_disk(entry)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}{ending}")


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename a complete directory to its name, moving aside what bore it before."""
    previous = _sibling(target, _PREVIOUS)
    if target.exists():
        target.rename(previous)
    try:
        partial.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    flush_to_disk(target.parent, below=False)
    shutil.rmtree(previous, ignore_errors=True)
