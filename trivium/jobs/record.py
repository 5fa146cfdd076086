"""Inputs of a job, and whether its results still hold for them.

A finished job is run again if its resolved configuration, the content of a file or checkpoint that
it reads, or its output has changed. A stopped run resumes if nothing that it depends on has.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trivium.commands import COMMANDS
from trivium.config.base import Configuration
from trivium.jobs.job import Job
from trivium.runs.provenance import differences, digest, settings_that_matter
from trivium.runs.store import is_finished, read_run

State = Literal["new", "changed", "stopped", "finished"]
NOT_SET = "(not set)"


@dataclass(frozen=True)
class Status:
    """State of a job.

    Attributes:
        state: ``changed``: finished, but with other inputs; ``stopped``: can be resumed.
        seconds: seconds that a finished job took.
        changes: what has changed since a finished job ran.
    """

    state: State
    seconds: float = 0.0
    changes: tuple[str, ...] = ()


def configuration_of(job: Job) -> Configuration:
    """Return the validated configuration of a job."""
    return COMMANDS[job.command].config_class().model_validate(job.settings)


def status_of(job: Job) -> Status:
    """Return whether a job is new, finished with these inputs or others, or can be resumed."""
    config = configuration_of(job)
    done = _read(job.sibling(".done.json"))
    if done is not None:
        changes = tuple(_changes(done, inputs_of(job)))
        if not job.product.exists():
            changes = (*changes, f"{job.product} is missing")
        return Status("changed" if changes else "finished", float(done["seconds"]), changes)
    return Status("stopped" if _can_resume(job, config) else "new")


def inputs_of(job: Job) -> dict[str, Any]:
    """Return what the results of a job depend on: its settings and the digests of its inputs."""
    config = configuration_of(job)
    settings = {k: v for k, v in settings_that_matter(config).items() if k not in _PLACES}
    digests = {str(path): _digest(path, _stamp(path)) for path in sorted(set(config.inputs()))}
    return json.loads(json.dumps({"settings": settings, "inputs": digests}))


def write_done(job: Job, inputs: dict[str, Any], seconds: float) -> None:
    """Record that a job has finished."""
    record = json.dumps({"seconds": seconds, **inputs}) + "\n"
    job.sibling(".done.json").write_text(record, encoding="utf-8")


_PLACES = ("output", "overwrite")
"""Settings of commands without a run that do not affect their results."""


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changes = [
        f"{name}: {_shown(old['settings'], name)} → {_shown(new['settings'], name)}"
        for name in dict.fromkeys([*old["settings"], *new["settings"]])
        if old["settings"].get(name, NOT_SET) != new["settings"].get(name, NOT_SET)
    ]
    known = old["inputs"]
    return changes + [
        f"{path}: its content changed"
        for path, value in new["inputs"].items()
        if known.get(path) not in (None, value)
    ]


def _shown(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else NOT_SET


def _read(path: Path) -> dict[str, Any] | None:
    """Return a completion file; None if there is none, or an unreadable or an older one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"seconds", "settings"} <= set(record) else None


def _can_resume(job: Job, config: Configuration) -> bool:
    """Return whether the job's run is unfinished and nothing that it depends on has changed."""
    if not (job.directory / "run.json").is_file() or is_finished(job.directory):
        return False
    saved = read_run(job.directory)
    return "id" in saved and not differences(saved, job.directory, config)


def _stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return the names, sizes and times of the files at a path."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())


@cache
def _digest(path: Path, stamp: tuple[tuple[str, int, int], ...]) -> str:
    """Return the digest of a path, computed once in this process while its files are unchanged."""
    return digest(path)
