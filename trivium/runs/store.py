"""Files of a run directory: configuration, provenance, logs and models.

    run.json           kind, start time, and versions of Python, Trivium and its dependencies
    config.yaml        the whole configuration, defaults included
    metrics.jsonl      metrics, one line per training step
    evaluation.jsonl   results, one line per evaluation on held-out prompts
    samples.jsonl      a few responses of evaluations and training steps
    outcomes.jsonl     the reward of every held-out response, by prompt
    events.jsonl       other events
    checkpoints/       the run's state, to resume from
    final/ ...         models

Lines are strict JSON, and each append writes one complete line. A number that is not finite is
written as the text "NaN", "Infinity" or "-Infinity", which `read_metrics` and `read_evaluations`
convert back. Models appear only when complete. Write access to the directory is decided in
``runs.run_directory``; checkpoints are in ``runs.checkpoint``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from trivium import distributed
from trivium.config.base import Configuration, Conflict, dump
from trivium.errors import CheckpointError, DataError, TrainingError
from trivium.monitoring.monitor_config import MonitorsConfig
from trivium.runs.budget import BudgetConfig
from trivium.runs.checkpoint_config import CheckpointsConfig
from trivium.runs.files import (
    atomic_directory,
    complete_lines,
    flush_to_disk,
    log_content,
    parse_json,
    read_json_object,
    write_text,
)
from trivium.runs.provenance import environment
from trivium.runs.tracker_config import TrackerName

LOGS = ("metrics", "evaluation", "samples", "outcomes", "events")
"""The names of the log files, without .jsonl."""
_RUN_FIELDS: dict[str, type] = {
    **dict.fromkeys(("kind", "id", "from", "started", "python", "source"), str),
    **dict.fromkeys(("packages", "inputs"), dict),
}
_KEPT_EVENTS = ("interrupted", "failed", "resumed", "not_saved")
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_REPOSITORY = re.compile(r"[A-Za-z0-9]([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunConfig(Configuration):
    """Directory, random seed, checkpoints and logs of a run."""

    directory: Path | None = None
    """Run directory, new or empty. The default is a directory under runs/ with the kind and the
    time of the run in its name."""
    overwrite: bool = False
    """Delete the run in the directory, and start from the beginning."""
    resume: bool = False
    """Require a stopped run to resume. A stopped run resumes without this setting too when its
    command is rerun; with it, the command never starts a new run."""
    allow_changes: bool = False
    """Resume a run even if its configuration, data or code has changed."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    """Checkpoints to resume from."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of every random choice of the run."""
    samples: int = Field(default=8, ge=0)
    """Number of held-out prompts whose responses are kept at each evaluation."""
    samples_every: int = Field(default=10, ge=0)
    """Number of steps between two training prompts whose responses are kept; 0 keeps none."""
    budget: BudgetConfig | None = None
    """Limits that end the run before its last step."""
    push: str | None = None
    """Repository on the Hugging Face Hub, OWNER/NAME, to which final/ is uploaded when the run has
    finished; it is created private. The flag --push sets it."""
    trackers: tuple[TrackerName, ...] = ()
    """Experiment trackers that receive a copy of the metrics: tensorboard, wandb, trackio."""
    measure_memory: bool = False
    """Measure the run's peak memory. On the CPU this returns the memory of freed tensors to the
    system at once, which costs time (docs/memory.md)."""
    monitors: MonitorsConfig = MonitorsConfig()
    """Thresholds of the alarms, and which alarms stop the run (docs/monitors.md)."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.push is not None and (fault := repository_fault(self.push)):
            yield "push", fault


def repository_fault(repository: str) -> str | None:
    """Return why a name is no repository of the Hub; None if it has the form of one."""
    if _REPOSITORY.fullmatch(repository) and len(repository) <= 96 and "--" not in repository:
        return None
    return "it is no repository: write OWNER/NAME, of letters, digits, and `-`, `_` or `.` inside"


class Run:
    """A run that is being written.

    Attributes:
        path: the run directory.
        run_id: unique id, which is also in the run's checkpoints.
        writes: whether this process writes the logs; of several processes one does.
    """

    def __init__(
        self, path: Path, run_id: str, *, elapsed: float = 0.0, writes: bool = True
    ) -> None:
        self.path = path
        self.writes = writes
        self.run_id = run_id
        self._start_time = time.monotonic() - elapsed
        self._positions = {stem: (0, hashlib.sha256()) for stem in LOGS}

    @classmethod
    def create(
        cls, path: Path, kind: str, resolved: Configuration, started: datetime | None = None
    ) -> Run:
        """Create a run in an empty directory, and write its configuration and provenance.

        The run's start, by default now, is written with the offset of the local time.
        """
        started = started or datetime.now().astimezone()
        record = {
            "kind": kind,
            "id": uuid.uuid4().hex,
            "started": started.isoformat(timespec="seconds"),
            "processes": distributed.size(),
            **environment(resolved),
        }
        write_text(path / "config.yaml", dump(resolved))
        write_text(path / "run.json", json.dumps(record, indent=2) + "\n")
        return cls(path, record["id"])

    @classmethod
    def resume(cls, path: Path, logs: Mapping[str, Any]) -> Run:
        """Reopen a run at the log positions of a checkpoint, and truncate its logs to them.

        Events are never truncated. ``read_events`` leaves out those of repeated steps.

        Raises:
            CheckpointError: a log was shortened or altered after the checkpoint.
        """
        run = cls(path, read_run(path)["id"], elapsed=logs["elapsed"])
        for stem, (size, digest) in logs["positions"].items():
            file = path / f"{stem}.jsonl"
            actual, total, rest = log_content(file, size)
            if actual < size or total.hexdigest() != digest:
                raise CheckpointError(
                    f"{file}: was shortened or altered after the checkpoint, so the run cannot be "
                    "resumed from there; restore the file, or write run.overwrite=true to start "
                    "from the beginning"
                )
            if stem == "events":
                total.update(rest)
                size += len(rest)
            run._positions[stem] = (size, total)
            if actual > size:
                os.truncate(file, size)
        return run

    def log_positions(self) -> dict[str, Any]:
        """Flush every log to the disk. Return the logs' sizes and digests, and the elapsed time."""
        for stem in LOGS:
            if (self.path / f"{stem}.jsonl").exists():
                flush_to_disk(self.path / f"{stem}.jsonl")
        return {
            "elapsed": self.elapsed(),
            "positions": {
                stem: (size, total.hexdigest()) for stem, (size, total) in self._positions.items()
            },
        }

    def log_resumed(self, logs: Mapping[str, Any], **fields: Any) -> None:
        """Append an event that the run resumes from the log positions of a checkpoint."""
        self.event("resumed", events_bytes=logs["positions"]["events"][0], **fields)

    def elapsed(self) -> float:
        """Return the seconds since the start of the run, without the time that it was stopped."""
        return round(time.monotonic() - self._start_time, 3)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step, and the elapsed seconds."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._append("metrics", _merge_fields({"step": step, "elapsed": self.elapsed()}, numbers))

    def event(self, kind: str, message: str = "", /, **fields: Any) -> None:
        """Append an event with its time, an optional message and further fields."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        own = {"time": now, "kind": kind} | ({"message": message} if message else {})
        self._append("events", _merge_fields(own, fields))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append responses, one line each."""
        for row in rows:
            self._append("samples", _merge_fields({"step": step}, row))

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Append the result of an evaluation."""
        own = {"step": step, "elapsed": self.elapsed()}
        self._append("evaluation", _merge_fields(own, result))

    def outcomes(self, step: int, outcomes: Mapping[str, Any]) -> None:
        """Append the rewards of an evaluation's responses."""
        if outcomes:
            self._append("outcomes", _merge_fields({"step": step}, outcomes))

    @contextmanager
    def saving(self, name: str = "final") -> Iterator[Path]:
        """Yield a directory for a model, which replaces ``name`` in the run when the block ends.

        The previous directory stays in place until then, and for good if the block raises.
        """
        with atomic_directory(self.path / name) as partial:
            yield partial
        self.event("saved", name=name)

    def _append(self, stem: str, record: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        path = self.path / f"{stem}.jsonl"
        data = (json_line(record) + "\n").encode()
        size, total = self._positions[stem]
        total.update(data)
        self._positions[stem] = (size + len(data), total)
        try:
            with path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error


# --- Reading --------------------------------------------------------------------------------------


def read_run(path: Path) -> dict[str, Any]:
    """Return the contents of run.json: the run's kind, start time and versions.

    Raises:
        DataError: the directory holds no run, or a run of a version before 0.2.
    """
    file = path / "run.json"
    if not os.path.lexists(file):
        raise DataError(
            f"{path}: is not the directory of a run: run.json: {os.strerror(errno.ENOENT)}"
        )
    record = read_json_object(file)
    required = _RUN_FIELDS if "id" in record else {"kind": str}
    for name, kind in required.items():
        if not isinstance(record.get(name), kind):
            what = "has no" if name not in record else "has a wrong"
            raise DataError(f"{file}: is damaged: it {what} {name!r}; restore the file")
    try:
        datetime.fromisoformat(record.get("started") or "2026-01-01")
    except (TypeError, ValueError):
        raise DataError(f"{file}: is damaged: it has a wrong 'started'; restore the file") from None
    written_by = str(record["packages"].get("trivium") or "") if "id" in record else ""
    if written_by.startswith("0.1."):
        raise DataError(
            f"{path}: was written by Trivium {written_by}, whose settings and metrics had other "
            f"names: read it with pip install 'trivium=={written_by}', or rerun its command in a "
            "new directory"
        )
    return record


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the metrics of the run at ``path``, one mapping per logged step."""
    return [_restore_nonfinite(record) for record in _read(path, "metrics")]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Return the results of the run's evaluations, in order."""
    return [_restore_nonfinite(record) for record in _read(path, "evaluation")]


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """Return the rewards of every evaluation's responses, by prompt."""
    return list(_read(path, "outcomes"))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the responses that the run kept, in order. Their text is untrusted."""
    return list(_read(path, "samples"))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of the run, in order.

    Where the run resumed from a checkpoint, the events between that checkpoint and the stop are
    left out, because those steps were repeated. Only ``_KEPT_EVENTS`` remain of them.
    """
    events: list[tuple[int, dict[str, Any]]] = []
    for end, event in _read_with_offsets(path, "events"):
        kind = event.get("kind")
        limit = event.get("events_bytes") if kind == "resumed" else 0
        if not isinstance(kind, str) or not isinstance(limit, int):
            raise DataError(f"{path / 'events.jsonl'}: is damaged: {json_line(event):.80}")
        if kind == "resumed":
            events = [(at, e) for at, e in events if at <= limit or e["kind"] in _KEPT_EVENTS]
        events.append((end, event))
    return [event for _, event in events]


def is_finished(path: Path) -> bool:
    """Return whether the run has finished, and was not resumed afterwards."""
    kinds = [event["kind"] for event in read_events(path)]
    return [kind for kind in kinds if kind in ("finished", "resumed")][-1:] == ["finished"]


def _read(directory: Path, stem: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, without a last line that was not completely written."""
    return (record for _, record in _read_with_offsets(directory, stem))


def _read_with_offsets(directory: Path, stem: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the records of a log, each with the byte offset of its line's end."""
    read_run(directory)
    path = directory / f"{stem}.jsonl"
    end = 0
    for number, line in enumerate(complete_lines(path), start=1):
        end += len(line)
        try:
            record = parse_json(line[:-1])
        except ValueError as error:
            raise DataError(f"{path}:{number}: is damaged, not JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: is damaged: is not a JSON object")
        yield end, record


def _restore_nonfinite(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }


# --- Writing --------------------------------------------------------------------------------------


def json_line(record: Mapping[str, Any]) -> str:
    """Return a record as strict JSON on one line.

    Control characters, and characters that a terminal or an encoding cannot handle, are escaped.
    """
    text = json.dumps(
        _replace_nonfinite(record), ensure_ascii=False, allow_nan=False, default=_to_json_value
    )
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _to_json_value(value: Any) -> Any:
    """Convert a scalar tensor or array to a number, and any other object to text."""
    return _replace_nonfinite(value.item()) if hasattr(value, "item") else str(value)


def _merge_fields(own: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    duplicates = own.keys() & fields.keys()
    assert not duplicates, f"fields are set by the run itself: {sorted(duplicates)}"
    return {**own, **fields}
