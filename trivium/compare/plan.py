"""Turn a comparison into jobs: commands with their settings and their dependencies.

Identical stages of several methods become one job, whose cost counts for each method. Every job has
the configuration of an ordinary run, so it can be repeated by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trivium.compare.config import (
    POLICY_COMMANDS,
    CompareConfig,
    MethodConfig,
    StageConfig,
    slug,
)
from trivium.compare.recipe_method import recipe_jobs
from trivium.compare.stage_budget import remove_step_limit, spends_currency
from trivium.jobs.job import (
    Job,
    Settings,
    map_strings,
    output_settings,
    replace_paths,
    stage_variables,
    substitute,
)
from trivium.jobs.settings import evaluate_settings, evaluation_settings, template_arguments


@dataclass(frozen=True)
class MethodRun:
    """One method with one seed and, for the frontier, one value of a varied setting."""

    method: MethodConfig
    seed: int
    jobs: tuple[str, ...]
    varied: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """All jobs, each after its dependencies, and the runs that they form.

    ``base_jobs`` holds the name of the base model's evaluation for each seed.
    """

    jobs: dict[str, Job]
    runs: list[MethodRun]
    base_jobs: dict[int, str]


def make_plan(config: CompareConfig) -> Plan:
    """Plan the jobs of all methods, seeds and varied values, and the evaluation of the base."""
    shared = config.model_dump(mode="json", exclude_defaults=True)
    jobs: dict[str, Job] = {}
    runs, base_jobs = [], {}
    for seed in config.seeds:
        base_jobs[seed] = _add_job(jobs, _base_evaluation(config, shared, seed))
    for method in config.methods:
        for seed in config.seeds:
            runs.append(_plan_run(jobs, _Wanted(config, shared, method, seed)))
        for varied in ((name, value) for name, values in method.vary.items() for value in values):
            wanted = _Wanted(config, shared, method, config.seeds[0], varied)
            runs.append(_plan_run(jobs, wanted))
    return Plan(jobs, runs, base_jobs)


def base_paths(config: CompareConfig) -> str:
    """Return the paths of the base models, without ``${seed}``."""
    paths = [substitute(config.model.path, config.variables(seed)) for seed in config.seeds]
    return ", ".join(dict.fromkeys(paths))


def with_seed(config: CompareConfig, seed: int) -> CompareConfig:
    """Return the comparison with its variables replaced everywhere but in its methods."""
    shared = config.model_dump(mode="json", exclude={"methods"})
    variables = config.variables(seed)
    resolved = map_strings(shared, lambda text: substitute(text, variables))
    return CompareConfig.model_validate({**resolved, "methods": config.methods})


@dataclass(frozen=True)
class _Wanted:
    """A run to plan: the comparison and its plain settings, and what is the run's own."""

    config: CompareConfig
    shared: Settings
    method: MethodConfig
    seed: int
    varied: tuple[str, Any] | None = None

    @property
    def directory(self) -> Path:
        directory = self.config.directory / "runs" / slug(self.method.name) / f"seed-{self.seed}"
        if self.varied is None:
            return directory
        return directory / f"{self.varied[0]}-{value_slug(self.varied[1])}"


def _plan_run(jobs: dict[str, Job], wanted: _Wanted) -> MethodRun:
    """Add the jobs of a run that are not there yet, and return the run."""
    if wanted.method.best_of is not None:
        made = [jobs[_add_job(jobs, job)] for job in _best_of_jobs(wanted)]
    elif wanted.method.recipe is not None:
        made = recipe_jobs(
            wanted.config,
            wanted.method,
            wanted.seed,
            wanted.directory,
            partial(_measured, wanted),
            lambda job: jobs[_add_job(jobs, job)],
        )
    else:
        made = _stage_jobs(jobs, wanted)
    return MethodRun(wanted.method, wanted.seed, tuple(job.name for job in made), wanted.varied)


def _stage_jobs(jobs: dict[str, Job], wanted: _Wanted) -> list[Job]:
    config, method = wanted.config, wanted.method
    earlier: dict[str, Job] = {}
    for stage in method.stages:
        directory = wanted.directory / stage.label
        before = tuple(job.name for job in earlier.values())
        job = Job(
            name=str(directory.relative_to(config.directory / "runs")),
            command=stage.command,
            directory=directory,
            settings=_stage_settings(wanted, stage, earlier),
            dependencies=before,
            previous_stages=before,
            share=_budget_share(config, method, stage),
            budget=config.budget if _spends(config, stage) else None,
        )
        earlier[stage.label] = jobs[_add_job(jobs, job)]
    return [*earlier.values()]


def _add_job(jobs: dict[str, Job], job: Job) -> str:
    """Add a job unless there is an identical one; return the name of the job to use."""
    for existing in jobs.values():
        if _identity(existing) == _identity(job):
            return existing.name
    jobs[job.name] = job
    return job.name


def _identity(job: Job) -> str:
    """Return a text that is equal for two jobs that differ only in their directories."""
    text = json.dumps(replace_paths(job.settings, str(job.directory), "."), sort_keys=True)
    previous = "" if job.budget is None or job.share is not None else job.previous_stages
    return f"{job.command} {text} {job.share} {job.budget} {previous}"


# --- Settings of a stage --------------------------------------------------------------------------


def _stage_settings(wanted: _Wanted, stage: StageConfig, earlier: Mapping[str, Job]) -> Settings:
    """Return the stage's own settings, completed with those that the comparison shares."""
    config, method = wanted.config, wanted.method
    settings = _shared_settings(wanted.shared, stage, earlier) | stage.anchored_settings()
    output = output_settings(stage.command, wanted.directory / stage.label, wanted.seed)
    if "run" in output:
        output = {"run": {**settings.get("run", {}), **output["run"]}}
    settings |= output
    if _spends(config, stage):
        settings = remove_step_limit(stage.command, settings)
    if stage is method.stages[-1]:
        settings = _measured(wanted, stage.command, settings)
    elif stage.command == "sft" and "evaluation" in settings:
        settings.setdefault("measure_kl", True)
    variables = stage_variables(earlier) | config.variables(wanted.seed)
    owner = f"method {method.name}: "
    return map_strings(settings, lambda text: substitute(text, variables, owner))


def _measured(wanted: _Wanted, command: str, own: Settings) -> Settings:
    """Return the settings of the stage whose policy is compared: it is evaluated like all others,
    and has the run's value of the varied setting."""
    evaluation = _evaluation_settings(wanted.config, wanted.shared)
    settings = deepcopy({**own, "evaluation": {**evaluation, **(own.get("evaluation") or {})}})
    if command == "sft":
        settings.setdefault("measure_kl", True)
    if wanted.varied is not None:
        _set_dotted(settings, *wanted.varied)
    return settings


def _evaluation_settings(config: CompareConfig, shared: Settings) -> Settings:
    sampling = config.evaluation.sampling(config.sampling)
    data = {**template_arguments(shared), **shared["evaluation"]["data"]}
    evaluation = {**shared["evaluation"], "data": data}
    return evaluation_settings(evaluation, shared["rewards"], sampling)


def _shared_settings(shared: Settings, stage: StageConfig, earlier: Mapping[str, Job]) -> Settings:
    """Return the shared settings under the keys that the stage's command uses."""
    policies = [job for job in earlier.values() if job.command in POLICY_COMMANDS]
    model = {**shared["model"], "path": str(policies[-1].product)} if policies else None
    defaults: Settings = {"model": model or shared["model"]}
    rows = {
        job.command: {"path": str(job.product), **template_arguments(shared)}
        for job in earlier.values()
    }
    if stage.command in ("pairs", "sample", "ppo", "grpo"):
        defaults |= {"data": shared["data"], "rewards": _rewards(shared, stage, earlier)}
        defaults |= {"sampling": shared.get("sampling", {})}
    elif stage.command == "dpo" and "online" not in stage.settings and "pairs" in rows:
        defaults["data"] = rows["pairs"]
    elif stage.command == "reward-model" and "steps" not in stage.settings and "pairs" in rows:
        defaults["pairs"] = rows["pairs"]
    elif stage.command == "sft" and "sample" in rows:
        defaults["data"] = {**rows["sample"], "columns": {"completion": "response"}}
    return defaults


def _rewards(shared: Settings, stage: StageConfig, earlier: Mapping[str, Job]) -> list[Settings]:
    """Return the method's own reward model for PPO and GRPO, else the shared rewards."""
    models = [job for job in earlier.values() if job.command == "reward-model"]
    if stage.command not in ("ppo", "grpo") or not models:
        return shared["rewards"]
    arguments: Settings = {"path": str(models[-1].product)}
    if "steps" not in models[-1].settings:
        return [{"function": "reward_model", "arguments": arguments}]
    arguments["aggregate"] = "product"
    return [{"function": "process_reward_model", "arguments": arguments}]


def _spends(config: CompareConfig, stage: StageConfig) -> bool:
    return spends_currency(stage.command, stage.settings, config.budget)


def _budget_share(config: CompareConfig, method: MethodConfig, stage: StageConfig) -> float | None:
    """Return the stage's share of the budget.

    None means the remaining budget, which goes to the last stage that spends the currency. Stages
    without a ``share`` divide evenly what the other shares leave.
    """
    spending = [s for s in method.stages if _spends(config, s)]
    if not spending or stage is spending[-1] or stage not in spending:
        return None
    named = sum(s.share or 0.0 for s in spending)
    unnamed = sum(s.share is None for s in spending)
    return stage.share if stage.share is not None else (1 - named) / unnamed


def _base_evaluation(config: CompareConfig, shared: Settings, seed: int) -> Job:
    """Evaluate the base model."""
    return _evaluation_job(config, shared, "base", seed, {})


def _best_of_jobs(wanted: _Wanted) -> list[Job]:
    """Sample ``best_of`` responses of the base per prompt; measure quality and training reward."""
    config, shared, method, seed = wanted.config, wanted.shared, wanted.method, wanted.seed
    samples = {"samples": method.best_of}
    quality = _evaluation_job(config, shared, f"{slug(method.name)}-quality", seed, samples)
    rewards = {"rewards": shared["rewards"]}
    return [
        quality,
        _evaluation_job(config, shared, f"{slug(method.name)}-reward", seed, samples | rewards),
    ]


def _evaluation_job(
    config: CompareConfig, shared: Settings, name: str, seed: int, changes: Settings
) -> Job:
    settings = {
        "model": shared["model"],
        **evaluate_settings(_evaluation_settings(config, shared), config.sampling.temperature),
        "samples": config.evaluation.samples,
        "seed": config.evaluation.seed,
        **changes,
    }
    directory = config.directory / "runs" / "base" / f"{name}-seed-{seed}"
    resolved = map_strings(settings, lambda text: substitute(text, config.variables(seed)))
    resolved |= {"output": str(directory / "evaluation.json"), "overwrite": True}
    return Job(f"base/{name}-seed-{seed}", "evaluate", directory, resolved)


def _set_dotted(settings: Settings, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[last] = value


def value_slug(value: Any) -> str:
    """Return a varied value in a form that can be part of a directory name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", json.dumps(value)).strip("_")
