"""Access to a run directory: whether a command may write there, and whether it resumes a run.

The decision is made before anything slow. A stopped run resumes when its command is rerun, as long
as its results would be the same. A run that is finished, of another command, or in use by another
process is left alone. Restoring the state of a resumed run is the task of ``training.run_loop``.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from trivium.config.base import Configuration
from trivium.errors import ConfigurationError
from trivium.runs.files import is_partial_write, remove
from trivium.runs.provenance import differences
from trivium.runs.store import RunConfig, is_finished, read_run
from trivium.runs.trackers import require_trackers

logger = logging.getLogger(__name__)

LOCK = ".lock"
_EARLIER_PREFIX = "earlier-"
_FILES_BEFORE_START = {LOCK, "config.yaml"}
"""Files of a run that was stopped before it started."""
_PROGRESS_FILES = ("metrics.jsonl", "evaluation.jsonl", "checkpoints")
"""Files of a run that made progress. A run without them may be replaced."""


@dataclass(frozen=True)
class RunClaim:
    """Permission for a command to write to a directory.

    Attributes:
        kind: kind of the run, such as grpo.
        config: the run section of the configuration.
        resolved: the whole configuration.
        resume_from: directory of the run to resume; None for a new run.
        changes: differences from the run to resume, which the user has allowed.
        may_replace: whether an existing run in the directory may be deleted.
    """

    kind: str
    config: RunConfig
    resolved: Configuration
    resume_from: Path | None = None
    changes: Sequence[str] = ()
    may_replace: bool = False


def claim_directory(kind: str, config: RunConfig, resolved: Configuration) -> RunClaim:
    """Decide whether a run may be written to its directory. Nothing is changed there.

    Raises:
        ConfigurationError: the directory holds something other than a run that can be resumed,
            a tracker is not installed, or there is no run to resume and run.resume is true.
    """
    require_trackers(config.trackers)
    path = config.directory
    if path is None:
        if config.resume:
            raise ConfigurationError(
                "run.resume is true, but no run is named: write run.directory=DIRECTORY"
            )
        return RunClaim(kind, config, resolved)
    require_unlocked(path)
    if not _holds_run(path):
        if config.resume:
            raise ConfigurationError(
                f"run.directory = {path}: holds no run to resume (run.resume is true): check "
                "the path, or leave run.resume out to start a new run"
            )
        return RunClaim(kind, config, resolved)
    if config.overwrite:
        if config.resume:
            raise ConfigurationError(
                "run.overwrite and run.resume are both true: keep run.overwrite to delete the run "
                "and start from the beginning, or run.resume to resume it"
            )
        return RunClaim(kind, config, resolved, may_replace=True)
    return _resume_claim(kind, config, resolved, path)


def _holds_run(path: Path) -> bool:
    """Return whether a directory holds a run.

    Raises:
        ConfigurationError: the path is a file, or the directory holds something else.
    """
    if path.exists() and not path.is_dir():
        raise ConfigurationError(
            f"run.directory = {path}: is a file, but a directory is needed: name another path"
        )
    entries = directory_entries(path)
    if not entries:
        return False
    if not (path / "run.json").is_file():
        raise ConfigurationError(
            f"run.directory = {path}: holds {entries[0].name} but no run; name a new or empty "
            "directory"
        )
    return True


def directory_entries(path: Path) -> list[Path]:
    """Return the entries of a directory, without those of a run that was stopped before it
    started."""
    entries = sorted(path.iterdir()) if path.is_dir() else []
    kept = [e for e in entries if not (is_partial_write(e) or e.name.startswith(_EARLIER_PREFIX))]
    return [] if {entry.name for entry in kept} <= _FILES_BEFORE_START else kept


def _resume_claim(kind: str, config: RunConfig, resolved: Configuration, path: Path) -> RunClaim:
    """Return a claim on a directory that holds a run.

    Raises:
        ConfigurationError: the run cannot be resumed, or not with this configuration.
    """
    saved = read_run(path)
    remedy = "name another directory, or write run.overwrite=true to delete that run"
    if saved["kind"] != kind:
        raise ConfigurationError(
            f"run.directory = {path}: holds a run of {saved['kind']}, not {kind}: {remedy}"
        )
    if "id" not in saved:
        raise ConfigurationError(
            f"run.directory = {path}: holds a run of an earlier version of trivium, which cannot "
            f"be resumed: {remedy}"
        )
    changes = differences(saved, path, resolved)
    continuable = any((path / "checkpoints").glob("[0-9]*"))
    if is_finished(path) and not (changes and config.allow_changes and continuable):
        further = "change a setting (such as steps) and write --allow-changes"
        if not continuable:
            further = f"start a run with model.path={path / 'final'}: it kept no checkpoint"
        raise ConfigurationError(
            f"run.directory = {path}: holds a finished run: {remedy}; to continue its training, "
            f"{further}"
        )
    if changes and not config.allow_changes:
        if not any((path / name).exists() for name in _PROGRESS_FILES):
            return RunClaim(kind, config, resolved, may_replace=True)
        lines = "\n".join(f"  - {change}" for change in changes)
        raise ConfigurationError(
            f"run.directory = {path}: holds a stopped run that differs from this command:\n{lines}"
            "\nUndo the changes to resume the run, write --allow-changes to resume it with them, "
            f"or {remedy}"
        )
    return RunClaim(kind, config, resolved, path, changes)


# --- Taking the directory -------------------------------------------------------------------------


def require_unlocked(path: Path) -> None:
    """Raise ConfigurationError if another process writes to the run in a directory."""
    if os.path.lexists(path / LOCK):
        lock_directory(path).release()


def lock_directory(path: Path) -> FileLock:
    """Lock a directory for this process, until the process ends or releases the lock.

    Raises:
        ConfigurationError: another process holds the lock.
    """
    file = path / LOCK
    if os.path.lexists(file) and not stat.S_ISREG(os.lstat(file).st_mode):
        raise ConfigurationError(
            f"run.directory = {path}: its {LOCK} is not a file; remove it, or name another "
            "directory"
        )
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(
            f"run.directory = {path}: another process writes to this run; wait until it ends, or "
            "name another directory"
        ) from None
    except OSError as error:
        raise _unusable_directory(path, error) from None
    return lock


def new_directory(claim: RunClaim) -> tuple[Path, FileLock]:
    """Create and lock the directory of a new run, empty but for the lock.

    Raises:
        ConfigurationError: the directory cannot be used, or another run started there since it was
            claimed.
    """
    config = claim.config
    try:
        if config.directory is None:
            path = _timestamped_directory(claim.kind)
            return path, lock_directory(path)
        path = config.directory
        path.mkdir(parents=True, exist_ok=True)
        lock = lock_directory(path)
        if not claim.may_replace and claim.resume_from is None and _holds_run(path):
            raise ConfigurationError(
                f"run.directory = {path}: another run started there in the meantime; name another "
                "directory"
            )
        has_logs = claim.resume_from is not None and (path / "metrics.jsonl").exists()
        _clear(path, keep_logs=has_logs, overwrite=config.overwrite)
    except OSError as error:
        raise _unusable_directory(config.directory or Path("runs"), error) from None
    return path, lock


def _clear(path: Path, *, keep_logs: bool, overwrite: bool) -> None:
    """Empty a directory but for its lock, or move the logs of a run into a subdirectory.

    The files that identify a run are removed last, so that a process killed while it clears leaves
    a run that can be cleared again.
    """
    last = ("metrics.jsonl", "run.json", "config.yaml")
    entries = [entry for entry in path.iterdir() if entry.name != LOCK]
    entries.sort(key=lambda entry: last.index(entry.name) if entry.name in last else -1)
    kept_before = [entry for entry in entries if entry.name.startswith(_EARLIER_PREFIX)]
    if not keep_logs:
        for entry in entries:
            if overwrite or entry not in kept_before:
                remove(entry)
        return
    earlier = path / f"{_EARLIER_PREFIX}{len(kept_before) + 1}"
    earlier.mkdir()
    for entry in entries:
        if entry not in kept_before:
            entry.rename(earlier / entry.name)
    logger.info(
        "the run in %s was stopped before its first checkpoint: it starts from the beginning, and "
        "its earlier files are kept in %s",
        path,
        earlier.name,
    )


def _unusable_directory(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"run.directory = {path}: cannot be used: {error.strerror}; name another directory"
    )


def _timestamped_directory(kind: str) -> Path:
    """Create a new directory under runs/. Runs that start in the same second are numbered."""
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
