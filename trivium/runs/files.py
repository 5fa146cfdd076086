"""Files of a run: atomic writes, and reading that neither hangs nor exhausts the memory.

A file or directory is complete or absent, even after a crash while writing. A run directory may be
damaged or planted: only regular files are read, up to a size.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any

from trivium.errors import CheckpointError, DataError, TrainingError

_PARTIAL, _PREVIOUS = ".partial", ".previous"
_REMOVED = ".removed"
_MAX_DOCUMENT_BYTES = 1 << 26
MAX_LINE_BYTES = 1 << 26
"""Maximum length of a line of a log."""
_MAX_NESTING = 100
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


# --- Reading -------------------------------------------------------------------------------------


def open_regular(path: Path, *, follow: bool = True) -> BufferedReader:
    """Open a regular file for reading, without waiting for the writer of a pipe.

    Args:
        path: the file.
        follow: whether `path` itself may be a symbolic link.

    Raises:
        OSError: the file cannot be opened, or is something else.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"is {kind}, not a file", str(path))
    return open(descriptor, "rb")


def read_regular(path: Path, max_bytes: int = _MAX_DOCUMENT_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file cannot be read, is something else, or is longer than `max_bytes`.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise OSError(errno.EFBIG, f"is longer than {max_bytes:,} bytes", str(path))
        return file.read()


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON document.

    Raises:
        ValueError: it is not JSON, or nests deeper than any file of a run does.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if data.count(b"[") + data.count(b"{") > _MAX_NESTING and _nests_too_deeply(value):
        raise ValueError("it is nested too deeply")
    return value


def _nests_too_deeply(value: Any) -> bool:
    values = [value]
    for _ in range(_MAX_NESTING + 1):
        containers = [v for v in values if isinstance(v, dict | list)]
        if not containers:
            return False
        values = [v for c in containers for v in (c.values() if isinstance(c, dict) else c)]
    return True


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        record = parse_json(read_regular(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: is damaged: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: is damaged: it is not a JSON object")
    return record


def complete_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a log that end with a line break; nothing without a log.

    Raises:
        DataError: the log is not a file, or has a line that no run writes.
    """
    try:
        with open_regular(path) as file:
            for number in count(1):
                line = file.readline(MAX_LINE_BYTES + 1)
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{path}:{number}: is damaged: longer than {MAX_LINE_BYTES:,} bytes"
                    )
                if not line.endswith(b"\n"):
                    return
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def log_content(file: Path, size: int) -> tuple[int, Any, bytes]:
    """Return the size of a log, the digest of its first `size` bytes, and complete lines after it.

    A link is refused, because the run would write to the file that it names.
    """
    total = hashlib.sha256()
    try:
        with open_regular(file, follow=False) as stream:
            actual, left = os.fstat(stream.fileno()).st_size, size
            while left and (chunk := stream.read(min(left, 1 << 20))):
                total.update(chunk)
                left -= len(chunk)
            rest = stream.read(min(max(actual - size, 0), MAX_LINE_BYTES))
            return actual, total, rest[: rest.rfind(b"\n") + 1]
    except FileNotFoundError:
        return 0, total, b""
    except OSError as error:
        is_link = error.errno == errno.ELOOP
        reason = "is a link, not a file" if is_link else error.strerror
        raise CheckpointError(
            f"{file}: {reason}, so the run cannot be resumed; restore the file"
        ) from None


# --- Writing -------------------------------------------------------------------------------------


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
        with partial.open("xb") as file:
            file.write(data)
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
