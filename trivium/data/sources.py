"""Sources of rows: one, or a mixture of several in given proportions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from trivium.config.base import Configuration
from trivium.config.paths import looked_up
from trivium.data.files import open_records
from trivium.data.messages import nearest, shortened
from trivium.errors import DataError

T = TypeVar("T")

_MAX_NESTING = 100

Read = dict[str, Any] | DataError
"""The columns of a row, or why it cannot be read."""


class SourceConfig(Configuration):
    """One file, directory or hub dataset, and the names of its columns."""

    path: str
    """A .jsonl, .json, .csv (each also .gz) or .parquet file, a directory, or a hub name."""
    subset: str | None = None
    """The configuration of a hub dataset, such as main for openai/gsm8k."""
    split: str | None = None
    """The split of a directory or hub dataset, such as train."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows, from the first."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Trivium's name of a column: its name in the data, as in {prompt: question}."""

    def inputs(self) -> Iterator[Path]:
        """Yield the file or directory; nothing for a hub dataset."""
        path = looked_up(self.path) if self.path else None
        if path is not None and path.exists():
            yield path

    @property
    def place(self) -> str:
        """The path with its split, for messages."""
        return self.path if self.split is None else f"{self.path}[{self.split}]"

    def read(self) -> Iterator[tuple[str, Read]]:
        """Yield the file and line of each row, and its columns or a DataError in their place.

        Raises DataError if the source cannot be read at all.
        """
        records = open_records(self.path, self.subset, self.split)
        for where, value in islice(records, self.limit):
            yield where, _row(where, value, self.columns)


class MixedSource(SourceConfig):
    """One source of a mixture."""

    name: str | None = Field(default=None, min_length=1)
    """Name of the source in counts and in the rows' column; by default its path."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the rows, relative to the weights of the other sources. Without weights, all rows of
    all sources are read, one source after the other."""

    @property
    def label(self) -> str:
        return self.name or self.place


def in_proportion(
    sources: Sequence[Callable[[], Iterator[T]]], weights: Sequence[float], *, repeat: bool
) -> Iterator[tuple[int, T]]:
    """Yield items of several sources, each with the number of its source, in a fixed order.

    Among the first n items, source i has ``n · w_i/Σ w`` of them, up to a difference below 1: the
    next item is from the source that is furthest behind, the first of several.

    Args:
        sources: each starts an iteration over a source from its beginning.
        weights: one positive weight per source.
        repeat: start a source that ends from its beginning, until each has ended once; otherwise
            end with the first that has no further item.

    Raises:
        EmptySource: a source has no item.
    """
    total, taken = sum(weights), [0] * len(sources)
    iterators = [source() for source in sources]
    ended = [False] * len(sources)
    while True:
        count = sum(taken) + 1
        behind = [weight / total * count - n for weight, n in zip(weights, taken, strict=True)]
        chosen = behind.index(max(behind))
        item = next(iterators[chosen], None)
        if item is None:
            if taken[chosen] == 0:
                raise EmptySource(chosen)
            ended[chosen] = True
            if not repeat or all(ended):
                return
            iterators[chosen] = sources[chosen]()
            item = next(iterators[chosen])
        taken[chosen] += 1
        yield chosen, item


class EmptySource(Exception):
    """A source of a mixture has no rows; the argument is its number."""


def _row(where: str, value: Any, columns: dict[str, str]) -> Read:
    """Return a record's columns, also under their names in ``columns``, or why it is no row."""
    if isinstance(value, DataError):
        return value
    if _nests_deeper(value, _MAX_NESTING):
        return DataError(
            f"{where}: values are nested more than {_MAX_NESTING} levels deep; flatten them"
        )
    if not isinstance(value, dict):
        return DataError(
            f"{where}: is {shortened(value)}, not a row; write an object, {{column: value}}"
        )
    if any(own not in value for own in columns.values()):
        return DataError(f"{where}: {_missing_columns(columns, value)}")
    return value | {name: value[own] for name, own in columns.items()}


def _nests_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep.

    Later code, such as a chat template, recurses once per level.
    """
    values = [value]
    for _ in range(levels + 1):
        containers = [v for v in values if isinstance(v, dict | list)]
        if not containers:
            return False
        values = [v for c in containers for v in (c.values() if isinstance(c, dict) else c)]
    return True


def _missing_columns(columns: dict[str, str], row: dict[str, Any]) -> str:
    parts = []
    for name, own in columns.items():
        if own not in row:
            near = nearest(own, row)
            guess = f" (did you mean `{near}`?)" if near else ""
            parts.append(f"no column `{own}`, which `columns` gives for {name}{guess}")
    return f"{'; '.join(parts)}; the columns are {', '.join(map(str, row)) or '(none)'}"
