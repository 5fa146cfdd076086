"""Memory of every stage: predicted from its configuration and measured in one of its steps.

Measuring slows a run down, so each stage is run again for one step. The prediction
(``trivium.memory``) uses the token counts of that step.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from trivium.commands import COMMANDS
from trivium.compare.plan import Plan
from trivium.config.base import Configuration
from trivium.errors import ModelError
from trivium.jobs.job import Job
from trivium.memory.lengths import data_lengths
from trivium.memory.report import Lengths
from trivium.memory.stages import PREDICTORS, predict
from trivium.runs.store import read_events, read_samples

ROWS = 512
"""Maximum number of data rows for a measured step; the prediction does not include the texts."""
ONE_STEP: dict[str, dict[str, Any]] = {
    "sft": {"steps": 1, "epochs": 1.0, "validation": None},
    "reward-model": {"epochs": 1e-9, "held_out_share": 0.0},
    "dpo": {"epochs": 1e-9},
    "ppo": {"steps": 1},
    "grpo": {"iterations": 1, "steps_per_iteration": 1, "reward_update": None},
}


def memory_jobs(plan: Plan) -> dict[str, Job]:
    """Return a one-step job for every training stage, by the name of the stage's job."""
    jobs = {}
    first_seed = min(run.seed for run in plan.runs)
    for run in plan.runs:
        if run.seed == first_seed and run.varied is None:
            for name in run.jobs:
                if plan.jobs[name].command in PREDICTORS and name not in jobs:
                    jobs[name] = _one_step(plan.jobs[name])
    return jobs


def _one_step(job: Job) -> Job:
    directory = job.directory.with_name(f"{job.directory.name}-memory")
    settings = {**job.settings, **ONE_STEP[job.command], "evaluation": None}
    if job.command == "reward-model":
        del settings["evaluation"]
    if "online" in settings:
        settings = {**settings, "epochs": 1.0, "online": {**settings["online"], "steps": 1}}
    if settings.get("reward_update"):
        settings["reward_update"] = {**settings["reward_update"], "every": 1}
    run = {
        **settings["run"],
        "directory": str(directory),
        "measure_memory": True,
        "samples_every": 1,
    }
    settings["run"] = {k: v for k, v in run.items() if k != "budget"}
    for key in ("data", "pairs", "steps"):
        if isinstance(settings.get(key), dict):
            settings[key] = {"limit": ROWS, **settings[key]}
    name = f"{job.name}-memory"
    return replace(job, name=name, directory=directory, settings=settings, budget=None)


def memory_record(job: Job) -> dict[str, Any]:
    """Return the measured and the predicted memory of a finished job of ``memory_jobs``."""
    config_class = COMMANDS[job.command].config_class()
    config = config_class.model_validate(job.settings)
    (event,) = [e for e in read_events(job.directory) if e["kind"] == "memory"]
    record: dict[str, Any] = {"measured_bytes": event["measured_bytes"]}
    try:
        predicted = predict(job.command, config, _lengths(job, config))
    except ModelError as error:
        return record | {"predicted": None, "reason": str(error)}
    stages = [{"name": s.name, "models": [asdict(m) for m in s.models]} for s in predicted.stages]
    return record | {
        "predicted": {"stages": stages},
        "predicted_bytes": predicted.bytes,
        "accuracy": predicted.accuracy,
    }


def _lengths(job: Job, config: Configuration) -> Lengths:
    """Return the token counts of the stage's data and of the responses that its step sampled."""
    lengths = data_lengths(job.command, config)
    if job.command in ("ppo", "grpo"):
        return replace(lengths, responses=_sampled_lengths(job))
    return lengths


def _sampled_lengths(job: Job) -> tuple[int, ...]:
    rows = read_samples(job.directory)
    return tuple(row["length"] for row in rows if row["drawn"] == "training")
