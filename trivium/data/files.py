"""Readers of data sources: files, directories, saved datasets and hub datasets.

Every source is read as a stream of values with their file and line. A value that cannot be read is
yielded as its error, so that one pass finds all errors. The contents of the values are checked by
``rows`` and the loaders.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from itertools import count
from pathlib import Path
from typing import Any

from trivium.config.paths import looked_up
from trivium.data.messages import first_line, nearest
from trivium.errors import DataError, one_line

Record = tuple[str, Any]
"""The file and line of a value, and the value, or a DataError if it could not be read."""

_MAX_BYTES = 2**26
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


def open_records(source: str, subset: str | None, split: str | None) -> Iterator[Record]:
    """Return the records of a file, a directory, a saved dataset or a hub dataset, in order.

    Raises DataError, at once or during iteration, if the source cannot be read, and
    ConfigurationError if the path cannot be resolved.
    """
    try:
        return _open_source(source, subset, split)
    except OSError as error:
        raise DataError(f"{source}: cannot be accessed: {error.strerror or error}") from None


def _open_source(source: str, subset: str | None, split: str | None) -> Iterator[Record]:
    path = looked_up(source)
    if not path.exists() and _HUB_NAME.fullmatch(source) and _format(path) is None:
        return _hub_dataset(source, subset, split)
    if subset is not None:
        raise DataError(
            f"{path}: `subset` ({subset}) is for hub datasets, not for paths; remove it"
        )
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _saved_dataset(path, split)
        return (record for file in _files_of_split(path, split) for record in _read_file(file))
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(path.name, (sibling.name for sibling in siblings))
        guess = f"did you mean {path.parent / near}?" if near else "check the path"
        raise DataError(f"{path}: there is no such file; {guess}")
    if split is not None:
        raise DataError(f"{path}: is a single file, which has no `split` ({split}); remove it")
    return _read_file(path)


def is_dataset(source: str) -> bool:
    """Whether the source is a saved or a hub dataset, which the `datasets` library reads."""
    path = looked_up(source)
    if path.is_dir():
        return (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    return not path.exists() and bool(_HUB_NAME.fullmatch(source)) and _format(path) is None


# --- files and directories ------------------------------------------------------------------------


def _read_file(path: Path) -> Iterator[Record]:
    extension = _format(path)
    if extension is None:
        raise DataError(
            f"{path}: its name does not end in {', '.join(_READERS)} (or .gz of the first three), "
            "so its format is unknown; rename or convert it"
        )
    if not path.is_file():
        raise DataError(f"{path}: is a pipe or device, not a file; write its content to a file")
    return _READERS[extension](path)


def _format(path: Path) -> str | None:
    """Return the file extension that selects the reader, or None if there is no reader."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    extension = next((known for known in _READERS if plain.endswith(known)), None)
    return None if extension == ".parquet" and plain != name else extension


def _files_of_split(directory: Path, split: str | None) -> list[Path]:
    """Return the data files of the split: train.jsonl.gz, or every train-*.parquet."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and _format(path))
    names = ", ".join(path.name for path in files) or "no data files"
    if split is None:
        if len(files) == 1:
            return files
        remedy = "set `split` (the file name before the dot) or set `path` to one file"
        raise DataError(f"{directory}: is a directory with {names}; {remedy}")
    stems = {path: path.name.split(".")[0] for path in files}
    chosen = [p for p, stem in stems.items() if stem == split or stem.startswith(f"{split}-")]
    if not chosen:
        raise DataError(f"{directory}: has no file named {split}.*; its files are {names}")
    return chosen


@contextmanager
def _open_file(path: Path) -> Iterator[BufferedIOBase]:
    """Open the file, decompressed; raise DataError if it cannot be read."""
    try:
        zipped = path.name.lower().endswith(".gz")
        with gzip.GzipFile(path) if zipped else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _lines(path: Path, file: BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    """Yield each line, without a byte order mark, after its file and line number."""
    for number in count(1):
        line = file.readline(_MAX_BYTES + 1)
        if not line:
            return
        if len(line) > _MAX_BYTES:
            raise _too_long(f"{path}:{number}")
        yield f"{path}:{number}", line.removeprefix(_BOM) if number == 1 else line


def _too_long(where: str) -> DataError:
    """Return the error for a row above the size limit.

    Without the limit, a small compressed file could hold a line that exhausts the memory.
    """
    return DataError(f"{where}: is longer than the limit of {_MAX_BYTES:,} bytes a row; split it")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from None


def _not_utf8(error: UnicodeDecodeError, where: str) -> DataError:
    byte = f"byte {error.object[error.start]:#04x}"
    return DataError(f"{where}: {byte} is not UTF-8; save the file as UTF-8")


def _parquet(path: Path) -> Iterator[Record]:
    parquet = _import("pyarrow.parquet", f"{path}: a Parquet file", "pyarrow")
    number = 0
    message = f"{path}: not a readable Parquet file"
    with _arrow_errors(message), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


@contextmanager
def _arrow_errors(message: str) -> Iterator[None]:
    """Convert the errors of Arrow for a file, and of Python for a value, to DataError."""
    arrow = _import("pyarrow", message, "pyarrow")
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:
        raise DataError(f"{message}: {first_line(error)}") from None


# --- JSON -----------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[Record]:
    with _open_file(path) as file:
        for where, line in _lines(path, file):
            if line.strip():
                yield where, _json_value(line, where)


def _json_value(line: bytes, where: str) -> Any:
    """Return the line's JSON value, or a DataError with the reason if the line is not valid."""
    try:
        return json.loads(_decode(line, where).rstrip())
    except DataError as error:
        return error
    except json.JSONDecodeError as error:
        return DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return _unreadable(error, where)


def _unreadable(error: Exception, where: str) -> DataError:
    return DataError(f"{where}: not readable as JSON: {str(error).split(';')[0]}")


def _json(path: Path) -> Iterator[Record]:
    """Return the rows of a JSON array, or of JSON lines in a file named .json."""
    with _open_file(path) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()[:1]
    return _json_array(path) if start == b"[" else _json_lines(path)


def _json_array(path: Path) -> Iterator[Record]:
    """Decode one element at a time, without the whole file in memory."""
    with _open_file(path) as file:
        reader = _JsonReader(path, file)
        reader.expect("[")
        while reader.peek() != "]":
            where = reader.where
            try:
                value = reader.value()
                if reader.peek() != "]":
                    reader.expect(",")
            except DataError as error:
                yield where, error
                return
            yield where, value
        reader.expect("]")
        reader.expect("")


class _JsonReader:
    """Incremental reader of JSON text that buffers only the current value."""

    def __init__(self, path: Path, file: BufferedIOBase) -> None:
        self._path, self._file = path, file
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._line = "", 0, 1
        self._size = 2**16

    @property
    def where(self) -> str:
        """The file and line of the next character."""
        return f"{self._path}:{self._line}"

    def peek(self) -> str:
        """Skip whitespace and return the next character, or "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text) or not self._read_chunk():
                return self._text[self._at : self._at + 1]

    def expect(self, mark: str) -> None:
        """Skip the mark, or raise DataError if it does not come next; "" means the end."""
        if self.peek() != mark:
            found, expected = self.peek() or "the end of the file", mark or "the end of the file"
            raise DataError(f"{self.where}: not valid JSON: found {found} instead of {expected}")
        self._advance(self._at + len(mark))

    def value(self) -> Any:
        """Decode and return the next value; read more of the file as needed."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A value that is only incomplete fails in an open string or near the buffer's end.
                incomplete = error.msg.startswith("Untermin") or error.pos + 16 > len(self._text)
                if incomplete and len(self._text) - self._at > _MAX_BYTES:
                    raise _too_long(self.where) from None
                if incomplete and self._read_chunk():
                    continue
                self._advance(error.pos)
                raise DataError(f"{self.where}: not valid JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise _unreadable(error, self.where) from None
            self._advance(end)
            return value

    def _advance(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _read_chunk(self) -> bool:
        """Drop the decoded text and read the next chunk; return False at the file's end."""
        if self._at == 0:
            self._size *= 2
        chunk = self._file.read(self._size)
        self._text, self._at = self._text[self._at :], 0
        try:
            self._text += self._bytes.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            self._line += self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise _not_utf8(error, self.where) from None
        return bool(chunk)


# --- CSV ------------------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(_MAX_BYTES)
    header: list[str] | None = None
    with _open_file(path) as file:
        lines = (_decode(line, where) for where, line in _lines(path, file))
        reader = csv.reader(lines, strict=True)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{where}: not valid CSV: {error}; check its quotes") from None
            if fields is None:
                return
            if header is None:
                header = _checked_header(fields, where)
            elif fields:
                yield where, _csv_row(header, fields, where)


def _checked_header(fields: list[str], where: str) -> list[str]:
    repeated = [name for name, count in Counter(fields).items() if count > 1]
    if repeated:
        raise DataError(f"{where}: column `{one_line(repeated[0])}` appears twice; rename one")
    return fields


def _csv_row(header: list[str], fields: list[str], where: str) -> dict[str, str] | DataError:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    return DataError(
        f"{where}: has {len(fields)} fields, and the first line names {len(header)} columns; put "
        "text with commas or line breaks in double quotes"
    )


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


# --- datasets -------------------------------------------------------------------------------------


def _import(module: str, source: str, package: str) -> Any:
    """Import an optional module; raise DataError if its package is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{source} needs `{package}`; pip install 'trivium[data]'") from None


def _saved_dataset(path: Path, split: str | None) -> Iterator[Record]:
    datasets = _import("datasets", f"{path}: a saved dataset", "datasets")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable dataset: {first_line(error)}") from None
    if split is not None and not isinstance(loaded, dict):
        raise DataError(f"{path}: has no splits; remove `split` ({split})")
    return _dataset_rows(loaded, str(path), split)


def _hub_dataset(name: str, subset: str | None, split: str | None) -> Iterator[Record]:
    datasets = _import("datasets", f"{name}: there is no such path, and a hub dataset", "datasets")
    try:
        loaded = datasets.load_dataset(name, name=subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"as a hub dataset it cannot be loaded: {first_line(error)}"
        raise DataError(f"{name}: there is no such path, and {reason}") from None
    return _dataset_rows(loaded, name, split)


def _dataset_rows(loaded: Any, name: str, split: str | None) -> Iterator[Record]:
    """Return the rows of a dataset, or of its named (or only) split if it has splits."""
    if isinstance(loaded, dict):
        split = next(iter(loaded)) if split is None and len(loaded) == 1 else split
        if split not in loaded:
            reason = "`split` is not set" if split is None else f"there is no split {split!r}"
            raise DataError(f"{name}: {reason}; set `split` to one of {', '.join(loaded)}")
        loaded = loaded[split]
    label = name if split is None else f"{name}[{split}]"
    return _numbered_rows(loaded, label)


def _numbered_rows(loaded: Any, label: str) -> Iterator[Record]:
    with _arrow_errors(f"{label}: its rows cannot be read"):
        for number, row in enumerate(loaded, 1):
            yield f"{label}, row {number}", row
