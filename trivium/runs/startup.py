"""Startup of a run: claim its directory and find the checkpoint to resume from.

Nothing here needs a model. ``training.startup`` adds the steps that do.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from filelock import FileLock

from trivium import distributed
from trivium.config.base import Configuration
from trivium.runs.checkpoint import Checkpoint, Checkpoints
from trivium.runs.checkpointing import LOGS
from trivium.runs.files import remove_partial_writes
from trivium.runs.peak_memory import PeakMemory
from trivium.runs.run_directory import RunClaim, claim_directory, lock_directory, new_directory
from trivium.runs.store import Run, RunConfig, read_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A run that may be started or resumed.

    Attributes:
        claim: the directory, and whether a run resumes there.
        lock: lock on the directory of a run that resumes.
        started: start of the run, which a resumed run keeps; chat templates see this time.
        checkpoint: checkpoint to resume from; None to start from the beginning.
        peak_memory: measurement of the run's memory, if the configuration asks for it.
        half_precision: whether the trained weights are bfloat16.
    """

    claim: RunClaim
    started: datetime
    lock: FileLock | None = None
    checkpoint: Checkpoint | None = None
    peak_memory: PeakMemory | None = None
    half_precision: bool = False


def prepare_directory(kind: str, config: RunConfig, resolved: Configuration) -> PreparedRun:
    """Claim the directory of a run, and lock it and find its last checkpoint if the run resumes.

    Of several processes the first decides and holds the lock.

    Raises:
        ConfigurationError: the directory is in use, or a tracker is not installed.
        CheckpointError: a run was stopped there, and none of its checkpoints is complete.
    """
    locks: list[FileLock] = []

    def prepare() -> tuple[RunClaim, datetime, Checkpoint | None]:
        claim = claim_directory(kind, config, resolved)
        now = datetime.fromisoformat(datetime.now().astimezone().isoformat(timespec="seconds"))
        if claim.resume_from is None:
            return claim, now, None
        locks.append(lock_directory(claim.resume_from))
        remove_partial_writes(claim.resume_from)
        saved = read_run(claim.resume_from)
        checkpoints = Checkpoints(claim.resume_from, saved["id"])
        remove_partial_writes(checkpoints.directory)
        checkpoint = checkpoints.latest()
        started = now if checkpoint is None else datetime.fromisoformat(saved["started"])
        return claim, started, checkpoint

    claim, started, checkpoint = distributed.from_rank_0("the run's directory", prepare)
    return PreparedRun(claim, started, locks[0] if locks else None, checkpoint)


def open_run(prepared: PreparedRun) -> tuple[Run, FileLock | None]:
    """Create the run, or reopen it where it resumes. Return it and the lock on its directory.

    Of several processes the first holds the lock and writes.
    """
    opened: list[tuple[Run, FileLock]] = []

    def open_here() -> tuple[Path, str]:
        opened.append(_open(prepared))
        return opened[0][0].path, opened[0][0].run_id

    path, run_id = distributed.from_rank_0("the run's files", open_here)
    return opened[0] if opened else (Run(path, run_id, writes=False), None)


def _open(prepared: PreparedRun) -> tuple[Run, FileLock]:
    claim = prepared.claim
    if prepared.checkpoint is None:
        if prepared.lock is not None:
            prepared.lock.release()
        path, lock = new_directory(claim)
        return Run.create(path, claim.kind, claim.resolved, prepared.started), lock
    assert claim.resume_from is not None and prepared.lock is not None, "a checkpoint has both"
    run = Run.resume(claim.resume_from, prepared.checkpoint.load(LOGS))
    Checkpoints(run.path, run.run_id).mark_damaged_after(prepared.checkpoint.save_point)
    return run, prepared.lock


def log_resumption(
    prepared: PreparedRun, run: Run, done: int, threads: int, processes: int
) -> None:
    """Log from where a run resumes, and what has changed since it was stopped.

    Args:
        prepared: the run to resume.
        run: the reopened run.
        done: number of completed steps.
        threads, processes: their numbers when the run was saved.
    """
    assert prepared.checkpoint is not None, "a run resumes from a checkpoint"
    save_point, changes = prepared.checkpoint.save_point, list(prepared.claim.changes)
    if processes != distributed.size():
        changes.append(
            f"processes: {processes} → {distributed.size()}: what follows equals the run with "
            f"{processes} up to rounding, and a reward's own random numbers differ"
        )
    logger.info("resuming the run in %s from %s", run.path, save_point)
    logs = prepared.checkpoint.load(LOGS)
    run.log_resumed(logs, step=done, save_point=str(save_point), changes=changes)
    for change in changes:
        logger.warning("changed since the run was stopped: %s", change)
    if threads != torch.get_num_threads():
        logger.warning(
            "the run was saved with %d threads and resumes with %d: the last bits of its sums "
            "may differ (OMP_NUM_THREADS=%d avoids this)",
            threads,
            torch.get_num_threads(),
            threads,
        )
