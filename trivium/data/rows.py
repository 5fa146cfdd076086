"""Rows of data, and a report of the rows used.

Every loader converts rows to items one at a time. The loaders share this module: the configuration
of the source, rows that know their file and line so that every error message names them, and a
report of the rows kept and dropped. Each loader defines the meaning of a row.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from trivium.config.base import Conflict
from trivium.data.chat_columns import read_chats
from trivium.data.messages import checked_text, nearest
from trivium.data.sources import (
    EmptySource,
    MixedSource,
    Read,
    SourceConfig,
    in_proportion,
)
from trivium.errors import DataError, one_line

logger = logging.getLogger("trivium")

T = TypeVar("T")

_MAX_FAULTS = 10
_MAX_NAMED_ROWS = 3


class RowsConfig(SourceConfig):
    """Source of the rows, or a mixture of sources, and the names of their columns."""

    path: str = ""
    """A .jsonl, .json, .csv (each also .gz) or .parquet file, a directory, or a hub name."""
    mixture: tuple[MixedSource, ...] = ()
    """Several sources instead of path, with weights: rows alternate so that every source has its
    share of any number of first rows (docs/data.md)."""
    exhausted: Literal["stop", "repeat"] = "stop"
    """When a source of a weighted mixture has no further row: end the mixture, or start the source
    again until each has been read to its end."""
    source_column: str = Field(default="source", min_length=1)
    """Column that a mixture adds to its rows, with the name of their source."""

    def inputs(self) -> Iterator[Path]:
        """Yield the files and directories; nothing for a hub dataset."""
        for source in self.sources:
            yield from SourceConfig.inputs(source)

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the mixture, or this one."""
        return self.mixture or (self,)

    @property
    def place(self) -> str:
        """The paths with their splits, for messages."""
        if not self.mixture:
            return super().place
        return f"mixture of {', '.join(source.label for source in self.mixture)}"

    known_columns: ClassVar[frozenset[str] | None] = None

    def uses_column(self, column: str) -> bool:
        """Whether the loader uses the column, under Trivium's name or the data's.

        Always true if `known_columns` is None: all columns are passed on.
        """
        known = self.known_columns
        return known is None or column in known or column in self.columns.values()

    def conflicts(self) -> Iterator[Conflict]:
        if self.mixture:
            yield from self._mixture_conflicts()
        elif not self.path:
            yield (
                "path",
                "is missing: it must be a file, a directory or a hub name, unless a mixture is "
                "given",
            )
        known = self.known_columns
        for source in self.sources:
            unknown = [] if known is None else sorted(set(source.columns) - known)
            if known and unknown:
                yield (
                    "mixture" if self.mixture else "columns",
                    f"`columns` gives a source for {', '.join(unknown)}, which this section does "
                    f"not use; it may name {', '.join(sorted(known))}",
                )

    def _mixture_conflicts(self) -> Iterator[Conflict]:
        for name in ("path", "subset", "split", "columns"):
            if getattr(self, name):
                yield name, "a mixture has it in each of its sources: move it there"
        labels = [source.label for source in self.mixture]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            yield "mixture", f"two sources are called {twice!r}: give one another name"
        weights = [source.weight for source in self.mixture]
        if None in weights and any(weights):
            without = labels[weights.index(None)]
            yield "mixture", f"{without!r} has no weight, and another source has: weigh all or none"
        if any(not source.path for source in self.mixture):
            yield "mixture", "a source has an empty path: write a file, a directory or a hub name"


@dataclass(frozen=True)
class Row:
    """One row: its columns, its number in the data (from 0), its file and line, and its source."""

    columns: dict[str, Any]
    index: int
    where: str
    source: str = ""
    """Name of its source in a mixture."""

    def has(self, name: str) -> bool:
        """Whether the row has the column with a value other than null."""
        return self.columns.get(name) is not None

    def column(self, name: str) -> Any:
        """Return the column's value.

        Raises DataError, with the names of all columns, if the column is missing or null.
        """
        if self.has(name):
            return self.columns[name]
        if name in self.columns:
            raise DataError(f"column `{name}` is null; give it a value or remove the row")
        guess = nearest(name, self.columns) or next(iter(self.columns), "its_name")
        raise DataError(
            f"no column `{name}`; the columns are {self.names()}. If another column holds it, set "
            f"`columns: {{{name}: {guess}}}`"
        )

    def text(self, name: str) -> str:
        """Return the column's value; raise DataError if it is not text."""
        return checked_text(self.column(name), f"column `{name}`")

    def names(self) -> str:
        """Return the names of the columns, for messages."""
        return ", ".join(map(str, self.columns)) or "(none)"


class DropRow(Exception):
    """Raised to leave out a row; the message is the reason, which the report counts."""


class Notes(Counter[str]):
    """Number of rows per remark, and in `forms` the number of rows per form of the data.

    Attributes:
        where: file and line of the current row.
        rows: file and line of the first rows with a remark of `remark`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forms: Counter[str] = Counter()
        self.where = ""
        self.rows: dict[str, list[str]] = {}
        self._remarked: set[str] = set()

    def begin(self, where: str) -> None:
        """Begin a row."""
        self.where = where
        self._remarked.clear()

    def remark(self, text: str) -> None:
        """Count the current row for a remark, once."""
        if text not in self._remarked:
            self._remarked.add(text)
            self[text] += 1
            rows = self.rows.setdefault(text, [])
            rows += [self.where] if len(rows) < _MAX_NAMED_ROWS else []


@dataclass(frozen=True)
class LoadReport:
    """Number of rows read and kept, reasons for dropped and changed rows, unused columns, and the
    rows of each source of a mixture."""

    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    unused_columns: tuple[str, ...] = ()
    noted_rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.rows:,} rows read, {self.kept:,} kept"]
        parts += [f"{count:,} of {source}" for source, count in self.sources.items()]
        parts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        parts += [
            f"{count:,} noted: {note}{self._named_rows(note)}" for note, count in self.notes.items()
        ]
        if self.unused_columns:
            parts.append(f"unused columns: {', '.join(self.unused_columns)}")
        return one_line("; ".join(parts))

    def _named_rows(self, note: str) -> str:
        rows = self.noted_rows.get(note)
        if not rows:
            return ""
        return f" ({'; '.join(rows)}{'; …' if self.notes[note] > len(rows) else ''})"


@dataclass
class RowReader:
    """One pass over the rows of a configuration, with counts of the rows read so far."""

    config: RowsConfig
    rows: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    notes: Notes = field(default_factory=Notes)

    def items(self, convert: Callable[[Row, Notes], T], max_rows: int | None = None) -> Iterator[T]:
        """Yield `convert(row, notes)` for each row, or for the first `max_rows` rows.

        Stops after ten faulty rows.
        """
        for row in islice(read_rows(self.config), max_rows):
            self.rows += 1
            if isinstance(row, DataError):
                self.faults.append(one_line(str(row)))
            else:
                self.columns.update(row.columns.keys())
                self.sources.update([row.source] if row.source else [])
                self.notes.begin(row.where)
                try:
                    yield convert(
                        replace(row, columns=read_chats(row.columns, self.notes.remark)), self.notes
                    )
                except DropRow as reason:
                    self.dropped[str(reason)] += 1
                except DataError as error:
                    self.faults.append(one_line(f"{row.where}: {error}"))
            if len(self.faults) == _MAX_FAULTS:
                self.faults.append(
                    f"reading stopped after {_MAX_FAULTS} faulty rows; there may be more"
                )
                return

    def report(self, kept: int) -> LoadReport:
        """Return the report of the rows read and kept.

        Raises DataError with all faults, or if no row was kept.
        """
        if self.faults:
            raise DataError("\n".join(self.faults))
        config = self.config
        source = config.place
        notes = dict(self.notes)
        if len(self.notes.forms) > 1:
            forms = ", ".join(f"{n:,} as {form}" for form, n in self.notes.forms.items())
            notes[f"rows differ in form ({forms})"] = min(self.notes.forms.values())
        unused = tuple(name for name in self.columns if not config.uses_column(name))
        report = LoadReport(
            source, self.rows, kept, self.dropped, notes, unused, self.notes.rows, self.sources
        )
        if kept:
            return report
        raise DataError(
            f"{report}; no row is left: give rows that can be used"
            if self.rows
            else f"{source}: contains no rows; write at least one, or name another file"
        )


def collect(
    config: RowsConfig,
    convert: Callable[[Row, Notes], T],
    dedup_key: Callable[[T], Hashable] | None = None,
) -> tuple[list[T], LoadReport]:
    """Convert every row, and log and return the report of kept and dropped rows.

    `convert` may raise DropRow, or DataError without file and line (they are added here), and may
    count remarks in the notes. The report counts items with equal `dedup_key` as duplicates; all
    are kept. Raises DataError with the first ten faults, or if no row is left.
    """
    reader = RowReader(config)
    items = list(reader.items(convert))
    if dedup_key is not None and not reader.faults:
        duplicates = len(items) - len({hash(dedup_key(item)) for item in items})
        if duplicates:
            reader.notes["the same as an earlier row"] += duplicates
    report = reader.report(len(items))
    level = logging.WARNING if report.dropped or report.notes else logging.INFO
    logger.log(level, "%s", report)
    return items, report


def read_rows(config: RowsConfig) -> Iterator[Row | DataError]:
    """Yield the rows in order, with a DataError in place of each row that cannot be read.

    Raises DataError if a source cannot be read at all, or is empty in a mixture.
    """
    records = _mixed(config) if config.mixture else (("", record) for record in config.read())
    for index, (source, (where, columns)) in enumerate(islice(records, config.limit)):
        if isinstance(columns, DataError):
            yield columns
        elif source and config.known_columns is None and config.source_column in columns:
            yield DataError(
                f"{where}: has a column `{config.source_column}`, which the mixture adds: set "
                "`source_column` to another name"
            )
        else:
            added = (
                {config.source_column: source} if source and config.known_columns is None else {}
            )
            yield Row(columns | added, index, where, source)


def _mixed(config: RowsConfig) -> Iterator[tuple[str, tuple[str, Read]]]:
    """Yield the rows of a mixture, each with the name of its source."""
    starts = [source.read for source in config.mixture]
    weights = [source.weight for source in config.mixture]
    labels = [source.label for source in config.mixture]
    if None in weights:
        for label, start in zip(labels, starts, strict=True):
            yield from ((label, record) for record in start())
        return
    try:
        numbers = [weight for weight in weights if weight is not None]
        for number, record in in_proportion(starts, numbers, repeat=config.exhausted == "repeat"):
            yield labels[number], record
    except EmptySource as empty:
        place = config.mixture[empty.args[0]].place
        raise DataError(f"{place}: contains no rows; write at least one, or leave it out") from None
