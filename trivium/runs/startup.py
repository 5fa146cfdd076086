"""The beginning of a run: before anything slow, whether and where it may be written or go on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from filelock import FileLock

from trivium.config.base import Configuration
from trivium.models.cpu.linear import matmul_backend
from trivium.models.loading import device_of
from trivium.models.model_config import ModelConfig
from trivium.runs import rng
from trivium.runs.checkpoint import Checkpoint, Checkpoints
from trivium.runs.checkpointing import LOGS, NUMERICS
from trivium.runs.files import tidy
from trivium.runs.peak_memory import PeakMemory, load_libraries
from trivium.runs.run_directory import Claim, claim, locked, new_directory
from trivium.runs.store import Run, RunConfig, read_run

logger = logging.getLogger(__name__)


class TrainsAModel(Protocol):
    """The configuration of a training command."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def model(self) -> ModelConfig: ...


@dataclass(frozen=True)
class PreparedRun:
    """A run that may be written, or go on.

    Attributes:
        claim: where, and whether a run goes on there.
        lock: keeps other processes from a run that goes on.
        checkpoint: where it goes on from; None: from its beginning.
        peak: the measurement of its memory, if it was asked for.
    """

    claim: Claim
    lock: FileLock | None = None
    checkpoint: Checkpoint | None = None
    peak: PeakMemory | None = None


def prepare_run(kind: str, config: TrainsAModel) -> PreparedRun:
    """Before anything slow: raise where the run cannot be written; measure memory from here on.

    Raises:
        ModelError: the model's device cannot be used, or not as it was asked to.
        ConfigurationError: the directory is taken, or a tracker is not installed.
        CheckpointError: a run was stopped there, and none of its checkpoints is whole.
    """
    assert isinstance(config, Configuration), "the whole configuration of a command"
    device = device_of(config.model)
    claimed = claim(kind, config.run, config)
    lock = checkpoint = None
    if claimed.resumes is not None:
        lock = locked(claimed.resumes)
        tidy(claimed.resumes)
        saved = Checkpoints(claimed.resumes, read_run(claimed.resumes)["id"])
        tidy(saved.directory)
        checkpoint = saved.latest()
        if checkpoint is not None:
            matmul_backend.use(checkpoint.part(NUMERICS))
    rng.seed(config.run.seed)
    if not config.run.measure_memory:
        return PreparedRun(claimed, lock, checkpoint)
    with torch.random.fork_rng(devices=[]):
        load_libraries()
    return PreparedRun(claimed, lock, checkpoint, PeakMemory(device))


def open_run(prepared: PreparedRun) -> tuple[Run, FileLock]:
    """The run itself, new or going on, and the lock on its directory."""
    claimed = prepared.claim
    if prepared.checkpoint is None:
        if prepared.lock is not None:
            prepared.lock.release()
        path, lock = new_directory(claimed)
        return Run.create(path, claimed.kind, claimed.resolved), lock
    assert claimed.resumes is not None and prepared.lock is not None, "prepare_run opened both"
    run = Run.resume(claimed.resumes, prepared.checkpoint.part(LOGS))
    Checkpoints(run.path, run.identity).set_aside_after(prepared.checkpoint.place)
    return run, prepared.lock


def tell_of_resuming(prepared: PreparedRun, run: Run, done: int, threads: int) -> None:
    """Say from where a run goes on, and what is not as it was when it was stopped."""
    assert prepared.checkpoint is not None, "a run goes on from a checkpoint"
    place, changes = prepared.checkpoint.place, list(prepared.claim.changes)
    logger.info("going on with the run in %s from %s", run.path, place)
    run.resumed(prepared.checkpoint.part(LOGS), step=done, place=str(place), changes=changes)
    for change in changes:
        logger.warning("changed since the run was stopped: %s", change)
    if threads != torch.get_num_threads():
        logger.warning(
            "the run was prepared with %d threads and goes on with %d: the last bits of its sums "
            "may differ (OMP_NUM_THREADS=%d keeps them)",
            threads,
            torch.get_num_threads(),
            threads,
        )
