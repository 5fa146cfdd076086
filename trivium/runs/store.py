"""A run is a directory that explains itself: what was asked, what happened, what came of it.

    run.json           kind, time of start, versions of Python, Trivium and what it stands on
    config.yaml        the whole configuration, defaults included
    metrics.jsonl      one line of numbers per training step
    evaluation.jsonl   one line per evaluation on held-out prompts
    samples.jsonl      responses, a few per evaluation and of training steps
    outcomes.jsonl     the reward of every held-out response, by prompt
    events.jsonl       what happened besides
    final/ ...         models

Lines are strict JSON and are appended whole; a number that is not finite is written as the text
"NaN", "Infinity" or "-Infinity", which `read_metrics` and `read_evaluations` turn back. Models
appear only when complete. Left out: continuing a stopped run, and drawing what the files say.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import Field

from trivium.config import Configuration, dump
from trivium.errors import ConfigurationError, DataError, TrainingError
from trivium.runs.budget import BudgetConfig
from trivium.runs.monitor_config import MonitorsConfig
from trivium.runs.trackers import TrackerName, require_trackers

_PACKAGES = ("trivium", "torch", "transformers", "tokenizers", "safetensors", "peft")
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunConfig(Configuration):
    """Where a run is written, and what its randomness starts from."""

    directory: Path | None = None
    """The run's directory, new or empty; by default runs/ and then the kind and time of the run."""
    overwrite: bool = False
    """Delete the run that the directory already holds, instead of refusing to start."""
    seed: int = Field(default=0, ge=0)
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


def require_free(config: RunConfig) -> None:
    """Raise ConfigurationError where the run's directory is taken; before anything slow is done."""
    require_trackers(config.trackers)
    if config.directory is not None:
        _may_go(config.directory, config.overwrite)


class Run:
    """A run that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = time.monotonic()

    @classmethod
    def create(cls, config: RunConfig, kind: str, resolved: Configuration) -> Run:
        """Make the run's directory, and write its configuration and circumstances.

        Raises ConfigurationError where the directory holds something already.
        """
        path = _new_directory(config, kind)
        record = {
            "kind": kind,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: _version(name) for name in _PACKAGES},
        }
        _write(path / "config.yaml", dump(resolved))
        _write(path / "run.json", json.dumps(record, indent=2) + "\n")
        return cls(path)

    def elapsed(self) -> float:
        """Seconds since the run began."""
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
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _sibling(target, "partial")
        partial.mkdir()
        try:
            yield partial
            _flush_to_disk(partial)
            _put_in_place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.event("saved", name=name)

    def _append(self, stem: str, record: Mapping[str, Any]) -> None:
        path = self.path / f"{stem}.jsonl"
        data = (json_line(record) + "\n").encode()
        try:
            with path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error


# --- Reading --------------------------------------------------------------------------------------


def read_run(path: Path) -> dict[str, Any]:
    """Return run.json: the run's kind, start and versions; DataError if the directory is no run."""
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError as error:
        reason = f"{path}: is not the directory of a run: run.json: {error.strerror}"
        raise DataError(reason) from None
    except ValueError as error:
        raise DataError(f"{path / 'run.json'}: is damaged: {error}") from None
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
    """Return what happened in the run, in order."""
    return list(_read(path, "events"))


def _read(directory: Path, stem: str) -> Iterator[dict[str, Any]]:
    """Yield a file's records; a last line that was cut off in the middle of writing is left out."""
    read_run(directory)
    path = directory / f"{stem}.jsonl"
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: is damaged, not JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: is damaged: holds no record of named values")
        yield record


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


def _new_directory(config: RunConfig, kind: str) -> Path:
    try:
        if config.directory is None:
            return _timed_directory(kind)
        path = config.directory
        path.mkdir(parents=True, exist_ok=True)
        _make_room(path, config.overwrite)
    except OSError as error:
        place = config.directory or "runs"
        raise ConfigurationError(
            f"run.directory = {place}: cannot be used: {error.strerror}; name another"
        ) from None
    return path


def _timed_directory(kind: str) -> Path:
    """Make a new directory; runs that start in the same second are numbered."""
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _make_room(path: Path, overwrite: bool) -> None:
    """Refuse a directory that holds something, or empty it if it is a run that may go."""
    for entry in _may_go(path, overwrite):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _may_go(path: Path, overwrite: bool) -> list[Path]:
    """What the directory holds, if all of it may be deleted."""
    entries = list(path.iterdir()) if path.is_dir() else []
    if not entries:
        return []
    if not (path / "run.json").is_file():
        raise ConfigurationError(
            f"run.directory = {path}: holds {entries[0].name} but no run; name a new or empty "
            "directory"
        )
    if not overwrite:
        raise ConfigurationError(
            f"run.directory = {path}: holds a run already; name another directory, or write "
            "run.overwrite=true to delete that run"
        )
    return entries


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sibling(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.{ending}")


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = _sibling(path, "partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _flush_to_disk(partial)
        partial.replace(path)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename a complete directory to its name, moving aside what bore it before."""
    previous = _sibling(target, "previous")
    if target.exists():
        target.rename(previous)
    try:
        partial.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    _flush_to_disk(target.parent, below=False)
    shutil.rmtree(previous, ignore_errors=True)


def _flush_to_disk(path: Path, *, below: bool = True) -> None:
    """Wait until a file, or a directory and what is below it, has reached the disk."""
    if below and path.is_dir():
        for entry in path.iterdir():
            _flush_to_disk(entry)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
