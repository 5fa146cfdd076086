"""Records from whatever holds them: files, directories, saved datasets and the hub.

Data comes as the world keeps it. Every source is read here as a stream of values that know where
they stand; a value that cannot be read is passed on as the error that says why, so that one pass
finds all of them. What a value should hold is for ``rows`` and the loaders.
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
"""Where a value stands, and the value; a DataError in its place says why it could not be read."""

_LONGEST = 2**26
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


def open_records(source: str, subset: str | None, split: str | None) -> Iterator[Record]:
    """Return the records of a file, a directory, a saved dataset or a hub dataset, in order.

    Raises DataError where there is nothing to read, here or while reading, and ConfigurationError
    for a path that cannot be looked up.
    """
    try:
        return _found(source, subset, split)
    except OSError as error:
        raise DataError(f"{source}: cannot be looked up: {error.strerror or error}") from None


def _found(source: str, subset: str | None, split: str | None) -> Iterator[Record]:
    path = looked_up(source)
    if not path.exists() and _HUB_NAME.fullmatch(source) and _kind(path) is None:
        return _hub_dataset(source, subset, split)
    if subset is not None:
        raise DataError(
            f"{path}: `subset` ({subset}) is for hub datasets, not for paths; remove it"
        )
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _saved_dataset(path, split)
        return (record for file in _files_in(path, split) for record in _file(file))
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(path.name, (sibling.name for sibling in siblings))
        guess = f"did you mean {path.parent / near}?" if near else "check the path"
        raise DataError(f"{path}: there is no such file; {guess}")
    if split is not None:
        raise DataError(f"{path}: is one file, so `split` ({split}) picks nothing; remove it")
    return _file(path)


def is_dataset(source: str) -> bool:
    """Whether the source is a saved or a hub dataset, which a library of its own reads."""
    path = looked_up(source)
    if path.is_dir():
        return (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    return not path.exists() and bool(_HUB_NAME.fullmatch(source)) and _kind(path) is None


# --- files and directories ------------------------------------------------------------------------


def _file(path: Path) -> Iterator[Record]:
    kind = _kind(path)
    if kind is None:
        raise DataError(
            f"{path}: its name does not end in {', '.join(_READERS)} (or .gz of the first three), "
            "so its format is unknown; rename or convert it"
        )
    if not path.is_file():
        raise DataError(f"{path}: is a pipe or device, not a file; write its content to a file")
    return _READERS[kind](path)


def _kind(path: Path) -> str | None:
    """Return the ending that says how the file is read, or None."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    kind = next((ending for ending in _READERS if plain.endswith(ending)), None)
    return None if kind == ".parquet" and plain != name else kind


def _files_in(directory: Path, split: str | None) -> list[Path]:
    """Return the data files of the split: train.jsonl.gz, or every train-*.parquet."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and _kind(path))
    held = ", ".join(path.name for path in files) or "no data files"
    if split is None:
        if len(files) == 1:
            return files
        remedy = "set `split` (the name before the dot) or make `path` one file"
        raise DataError(f"{directory}: is a directory that holds {held}; {remedy}")
    stems = {path: path.name.split(".")[0] for path in files}
    chosen = [p for p, stem in stems.items() if stem == split or stem.startswith(f"{split}-")]
    if not chosen:
        raise DataError(f"{directory}: no file there is named {split}.*; it holds {held}")
    return chosen


@contextmanager
def _reading(path: Path) -> Iterator[BufferedIOBase]:
    """Open the file, unzipped; a failure to read it is a DataError."""
    try:
        zipped = path.name.lower().endswith(".gz")
        with gzip.GzipFile(path) if zipped else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read to its end: {reason}") from None


def _lines(path: Path, file: BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    """Yield each line with its place, without a byte order mark."""
    for number in count(1):
        line = file.readline(_LONGEST + 1)
        if not line:
            return
        if len(line) > _LONGEST:
            raise _too_long(f"{path}:{number}")
        yield f"{path}:{number}", line.removeprefix(_BOM) if number == 1 else line


def _too_long(where: str) -> DataError:
    """No text needs this; a small zipped file can hold a line that fills any memory."""
    return DataError(f"{where}: is longer than {_LONGEST:,} bytes, which no row may be; split it")


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where) from None


def _not_utf8(error: UnicodeDecodeError, where: str) -> DataError:
    byte = f"byte {error.object[error.start]:#04x}"
    return DataError(f"{where}: {byte} is not UTF-8; save the file as UTF-8")


def _parquet(path: Path) -> Iterator[Record]:
    parquet = _needed("pyarrow.parquet", f"{path}: a Parquet file", "pyarrow")
    number = 0
    fault = f"{path}: not a readable Parquet file"
    with _columns_read(fault), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row


@contextmanager
def _columns_read(fault: str) -> Iterator[None]:
    """Make a DataError of what Arrow raises for a file it cannot read, or Python for a value."""
    arrow = _needed("pyarrow", fault, "pyarrow")
    try:
        yield
    except (arrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:
        raise DataError(f"{fault}: {first_line(error)}") from None


# --- JSON -----------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Iterator[Record]:
    with _reading(path) as file:
        for where, line in _lines(path, file):
            if line.strip():
                yield where, _json_value(line, where)


def _json_value(line: bytes, where: str) -> Any:
    """Return the line's JSON value, or the DataError that says why it has none."""
    try:
        return json.loads(_decoded(line, where).rstrip())
    except DataError as error:
        return error
    except json.JSONDecodeError as error:
        return DataError(f"{where}: not valid JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return _unreadable(error, where)


def _unreadable(error: Exception, where: str) -> DataError:
    return DataError(f"{where}: not readable as JSON: {str(error).split(';')[0]}")


def _json(path: Path) -> Iterator[Record]:
    """An array of rows, or JSON lines in a file named otherwise."""
    with _reading(path) as file:
        start = file.read(4096).removeprefix(_BOM).lstrip()[:1]
    return _json_array(path) if start == b"[" else _json_lines(path)


def _json_array(path: Path) -> Iterator[Record]:
    """Decode one element at a time, and never hold the file whole."""
    with _reading(path) as file:
        window = _Window(path, file)
        window.expect("[")
        while window.peek() != "]":
            where = window.where
            try:
                value = window.value()
                if window.peek() != "]":
                    window.expect(",")
            except DataError as error:
                yield where, error
                return
            yield where, value
        window.expect("]")
        window.expect("")


class _Window:
    """A moving window on a JSON text: from the value to be read to the end of what was needed."""

    def __init__(self, path: Path, file: BufferedIOBase) -> None:
        self._path, self._file = path, file
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._line = "", 0, 1
        self._size = 2**16

    @property
    def where(self) -> str:
        return f"{self._path}:{self._line}"

    def peek(self) -> str:
        """Move to the next character that is not space and return it; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def expect(self, mark: str) -> None:
        """Move past the mark, which must come next; "" is the end."""
        if self.peek() != mark:
            found, wanted = self.peek() or "the end of the file", mark or "the end of the file"
            raise DataError(f"{self.where}: not valid JSON: found {found} instead of {wanted}")
        self._advance(self._at + len(mark))

    def value(self) -> Any:
        """Decode the value that begins here, reading as far as it goes."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # What is only cut off fails in a string that goes on, or in the last word.
                cut = error.msg.startswith("Untermin") or error.pos + 16 > len(self._text)
                if cut and len(self._text) - self._at > _LONGEST:
                    raise _too_long(self.where) from None
                if cut and self._more():
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

    def _more(self) -> bool:
        """Drop what was read and read on; False at the file's end."""
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
    csv.field_size_limit(_LONGEST)
    header: list[str] | None = None
    with _reading(path) as file:
        reader = csv.reader((_decoded(line, at) for at, line in _lines(path, file)), strict=True)
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
    twice = [name for name, count in Counter(fields).items() if count > 1]
    if twice:
        raise DataError(f"{where}: the column `{one_line(twice[0])}` is there twice; rename one")
    return fields


def _csv_row(header: list[str], fields: list[str], where: str) -> dict[str, str] | DataError:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    return DataError(
        f"{where}: has {len(fields)} fields where the first line names {len(header)} columns; put "
        "text that holds commas or line breaks in double quotes"
    )


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


# --- datasets -------------------------------------------------------------------------------------


def _needed(module: str, what: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{what} needs `{package}`; pip install 'trivium[data]'") from None


def _saved_dataset(path: Path, split: str | None) -> Iterator[Record]:
    datasets = _needed("datasets", f"{path}: a saved dataset", "datasets")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable dataset: {first_line(error)}") from None
    if split is not None and not isinstance(loaded, dict):
        raise DataError(f"{path}: has no splits, so `split` ({split}) picks nothing; remove it")
    return _dataset_rows(loaded, str(path), split)


def _hub_dataset(name: str, subset: str | None, split: str | None) -> Iterator[Record]:
    datasets = _needed("datasets", f"{name}: there is no such path, and a hub dataset", "datasets")
    try:
        loaded = datasets.load_dataset(name, name=subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = f"as a hub dataset it cannot be loaded: {first_line(error)}"
        raise DataError(f"{name}: there is no such path, and {reason}") from None
    return _dataset_rows(loaded, name, split)


def _dataset_rows(loaded: Any, name: str, split: str | None) -> Iterator[Record]:
    """Return the rows of a dataset, or of the named (or only) split where there are several."""
    if isinstance(loaded, dict):
        split = next(iter(loaded)) if split is None and len(loaded) == 1 else split
        if split not in loaded:
            wanted = "`split` is not set" if split is None else f"there is no split {split!r}"
            raise DataError(f"{name}: {wanted}; set `split` to one of {', '.join(loaded)}")
        loaded = loaded[split]
    place = name if split is None else f"{name}[{split}]"
    return _counted_rows(loaded, place)


def _counted_rows(loaded: Any, place: str) -> Iterator[Record]:
    with _columns_read(f"{place}: its rows cannot be read"):
        for number, row in enumerate(loaded, 1):
            yield f"{place}, row {number}", row
