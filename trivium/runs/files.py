"""Atomic writes: a file or directory is complete or absent, even after a crash while writing."""

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
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces ``target`` when the block ends.

    The previous ``target`` stays in place until then, and for good if the block raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _temporary_sibling(target, _PARTIAL)
    partial.mkdir()
    try:
        yield partial
        flush_to_disk(partial)
        _replace_directory(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        TrainingError: the file cannot be written.
    """
    try:
        write_bytes(path, text.encode())
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    partial = _temporary_sibling(path, _PARTIAL)
    try:
        partial.write_bytes(data)
        flush_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_writes(directory: Path) -> None:
    """Remove incomplete files and directories that a killed process left in ``directory``.

    If the process was killed while it replaced a directory, the previous directory gets its name
    back.
    """
    if not directory.is_dir():
        return
    for path in directory.glob(f".*-*{_PREVIOUS}"):
        target = path.with_name(path.name[1:].rpartition("-")[0])
        if target.exists():
            remove(path)
        else:
            path.rename(target)
    for suffix in (_PARTIAL, _REMOVED):
        for path in directory.glob(f".*{suffix}"):
            remove(path)


def is_partial_write(path: Path) -> bool:
    """Return whether a path has the name of an incomplete write, as a killed process leaves it."""
    return path.name.startswith(".") and path.name.endswith((_PARTIAL, _PREVIOUS, _REMOVED))


def remove(path: Path) -> None:
    """Delete a file, a link, or a directory and its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_atomically(path: Path) -> None:
    """Rename a directory, then delete it, so that its name never holds half of its contents."""
    renamed = path.with_name(f".{path.name}{_REMOVED}")
    shutil.rmtree(renamed, ignore_errors=True)
    path.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def flush_to_disk(path: Path, *, recursive: bool = True) -> None:
    """Wait until a file, or a directory and its contents, has reached the disk."""
    if recursive and path.is_dir():
        for entry in path.iterdir():
            flush_to_disk(entry)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}{suffix}")


def _replace_directory(partial: Path, target: Path) -> None:
    """Rename a complete directory to ``target``, whose previous contents are deleted last."""
    previous = _temporary_sibling(target, _PREVIOUS)
    if target.exists():
        target.rename(previous)
    try:
        partial.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    flush_to_disk(target.parent, recursive=False)
    shutil.rmtree(previous, ignore_errors=True)
