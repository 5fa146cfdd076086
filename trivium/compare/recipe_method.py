"""A pipeline as a method of a comparison.

The comparison's model, prompts, rewards, sampling, evaluation and seed take the place of those that
the pipeline's stages share; what a stage sets itself stays. The last stage that trains a policy is
measured, and the pipeline's own ``evaluate`` stages are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trivium.compare.config import POLICY_COMMANDS, CompareConfig, MethodConfig
from trivium.compare.stage_budget import remove_step_limit, spends_currency
from trivium.config.base import load_configuration
from trivium.errors import ConfigurationError
from trivium.jobs.job import Job, Settings
from trivium.jobs.validation import validate_jobs
from trivium.pipelines.config import PipelineConfig
from trivium.pipelines.plan import make_jobs
from trivium.pipelines.products import product_faults
from trivium.pipelines.recipes import recipe_path


def recipe_jobs(
    config: CompareConfig,
    method: MethodConfig,
    seed: int,
    directory: Path,
    measured: Callable[[str, Settings], Settings],
    add: Callable[[Job], Job],
) -> list[Job]:
    """Return the jobs of the pipeline's stages, in order.

    Args:
        config: the comparison.
        method: a method with a recipe.
        seed: seed of every stage.
        directory: directory of the method's stages.
        measured: returns the settings of the stage that is measured, from its command and own ones.
        add: returns the job to use: an equal one of another method, or this one.

    Raises:
        ConfigurationError: the recipe is not valid, or its last stage trains no policy.
    """
    try:
        pipeline = _pipeline(config, method, seed, directory, measured)
        last, runs = [*pipeline.stages][-1], config.directory / "runs"

        def named(job: Job) -> Job:
            spends = job.name == last and spends_currency(job.command, job.settings, config.budget)
            return add(
                replace(
                    job,
                    name=str(job.directory.relative_to(runs)),
                    dependencies=job.previous_stages if job.name == last else job.dependencies,
                    budget=config.budget if spends else None,
                )
            )

        jobs = make_jobs(pipeline, task=config.task_directory, add=named)
        faults = product_faults(jobs, validate_jobs({f"stage {k}": v for k, v in jobs.items()}))
        if faults:
            raise ConfigurationError("\n  - ".join(faults))
    except ConfigurationError as error:
        raise ConfigurationError(f"method {method.name}: {error}") from None
    return [*jobs.values()]


def _pipeline(
    config: CompareConfig,
    method: MethodConfig,
    seed: int,
    directory: Path,
    measured: Callable[[str, Settings], Settings],
) -> PipelineConfig:
    """Return the recipe with the comparison's shared settings and its own budget."""
    changes = [f"{key}={json.dumps(value)}" for key, value in method.changes.items()]
    recipe = load_configuration(PipelineConfig, recipe_path(method.recipe or ""), changes)
    names = [name for name in recipe.stages if recipe.command_of(name) != "evaluate"]
    if not names or recipe.command_of(names[-1]) not in POLICY_COMMANDS:
        raise ConfigurationError(
            f"the recipe {method.recipe} ends with "
            f"{names[-1] if names else 'an evaluation'}, which trains no policy: its last stage "
            f"before the evaluation must be one of {', '.join(POLICY_COMMANDS)}"
        )
    stages: dict[str, Any] = {name: recipe.stages[name] for name in names}
    last = names[-1]
    command = recipe.command_of(last)
    settings = measured(command, recipe.stages[last] or {})
    if spends_currency(command, settings, config.budget):
        settings = remove_step_limit(command, settings, own=False)
    stages[last] = settings
    shared = {name: getattr(config, name) for name in ("model", "data", "rewards", "sampling")}
    shared |= {"stages": stages, "evaluation": None, "directory": directory, "seed": seed}
    return recipe.model_copy(update=shared)
