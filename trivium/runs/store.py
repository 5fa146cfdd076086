"""A run is a directory that explains itself: what was asked, what happened, what came of it.

    run.json           kind, time of start, versions of Python, Trivium and what it stands on
    config.yaml        the whole configuration, defaults included
    metrics.jsonl      one line of numbers per training step
    evaluation.jsonl   one line per evaluation on held-out prompts
    samples.jsonl      responses, a few per evaluation and of training steps
    outcomes.jsonl     the reward of every held-out response, by prompt
    events.jsonl       what happened besides
    checkpoints/       the run's state, to go on from
    final/ ...         models

Lines are strict JSON and are appended whole; a number that is not finite is written as the text
"NaN", "Infinity" or "-Infinity", which `read_metrics` and `read_evaluations` turn back. Models
appear only when complete. Left out: who may write here (``runs.run_directory``), a run's state
(``runs.checkpoint``), and drawing what the files say.
"""

from __future__ import annotations

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

from trivium.config.base import Configuration, dump
from trivium.errors import CheckpointError, DataError, TrainingError
from trivium.monitoring.monitor_config import MonitorsConfig
from trivium.runs.budget import BudgetConfig
from trivium.runs.checkpoint_config import CheckpointsConfig
from trivium.runs.files import flush_to_disk, placing, write_text
from trivium.runs.provenance import environment
from trivium.runs.trackers import TrackerName

LOGS = ("metrics", "evaluation", "samples", "outcomes", "events")
"""The files to which lines are appended, without their ending."""
_HAPPEN_ONCE = ("interrupted", "failed", "resumed", "not_saved")
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunConfig(Configuration):
    """Where a run is written, and what its randomness starts from."""

    directory: Path | None = None
    """The run's directory, new or empty; by default runs/ and then the kind and time of the run."""
    overwrite: bool = False
    """Delete the run that the directory already holds, and begin anew."""
    resume: bool = False
    """Insist on going on with a run that was stopped. (One goes on by itself when its command is
    given again; this refuses to begin one.)"""
    allow_changes: bool = False
    """Go on with a run even where its configuration, data or code changed."""
    checkpoints: CheckpointsConfig = CheckpointsConfig()
    """Saved states that a stopped run goes on from."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Decides every random choice of the run."""
    samples: int = Field(default=8, ge=0)
    """To how many of the held-out prompts the responses of each evaluation are kept."""
    samples_every: int = Field(default=10, ge=0)
    """Keep the responses to one training prompt every so many steps; 0: never."""
    budget: BudgetConfig | None = None
    """End the run when so much is spent, even before its steps are done."""
    trackers: tuple[TrackerName, ...] = ()
    """Mirror the metrics to tensorboard, wandb or trackio."""
    measure_memory: bool = False
    """Measure the run's peak memory. On the CPU this makes freed tensors' memory go back to the
    system at once, which costs time (docs/memory.md)."""
    monitors: MonitorsConfig = MonitorsConfig()
    """What raises an alarm, and which alarms stop the run (docs/monitors.md)."""


class Run:
    """A run that is being written.

    Attributes:
        path: its directory.
        identity: an id of its own, which its checkpoints bear.
    """

    def __init__(self, path: Path, identity: str, *, elapsed: float = 0.0) -> None:
        self.path = path
        self.identity = identity
        self._started = time.monotonic() - elapsed
        self._written = {stem: (0, hashlib.sha256()) for stem in LOGS}

    @classmethod
    def create(cls, path: Path, kind: str, resolved: Configuration) -> Run:
        """Begin a run in an empty directory: write its configuration and circumstances."""
        record = {
            "kind": kind,
            "id": uuid.uuid4().hex,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            **environment(resolved),
        }
        write_text(path / "config.yaml", dump(resolved))
        write_text(path / "run.json", json.dumps(record, indent=2) + "\n")
        return cls(path, record["id"])

    @classmethod
    def resume(cls, path: Path, logs: Mapping[str, Any]) -> Run:
        """Go on with a run from where its ``logs`` were then; what came after is cut off.

        Of events nothing is: what happened, happened. ``read_events`` knows what was done again.

        Raises:
            CheckpointError: a log was shortened or altered since.
        """
        run = cls(path, read_run(path)["id"], elapsed=logs["elapsed"])
        for stem, (size, digest) in logs["written"].items():
            file = path / f"{stem}.jsonl"
            data = file.read_bytes() if file.exists() else b""
            if len(data) < size or hashlib.sha256(data[:size]).hexdigest() != digest:
                raise CheckpointError(
                    f"{file}: was shortened or altered after the checkpoint, so the run cannot go "
                    "on from there; put it back as it was, or write run.overwrite=true to begin "
                    "anew"
                )
            if stem == "events":
                size = data.rfind(b"\n") + 1
            run._written[stem] = (size, hashlib.sha256(data[:size]))
            if len(data) > size:
                os.truncate(file, size)
        return run

    def written(self) -> dict[str, Any]:
        """How far every log is written, flushed to the disk, and when."""
        for stem in LOGS:
            if (self.path / f"{stem}.jsonl").exists():
                flush_to_disk(self.path / f"{stem}.jsonl")
        return {
            "elapsed": self.elapsed(),
            "written": {stem: (n, total.hexdigest()) for stem, (n, total) in self._written.items()},
        }

    def resumed(self, logs: Mapping[str, Any], **fields: Any) -> None:
        """Note that the run goes on from where its logs were then."""
        self.event("resumed", events_bytes=logs["written"]["events"][0], **fields)

    def elapsed(self) -> float:
        """Seconds since the run began, without the time that it was stopped."""
        return round(time.monotonic() - self._started, 3)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a step's numbers, and the seconds since the start."""
        numbers = {name: float(value) for name, value in metrics.items()}
        self._append("metrics", _distinct({"step": step, "elapsed": self.elapsed()}, numbers))

    def event(self, kind: str, message: str = "", /, **fields: Any) -> None:
        """Append something that happened, with what else is to be known of it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        own = {"time": now, "kind": kind} | ({"message": message} if message else {})
        self._append("events", _distinct(own, fields))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append responses, one line each."""
        for row in rows:
            self._append("samples", _distinct({"step": step}, row))

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Append the result of an evaluation."""
        self._append("evaluation", _distinct({"step": step, "elapsed": self.elapsed()}, result))

    def outcomes(self, step: int, outcomes: Mapping[str, Any]) -> None:
        """Append the rewards of an evaluation's responses."""
        if outcomes:
            self._append("outcomes", _distinct({"step": step}, outcomes))

    @contextmanager
    def saving(self, name: str = "final") -> Iterator[Path]:
        """Give a directory to save a model in, which becomes the run's `name` once complete.

        What stood there before stays until then, and for good if the block raises.
        """
        with placing(self.path / name) as partial:
            yield partial
        self.event("saved", name=name)

    def _append(self, stem: str, record: Mapping[str, Any]) -> None:
        path = self.path / f"{stem}.jsonl"
        data = (json_line(record) + "\n").encode()
        size, total = self._written[stem]
        total.update(data)
        self._written[stem] = (size + len(data), total)
        try:
            with path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error


# --- Reading --------------------------------------------------------------------------------------


def read_run(path: Path) -> dict[str, Any]:
    """Return run.json: the run's kind, start and versions.

    Raises:
        DataError: the directory is not one of a run, or a version before 0.2 wrote it.
    """
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"{path}: is not the directory of a run: run.json: {error.strerror}"
        raise DataError(reason) from None
    except ValueError as error:
        raise DataError(f"{path / 'run.json'}: is damaged: {error}") from None
    written_by = str(record.get("packages", {}).get("trivium") or "") if "id" in record else ""
    if written_by.startswith("0.1."):
        raise DataError(
            f"{path}: was written by Trivium {written_by}, whose settings and metrics had other "
            f"names: read it with pip install 'trivium=={written_by}', or run it again"
        )
    return record


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the metrics of the run at `path`, one mapping per logged step."""
    return [_with_numbers(record) for record in _read(path, "metrics")]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Return the results of the run's evaluations, in order."""
    return [_with_numbers(record) for record in _read(path, "evaluation")]


def read_outcomes(path: Path) -> list[dict[str, Any]]:
    """Return the rewards of every evaluation's responses, by prompt."""
    return list(_read(path, "outcomes"))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the responses that the run kept, in order; their text is untrusted."""
    return list(_read(path, "samples"))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return what happened in the run, in order.

    Where the run went on from a checkpoint, what had come after it is left out: it was done again.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    for end, event in _read_with_ends(path, "events"):
        if event["kind"] == "resumed":
            kept = event["events_bytes"]
            found = [(at, e) for at, e in found if at <= kept or e["kind"] in _HAPPEN_ONCE]
        found.append((end, event))
    return [event for _, event in found]


def is_finished(path: Path) -> bool:
    """Whether the run came to its end, and did not go on from there."""
    kinds = [event["kind"] for event in read_events(path)]
    return [kind for kind in kinds if kind in ("finished", "resumed")][-1:] == ["finished"]


def _read(directory: Path, stem: str) -> Iterator[dict[str, Any]]:
    """Yield a file's records; a last line that was cut off in the middle of writing is left out."""
    return (record for _, record in _read_with_ends(directory, stem))


def _read_with_ends(directory: Path, stem: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a file's records, each with the byte at which its line ends."""
    read_run(directory)
    path = directory / f"{stem}.jsonl"
    if not path.exists():
        return
    end = 0
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        end += len(line) + 1
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: is damaged, not JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: is damaged: holds no record of named values")
        yield end, record


def _with_numbers(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in record.items()
    }


# --- Writing --------------------------------------------------------------------------------------


def json_line(record: Mapping[str, Any]) -> str:
    """Return strict JSON on one line, with what could upset a terminal or an encoding escaped."""
    text = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, default=_plain)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _plain(value: Any) -> Any:
    """Return what JSON lacks as text or, for tensors' and arrays' numbers, as a number."""
    return _finite(value.item()) if hasattr(value, "item") else str(value)


def _distinct(own: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    shared = own.keys() & given.keys()
    assert not shared, f"a record's own fields cannot be given: {sorted(shared)}"
    return {**own, **given}
