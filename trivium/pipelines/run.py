"""``trivium run``: run the stages of a pipeline, and write its record and report."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trivium.commands.output import require_directory
from trivium.config.base import dump
from trivium.errors import ConfigurationError
from trivium.jobs.job import Job
from trivium.jobs.record import status_of
from trivium.jobs.scheduler import run_jobs, spent
from trivium.jobs.stages import stage_record
from trivium.jobs.validation import validate_jobs
from trivium.pipelines.config import PipelineConfig
from trivium.pipelines.plan import make_jobs
from trivium.pipelines.products import product_faults
from trivium.pipelines.task import TASK_DIRECTORY, write_task_files
from trivium.preflight import preflight
from trivium.report import pipeline as report

logger = logging.getLogger("trivium")


def run(config: PipelineConfig, until: str | None = None) -> Path:
    """Run the stages, or those up to ``until``, and return the pipeline's directory.

    Stages that an earlier call finished are not run again unless something that they depend on has
    changed. The record and the report are written after every stage, also if one fails.
    """
    jobs = checked_jobs(config, until)
    with _opened(config.directory):
        write_task_files(config.task_directory, config.task, config.seed, jobs)
        (config.directory / "config.yaml").write_text(dump(config), encoding="utf-8")
        everything = make_jobs(config)
        write(config, everything)
        try:
            run_jobs(jobs, parallel=1, finished=lambda _: write(config, everything))
        finally:
            write(config, everything)
    logger.info("%s", report.summary(config.directory))
    return config.directory


def checked_jobs(config: PipelineConfig, until: str | None = None) -> dict[str, Job]:
    """Return the jobs of the stages up to ``until``, after all checks that need no tokenizer.

    Raises:
        ConfigurationError: a stage is not valid, or there is no stage ``until``.
        DataError: a file that no stage writes is missing or malformed.
        ModelError: a checkpoint that no stage writes is missing or damaged.
    """
    jobs = make_jobs(config)
    if until is not None and until not in jobs:
        near = difflib.get_close_matches(until, jobs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the stages are {', '.join(jobs)}"
        raise ConfigurationError(f"--until {until}: there is no such stage: {hint}")
    configs = validate_jobs({f"stage {name}": job for name, job in jobs.items()})
    faults = product_faults(jobs, configs)
    if faults:
        raise ConfigurationError("\n  - ".join(faults))
    require_directory(config.directory, f"directory = {config.directory}")
    last = [*jobs].index(until) + 1 if until is not None else len(jobs)
    for settings in configs[:last]:
        preflight(settings, skip_below=config.directory)
    return dict([*jobs.items()][:last])


@contextmanager
def _opened(directory: Path) -> Iterator[None]:
    """Create the directory, and keep other processes out of it.

    Raises:
        ConfigurationError: it holds something else, or another process uses it.
    """
    place = f"directory = {directory}"
    names = [entry.name for entry in sorted(directory.iterdir())] if directory.exists() else []
    if names and report.NUMBERS not in names and {*names} - {".lock", TASK_DIRECTORY}:
        raise ConfigurationError(
            f"{place}: holds {names[0]} but no pipeline: name a new or empty directory"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(
            f"{place}: another process runs a pipeline there: wait until it ends, or name another "
            "directory"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{place}: cannot be used: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def write(config: PipelineConfig, jobs: Mapping[str, Job]) -> Path:
    """Write ``pipeline.json`` and the report; return the report's path."""
    record = {
        "title": config.title,
        "seed": config.seed,
        "stages": [_stage(name, job) for name, job in jobs.items()],
    }
    path = config.directory / report.NUMBERS
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return report.write(config.directory)


def _stage(name: str, job: Job) -> dict[str, Any]:
    status = status_of(job)
    return {
        **stage_record(job, spent(job)),
        "name": name,
        "config": job.config.name,
        "state": status.state,
        "seconds": status.seconds,
        "uses": list(job.dependencies),
        "product": str(job.product.relative_to(job.directory.parent)),
    }
