"""Journal of a command that computes rows in batches: what is done survives an interruption.

The journal is a file beside the output, with one line for what the batches depend on and one line
for each batch. Rerunning the command continues after the last complete line. The output appears,
whole, when all batches are done.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trivium.commands.output import unwritable
from trivium.config.base import Configuration
from trivium.errors import ConfigurationError
from trivium.runs import files
from trivium.runs.provenance import digest, source_digest, versions
from trivium.runs.store import json_line

Batch = dict[str, Any]
"""One batch: its `rows`, and values that the command continues with."""
_DEPENDS_ON = "depends_on"


def identity(config: Configuration, without: set[str]) -> dict[str, Any]:
    """Return what the rows depend on: settings, input files, and the code that computes them."""
    inputs = {str(path): digest(path) for path in sorted(set(config.inputs()))}
    settings = config.model_dump(mode="json", exclude=without)
    code = {"python": platform.python_version(), **versions(), "source": source_digest()}
    return {**settings, **inputs, **code}


class Journal:
    """Batches of a file of rows that is not complete yet.

    Args:
        output: the file of rows; the journal is `….partial` beside it.
        depends_on: see ``identity``.
        overwrite: start over if the journal depends on something else.

    Raises:
        ConfigurationError: the journal is no journal, or depends on something else.
    """

    def __init__(self, output: Path, depends_on: Mapping[str, Any], *, overwrite: bool) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.head = json.loads(json_line({_DEPENDS_ON: depends_on}))
        old, self.batches = self._read()
        changed = _changes(old, self.head[_DEPENDS_ON]) if old is not None else []
        if changed and not overwrite:
            raise ConfigurationError(
                f"output = {output}: {self.path.name} has unfinished rows, and they depend on "
                f"something else now ({', '.join(changed)}): restore it to continue them, or "
                f"delete {self.path.name} to start over"
            )
        self.batches = [] if changed else self.batches
        if self.batches:
            self._write([self.head, *self.batches])  # A half line at the end is left out.

    def add(self, batch: Batch) -> None:
        """Write a batch. It has reached the disk when this returns."""
        if not self.batches:
            self._write([self.head])
        self.batches.append(batch)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                print(json_line(batch), file=file, flush=True)
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from None

    def finish(self) -> None:
        """Write the rows of all batches to the output, and remove the journal."""
        rows = [row for batch in self.batches for row in batch["rows"]]
        try:
            files.write_bytes(self.output, "".join(f"{json_line(r)}\n" for r in rows).encode())
            self.path.unlink()
        except OSError as error:
            raise unwritable(self.output, error) from None

    def discard(self) -> None:
        """Remove the journal: its batches can give no output."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Any] | None, list[Batch]]:
        """Return what a journal on the disk depends on, and its complete batches."""
        if not self.path.exists():
            return None, []
        *lines, _ = self.path.read_bytes().split(b"\n")
        if not lines:
            return None, []
        try:
            head, *batches = [json.loads(line) for line in lines]
            return head[_DEPENDS_ON], [batch | {"rows": batch["rows"]} for batch in batches]
        except (ValueError, TypeError, KeyError):
            raise ConfigurationError(
                f"output = {self.output}: {self.path.name} is not an unfinished file of this "
                "command, or it is damaged: delete it, or name another output"
            ) from None

    def _write(self, lines: list[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(self.path, "".join(f"{json_line(x)}\n" for x in lines).encode())
        except OSError as error:
            raise unwritable(self.path, error) from None


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys([*old, *new])
    return [name for name in names if name not in old or name not in new or old[name] != new[name]]
