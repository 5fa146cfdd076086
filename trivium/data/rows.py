"""Rows of data, and the count of which were used.

Every loader turns rows into items one at a time, and shares what this module holds: the part of a
configuration that says where the rows are, rows that know where they stand so that every complaint
names its file and line, and a report of what was kept. What a row means is for its loader.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from trivium.config.base import Configuration, Conflict
from trivium.config.paths import looked_up
from trivium.data.files import open_records
from trivium.data.messages import nearest, shortened
from trivium.errors import DataError, one_line

logger = logging.getLogger("trivium")

T = TypeVar("T")

_MOST_FAULTS = 10
_DEEPEST = 100


class RowsConfig(Configuration):
    """Where rows of data come from, and what their columns are called."""

    path: str
    """A .jsonl, .json, .csv (each also .gz) or .parquet file, a directory, or a hub name."""
    subset: str | None = None
    """The configuration of a hub dataset, such as main for openai/gsm8k."""
    split: str | None = None
    """The split of a directory or hub dataset, such as train."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows, from the first."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our name for a column: the data's name for it, as in {prompt: question}."""

    def inputs(self) -> Iterator[Path]:
        """The file or directory; of a hub name there is none."""
        path = looked_up(self.path)
        if path.exists():
            yield path

    known_columns: ClassVar[frozenset[str] | None] = None

    def reads(self, column: str) -> bool:
        """Whether a row's column, by our name or the data's, is read, or may be by what is given
        all columns."""
        known = self.known_columns
        return known is None or column in known or column in self.columns.values()

    def conflicts(self) -> Iterator[Conflict]:
        if not self.path:
            yield "path", "it must not be empty: write a file, a directory or a hub name"
        known = self.known_columns
        unknown = [] if known is None else sorted(set(self.columns) - known)
        if known and unknown:
            yield (
                "columns",
                f"`columns` gives a source for {', '.join(unknown)}, which nothing here reads; "
                f"it may name {', '.join(sorted(known))}",
            )


@dataclass(frozen=True)
class Row:
    """One row: its columns, its number in the data (from 0), and where it stands."""

    columns: dict[str, Any]
    index: int
    where: str

    def has(self, name: str) -> bool:
        """Whether the row has the column and it is not null."""
        return self.columns.get(name) is not None

    def column(self, name: str) -> Any:
        """The column's value; a DataError that lists the columns where it is missing or null."""
        if self.has(name):
            return self.columns[name]
        if name in self.columns:
            raise DataError(f"column `{name}` is null; give it a value or remove the row")
        held = nearest(name, self.columns) or next(iter(self.columns), "its_name")
        raise DataError(
            f"no column `{name}`; the columns are {self.names()}. If one of them holds it, say so: "
            f"`columns: {{{name}: {held}}}`"
        )

    def text(self, name: str) -> str:
        """The column's value, which must be text."""
        return checked_text(self.column(name), f"column `{name}`")

    def names(self) -> str:
        """The columns' names, to be shown."""
        return ", ".join(map(str, self.columns)) or "(none)"


class Dropped(Exception):
    """A row that is not used, for a reason that is counted."""


class Notes(Counter[str]):
    """Remarks on rows, counted by their text, and how many rows came in which form."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: Counter[str] = Counter()


@dataclass(frozen=True)
class LoadReport:
    """How many rows were read and kept, why the others were dropped or changed, what is unread."""

    source: str
    rows: int
    kept: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.rows:,} rows read, {self.kept:,} kept"]
        parts += [f"{count:,} dropped: {reason}" for reason, count in self.dropped.items()]
        parts += [f"{count:,} noted: {note}" for note, count in self.notes.items()]
        parts += [f"columns that are not read: {', '.join(self.unread)}"] if self.unread else []
        return one_line("; ".join(parts))


@dataclass
class Pass:
    """One pass over the rows of a configuration, and what it has met so far."""

    config: RowsConfig
    rows: int = 0
    columns: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Notes = field(default_factory=Notes)

    def items(self, convert: Callable[[Row, Notes], T], most: int | None = None) -> Iterator[T]:
        """Yield what `convert` makes of each row, of the first `most` if it is given.

        Ends after ten faulty rows.
        """
        for row in islice(read_rows(self.config), most):
            self.rows += 1
            if isinstance(row, DataError):
                self.faults.append(one_line(str(row)))
            else:
                self.columns.update(row.columns.keys())
                try:
                    yield convert(row, self.notes)
                except Dropped as reason:
                    self.dropped[str(reason)] += 1
                except DataError as error:
                    self.faults.append(one_line(f"{row.where}: {error}"))
            if len(self.faults) == _MOST_FAULTS:
                self.faults.append(
                    f"reading stopped after {_MOST_FAULTS} faulty rows; there may be more"
                )
                return

    def report(self, kept: int) -> LoadReport:
        """What was read and kept. Raises one DataError for all faults, or where no row is left."""
        if self.faults:
            raise DataError("\n".join(self.faults))
        config = self.config
        source = config.path if config.split is None else f"{config.path}[{config.split}]"
        notes = dict(self.notes)
        if len(self.notes.forms) > 1:
            forms = ", ".join(f"{n:,} as {form}" for form, n in self.notes.forms.items())
            notes[f"rows differ in form ({forms})"] = min(self.notes.forms.values())
        unread = tuple(name for name in self.columns if not config.reads(name))
        report = LoadReport(source, self.rows, kept, self.dropped, notes, unread)
        if kept:
            return report
        raise DataError(
            f"{report}; nothing is left: give rows that can be used"
            if self.rows
            else f"{source}: holds no rows; write at least one, or name another file"
        )


def collect(
    config: RowsConfig,
    convert: Callable[[Row, Notes], T],
    same: Callable[[T], Hashable] | None = None,
) -> tuple[list[T], LoadReport]:
    """Convert every row, count those that `convert` drops, and log the report.

    `convert` may raise Dropped, or DataError without the place (it is added here), and count its
    remarks in the notes. Items for which `same` is equal are noted as duplicates; all are kept.
    Raises one DataError for the first ten faults, or where no row is left.
    """
    this = Pass(config)
    items = list(this.items(convert))
    if same is not None and not this.faults:
        twice = len(items) - len({hash(same(item)) for item in items})
        if twice:
            this.notes["the same as an earlier row"] += twice
    report = this.report(len(items))
    level = logging.WARNING if report.dropped or report.notes else logging.INFO
    logger.log(level, "%s", report)
    return items, report


def read_rows(config: RowsConfig) -> Iterator[Row | DataError]:
    """Yield the rows in order; a DataError stands in for a row that cannot be read.

    Raises DataError where the data as a whole cannot be read.
    """
    records = open_records(config.path, config.subset, config.split)
    for index, (where, value) in enumerate(islice(records, config.limit)):
        if isinstance(value, DataError):
            yield value
        elif _nests_deeper(value, _DEEPEST):
            yield DataError(f"{where}: values nest more than {_DEEPEST} deep; flatten them")
        elif not isinstance(value, dict):
            yield DataError(
                f"{where}: holds {shortened(value)}, not a row; write an object, {{column: value}}"
            )
        elif any(source not in value for source in config.columns.values()):
            yield DataError(f"{where}: {_missing_sources(config, value)}")
        else:
            named = {name: value[source] for name, source in config.columns.items()}
            yield Row(value | named, index, where)


def _nests_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects stand in each other more than so many levels deep.

    What reads or writes values later, such as a chat template, goes one call deeper with each.
    """
    inside = [value]
    for _ in range(levels + 1):
        holders = [held for held in inside if isinstance(held, dict | list)]
        if not holders:
            return False
        inside = [p for h in holders for p in (h.values() if isinstance(h, dict) else h)]
    return True


def _missing_sources(config: RowsConfig, row: dict[str, Any]) -> str:
    parts = []
    for name, source in config.columns.items():
        if source not in row:
            near = nearest(source, row)
            guess = f" (did you mean `{near}`?)" if near else ""
            parts.append(f"no column `{source}`, which `columns` names for {name}{guess}")
    return f"{'; '.join(parts)}; the columns are {', '.join(map(str, row)) or '(none)'}"


def checked_text(value: Any, what: str) -> str:
    """Return `value` if it is text that has a UTF-8 form; `what` names it in the DataError."""
    if not isinstance(value, str):
        raise DataError(
            f"{what} is {shortened(value)} ({type(value).__name__}), not text; put it in quotes or "
            "name another column"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} holds half of a surrogate pair at character {error.start}, which is not text; "
            "repair the escape (\\ud8.. to \\udf..) in the file"
        ) from None
    return value
