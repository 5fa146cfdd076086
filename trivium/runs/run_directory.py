"""Whether a command may write to its run's directory, and whether it begins or goes on there.

Decided before anything slow is done. A run that was stopped goes on when its command is given
again, as long as what it computes would be the same; one that is finished, another's, or being
written by another process is left alone. Left out: what going on means (``training.run_loop``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from trivium.config.base import Configuration
from trivium.errors import ConfigurationError
from trivium.runs.files import is_left_over, remove
from trivium.runs.provenance import differences
from trivium.runs.store import RunConfig, is_finished, read_run
from trivium.runs.trackers import require_trackers

logger = logging.getLogger(__name__)

LOCK = ".lock"
_EARLIER = "earlier-"
_BEFORE_A_RUN = {LOCK, "config.yaml"}
"""What stands in a directory whose run was stopped before it had begun."""
_DONE = ("metrics.jsonl", "evaluation.jsonl", "checkpoints")
"""What a run has that did something; one that failed before may be replaced."""


@dataclass(frozen=True)
class Claim:
    """A directory that a command may write to.

    Attributes:
        kind: what kind of run, such as grpo.
        config: the run's section of the configuration.
        resolved: the whole configuration.
        resumes: the directory of the run that goes on; None where one begins.
        changes: what differs from that run, allowed by the user.
        replaces: whether a run that is there may be deleted.
    """

    kind: str
    config: RunConfig
    resolved: Configuration
    resumes: Path | None = None
    changes: Sequence[str] = ()
    replaces: bool = False


def claim(kind: str, config: RunConfig, resolved: Configuration) -> Claim:
    """Look where the run would be written, and change nothing.

    Raises:
        ConfigurationError: the directory holds something else than a run that can go on, a
            tracker is not installed, or there should be a run to go on with and is none.
    """
    require_trackers(config.trackers)
    path = config.directory
    if path is None:
        if config.resume:
            raise ConfigurationError(
                "run.resume is true, but no run is named: write run.directory=DIRECTORY"
            )
        return Claim(kind, config, resolved)
    require_unlocked(path)
    if not _holds_a_run(path):
        if config.resume:
            raise ConfigurationError(
                f"run.directory = {path}: holds no run to go on with (run.resume is true): check "
                "the path, or leave run.resume out to begin one"
            )
        return Claim(kind, config, resolved)
    if config.overwrite:
        if config.resume:
            raise ConfigurationError(
                "run.overwrite and run.resume are both true: begin the run anew, or go on with it?"
            )
        return Claim(kind, config, resolved, replaces=True)
    return _to_go_on(kind, config, resolved, path)


def _holds_a_run(path: Path) -> bool:
    """Whether a directory holds a run; ConfigurationError where it holds anything else."""
    if path.exists() and not path.is_dir():
        raise ConfigurationError(
            f"run.directory = {path}: is a file, where a directory is needed; name another place"
        )
    entries = contents(path)
    if not entries:
        return False
    if not (path / "run.json").is_file():
        raise ConfigurationError(
            f"run.directory = {path}: holds {entries[0].name} but no run; name a new or empty "
            "directory"
        )
    return True


def contents(path: Path) -> list[Path]:
    """What a directory holds, but for traces of a run that was stopped before it had begun."""
    entries = sorted(path.iterdir()) if path.is_dir() else []
    kept = [e for e in entries if not (is_left_over(e) or e.name.startswith(_EARLIER))]
    return [] if {entry.name for entry in kept} <= _BEFORE_A_RUN else kept


def _to_go_on(kind: str, config: RunConfig, resolved: Configuration, path: Path) -> Claim:
    """A claim on a directory that holds a run: to go on with it, if that is what it can be."""
    saved = read_run(path)
    remedy = "name another directory, or write run.overwrite=true to delete that run"
    if saved["kind"] != kind:
        raise ConfigurationError(
            f"run.directory = {path}: holds a run of {saved['kind']}, not {kind}: {remedy}"
        )
    if "id" not in saved:
        raise ConfigurationError(
            f"run.directory = {path}: holds a run of an earlier version of trivium, which no run "
            f"can go on from: {remedy}"
        )
    changes = differences(saved, path, resolved)
    if is_finished(path) and not (changes and config.allow_changes):
        raise ConfigurationError(
            f"run.directory = {path}: holds a finished run: {remedy}; to go on with it, change "
            "what it shall do (such as steps) and write --allow-changes"
        )
    if changes and not config.allow_changes:
        if not any((path / name).exists() for name in _DONE):
            return Claim(kind, config, resolved, replaces=True)
        listed = "\n".join(f"  - {change}" for change in changes)
        raise ConfigurationError(
            f"run.directory = {path}: holds a run that was stopped, and this command is not the "
            f"same:\n{listed}\nTake the changes back to go on with it, write --allow-changes to "
            f"go on nevertheless, or {remedy}"
        )
    return Claim(kind, config, resolved, path, changes)


# --- Taking the directory -------------------------------------------------------------------------


def require_unlocked(path: Path) -> None:
    """Raise ConfigurationError where another process writes to the run in a directory."""
    if (path / LOCK).is_file():
        locked(path).release()


def locked(path: Path) -> FileLock:
    """Take a directory for this process, until it ends or releases it.

    Raises:
        ConfigurationError: another process has it.
    """
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(
            f"run.directory = {path}: another process writes to this run; wait for its end, or "
            "name another directory"
        ) from None
    except OSError as error:
        raise _unusable(path, error) from None
    return lock


def new_directory(claim: Claim) -> tuple[Path, FileLock]:
    """Make and take the directory of a run that begins, empty but for its lock.

    Raises:
        ConfigurationError: it cannot be used, or another run began there since it was claimed.
    """
    config = claim.config
    try:
        if config.directory is None:
            path = _timed_directory(claim.kind)
            return path, locked(path)
        path = config.directory
        path.mkdir(parents=True, exist_ok=True)
        lock = locked(path)
        if not claim.replaces and claim.resumes is None and _holds_a_run(path):
            raise ConfigurationError(
                f"run.directory = {path}: another run began there in the meantime; name another"
            )
        logged = claim.resumes is not None and (path / "metrics.jsonl").exists()
        _clear(path, keep=logged, overwrite=config.overwrite)
    except OSError as error:
        raise _unusable(config.directory or Path("runs"), error) from None
    return path, lock


def _clear(path: Path, *, keep: bool, overwrite: bool) -> None:
    """Empty a directory but for its lock; what a run had logged may be kept in a folder of it.

    What tells that a run is there goes last: until then a kill leaves a run that can be cleared.
    """
    last = ("metrics.jsonl", "run.json", "config.yaml")
    entries = [entry for entry in path.iterdir() if entry.name != LOCK]
    entries.sort(key=lambda entry: last.index(entry.name) if entry.name in last else -1)
    before = [entry for entry in entries if entry.name.startswith(_EARLIER)]
    if not keep:
        for entry in entries:
            if overwrite or entry not in before:
                remove(entry)
        return
    earlier = path / f"{_EARLIER}{len(before) + 1}"
    earlier.mkdir()
    for entry in entries:
        if entry not in before:
            entry.rename(earlier / entry.name)
    logger.info(
        "no state of the run in %s was saved before it was stopped: it begins anew, and what it "
        "had written is in %s",
        path,
        earlier.name,
    )


def _unusable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"run.directory = {path}: cannot be used: {error.strerror}; name another"
    )


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
