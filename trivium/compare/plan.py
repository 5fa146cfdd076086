"""Turn a comparison into jobs: commands with their settings and their dependencies.

Identical stages of several methods become one job, whose cost counts for each method. Every job has
the configuration of an ordinary run, so it can be repeated by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.compare.config import (
    POLICY_COMMANDS,
    CompareConfig,
    MethodConfig,
    StageConfig,
    slug,
)
from trivium.jobs.budget import MethodBudget
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

UNLIMITED_STEPS = 1_000_000


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
            runs.append(_plan_run(config, shared, jobs, method, seed, None))
        for name, values in method.vary.items():
            runs += [
                _plan_run(config, shared, jobs, method, config.seeds[0], (name, value))
                for value in values
            ]
    return Plan(jobs, runs, base_jobs)


def base_paths(config: CompareConfig) -> str:
    """Return the paths of the base models, without ``${seed}``."""
    paths = [substitute(config.model.path, {"seed": str(s)}) for s in config.seeds]
    return ", ".join(dict.fromkeys(paths))


def with_seed(config: CompareConfig, seed: int) -> CompareConfig:
    """Return the comparison with ``${seed}`` replaced everywhere but in its methods."""
    shared = config.model_dump(mode="json", exclude={"methods"})
    variables = {"seed": str(seed)}
    resolved = map_strings(shared, lambda text: substitute(text, variables))
    return CompareConfig.model_validate({**resolved, "methods": config.methods})


def _plan_run(
    config: CompareConfig,
    shared: Settings,
    jobs: dict[str, Job],
    method: MethodConfig,
    seed: int,
    varied: tuple[str, Any] | None,
) -> MethodRun:
    if method.best_of is not None:
        names = [_add_job(jobs, job) for job in _best_of_jobs(config, shared, method, seed)]
        return MethodRun(method, seed, tuple(names))
    directory = config.directory / "runs" / slug(method.name) / f"seed-{seed}"
    if varied is not None:
        directory = directory / f"{varied[0]}-{value_slug(varied[1])}"
    earlier: dict[str, Job] = {}
    for stage in method.stages:
        last = stage is method.stages[-1]
        settings = _stage_settings(
            config, shared, method, stage, earlier, seed, directory / stage.label
        )
        if last and varied is not None:
            _set_dotted(settings, varied[0], varied[1])
        job = Job(
            name=str((directory / stage.label).relative_to(config.directory / "runs")),
            command=stage.command,
            directory=directory / stage.label,
            settings=settings,
            dependencies=tuple(job.name for job in earlier.values()),
            previous_stages=tuple(job.name for job in earlier.values()),
            share=_budget_share(config, method, stage),
            budget=config.budget if _spends_currency(stage, config.budget) else None,
        )
        earlier[stage.label] = jobs[_add_job(jobs, job)]
    return MethodRun(method, seed, tuple(job.name for job in earlier.values()), varied)


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


def _stage_settings(
    config: CompareConfig,
    shared: Settings,
    method: MethodConfig,
    stage: StageConfig,
    earlier: Mapping[str, Job],
    seed: int,
    directory: Path,
) -> Settings:
    """Return the stage's own settings, completed with those that the comparison shares."""
    own = stage.anchored_settings()
    settings = _shared_settings(shared, stage, earlier) | own
    output = output_settings(stage.command, directory, seed)
    if "run" in output:
        output = {"run": {**settings.get("run", {}), **output["run"]}}
    settings |= output
    if stage is method.stages[-1]:
        settings["evaluation"] = {
            **_evaluation_settings(config, shared),
            **own.get("evaluation", {}),
        }
    if stage.command == "sft" and "evaluation" in settings:
        settings.setdefault("measure_kl", True)
    if config.budget is not None and _spends_currency(stage, config.budget):
        _remove_step_limit(stage, settings)
    variables = stage_variables(earlier) | {"seed": str(seed)}
    owner = f"method {method.name}: "
    return map_strings(settings, lambda text: substitute(text, variables, owner))


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


def _spends_currency(stage: StageConfig, budget: MethodBudget | None) -> bool:
    """Return whether the stage can spend the budget's currency."""
    if budget is None:
        return False
    online = stage.command in ("pairs", "sample", "ppo", "grpo") or "online" in stage.settings
    if budget.currency == "generated_tokens":
        return online
    return budget.currency != "trained_tokens" or stage.command not in ("pairs", "sample")


def _remove_step_limit(stage: StageConfig, settings: Settings) -> None:
    """Set the step count so high that only the budget ends the stage, unless the stage sets it."""
    if stage.command == "grpo" and "iterations" not in settings:
        settings.setdefault("steps_per_iteration", UNLIMITED_STEPS)
    elif stage.command == "ppo":
        settings.setdefault("steps", UNLIMITED_STEPS)
    elif stage.command == "dpo" and "online" in settings:
        settings["online"] = {"steps": UNLIMITED_STEPS, **settings["online"]}


def _budget_share(config: CompareConfig, method: MethodConfig, stage: StageConfig) -> float | None:
    """Return the stage's share of the budget.

    None means the remaining budget, which goes to the last stage that spends the currency. Stages
    without a ``share`` divide evenly what the other shares leave.
    """
    spending = [s for s in method.stages if _spends_currency(s, config.budget)]
    if not spending or stage is spending[-1] or stage not in spending:
        return None
    named = sum(s.share or 0.0 for s in spending)
    unnamed = sum(s.share is None for s in spending)
    return stage.share if stage.share is not None else (1 - named) / unnamed


def _base_evaluation(config: CompareConfig, shared: Settings, seed: int) -> Job:
    """Evaluate the base model."""
    return _evaluation_job(config, shared, "base", seed, {})


def _best_of_jobs(
    config: CompareConfig, shared: Settings, method: MethodConfig, seed: int
) -> list[Job]:
    """Sample ``best_of`` responses of the base per prompt; measure quality and training reward."""
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
    resolved = map_strings(settings, lambda text: substitute(text, {"seed": str(seed)}))
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
