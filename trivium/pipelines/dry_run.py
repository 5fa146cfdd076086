"""``trivium run --dry-run``: the stages that would run, and what each of them needs.

Nothing is trained. A model that a stage will produce has the shape of the one that the stage starts
from, and rows that a stage will sample have the length limit of its responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from trivium.commands import COMMANDS
from trivium.config.base import Configuration
from trivium.data.rows import RowsConfig
from trivium.errors import ModelError
from trivium.jobs.job import Job, map_strings
from trivium.jobs.record import Status, configuration_of, status_of
from trivium.memory.flops import Work, predict_flops
from trivium.memory.lengths import data_lengths
from trivium.memory.report import Lengths
from trivium.memory.stages import PREDICTORS, predict
from trivium.monitoring.progress import duration
from trivium.pipelines.config import PipelineConfig
from trivium.pipelines.run import checked_jobs
from trivium.pipelines.task import write_task_files

_DATA = {"sft": "data", "dpo": "data", "reward-model": "pairs"}
"""Section of the rows that a command may take from an earlier stage."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the plan: its job, its state, and what it is predicted to need.

    Attributes:
        memory: bytes at the peak of a training run; None: no prediction.
        work: steps and FLOPs; None: no prediction.
    """

    job: Job
    status: Status
    runs: bool
    memory: int | None = None
    work: Work | None = None


@dataclass(frozen=True)
class DryRunPlan:
    """Stages that a pipeline would run."""

    stages: tuple[PlannedStage, ...]

    def __rich__(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("stage", "command", "uses", ""):
            table.add_column(heading)
        for heading in ("steps", "memory, MiB", "FLOPs, at most"):
            table.add_column(heading, justify="right")
        for stage in self.stages:
            work = stage.work
            table.add_row(
                stage.job.name,
                stage.job.command,
                ", ".join(stage.job.dependencies),
                _action(stage),
                f"{work.steps:,}" if work is not None and work.steps else "",
                "" if stage.memory is None else f"{stage.memory / 2**20:,.0f}",
                "" if work is None else f"{work.flops:.3g}",
            )
        return table


def plan(config: PipelineConfig, until: str | None = None) -> DryRunPlan:
    """Return the plan of a pipeline. Only the built-in task's files are written, if it uses them.

    Raises:
        ConfigurationError, DataError, ModelError: as for running it.
    """
    jobs = checked_jobs(config, until)
    write_task_files(config.task_directory, config.task, config.seed, jobs)
    stand_ins: dict[str, str] = {}
    lengths: dict[str, Lengths] = {}
    rerun: set[str] = set()
    stages = []
    for name, job in jobs.items():
        status = status_of(job)
        runs = status.state != "finished" or not rerun.isdisjoint(job.dependencies)
        rerun |= {name} if runs else set()
        settings = map_strings(job.settings, lambda text: stand_ins.get(text, text))
        settings_job = replace(job, settings=settings)
        prediction = _predict(settings_job, jobs, lengths)
        stages.append(PlannedStage(job, status, runs, *prediction))
        if COMMANDS[job.command].trains:
            stand_ins[str(job.product)] = str(settings["model"]["path"])
    return DryRunPlan(tuple(stages))


def _predict(
    job: Job, jobs: Mapping[str, Job], known: dict[str, Lengths]
) -> tuple[int | None, Work | None]:
    """Return the memory and the work of a stage, where they can be predicted."""
    config = configuration_of(job)
    lengths = _lengths(job, config, jobs, known)
    if lengths is None:
        return None, None
    known[job.name] = lengths
    try:
        work = predict_flops(job.command, config, lengths)
        if job.command not in PREDICTORS:
            return None, work
        return predict(job.command, config, lengths).bytes, work
    except ModelError:
        return None, None


def _lengths(
    job: Job, config: Any, jobs: Mapping[str, Job], known: Mapping[str, Lengths]
) -> Lengths | None:
    """Return the token counts of a stage's data: of its file, or of what a stage will sample."""
    section: Configuration | None = getattr(config, _DATA.get(job.command, ""), None)
    paths = [s.path for s in section.sources] if isinstance(section, RowsConfig) else []
    pending = [j for j in jobs.values() if str(j.product) in paths and not j.product.exists()]
    if not pending:
        return _read_lengths(job, config)
    if len(paths) > 1:
        return None
    (source,) = pending
    sampled = known.get(source.name)
    if sampled is None:
        return None
    settings: Any = configuration_of(source)
    pairs = getattr(settings, "pairs_per_prompt", None)
    count = sampled.count * (settings.samples if pairs is None else pairs)
    held_out = 0
    if job.command == "reward-model" and config.validation_pairs is None:
        held_out = math.ceil(config.held_out_share * count)
    return replace(sampled, count=count, held_out=held_out)


def _read_lengths(job: Job, config: Any) -> Lengths | None:
    if getattr(config, "model", None) is None:
        return None  # rows with their candidates: nothing is computed
    return data_lengths(job.command, config) if job.command in _READ else None


_READ = (*PREDICTORS, "sample", "pairs", "evaluate")


def _action(stage: PlannedStage) -> str:
    if not stage.runs:
        return f"kept, took {duration(stage.status.seconds)}"
    if stage.status.state == "changed":
        more = len(stage.status.changes) - 1
        return f"runs again: {stage.status.changes[0]}" + (f" and {more} more" if more else "")
    actions = {"new": "runs", "stopped": "resumes", "finished": "runs again if its input changes"}
    return actions[stage.status.state]
