"""From a comparison to its jobs: which command with which settings, after which others.

Equal stages of several methods are one job, whose cost counts for each. What is written here is what
an ordinary run's configuration would say, so any job can be repeated by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trivium.compare.config import (
    POLICY_COMMANDS,
    BudgetOfMethods,
    CompareConfig,
    MethodConfig,
    StageConfig,
    slug,
)
from trivium.errors import ConfigurationError

Settings = dict[str, Any]
MANY_STEPS = 1_000_000
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Job:
    """One command of one method, or of several that share it.

    ``after`` are the jobs whose results it uses. With a budget, ``share`` of it is the job's, or,
    if None, what the method's earlier jobs (``chain``) left.
    """

    name: str
    command: str
    directory: Path
    settings: Settings
    after: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()
    share: float | None = None
    budget: BudgetOfMethods | None = None

    def beside(self, suffix: str) -> Path:
        """A file beside the job's directory: its configuration, log, or mark of being done."""
        return self.directory.with_name(self.directory.name + suffix)

    @property
    def config(self) -> Path:
        return self.beside(".yaml")


@dataclass(frozen=True)
class Route:
    """One method with one seed and, for the frontier, one value of a varied setting."""

    method: MethodConfig
    seed: int
    jobs: tuple[str, ...]
    varied: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """All jobs, in an order that respects what they build on, and the routes they make up."""

    jobs: dict[str, Job]
    routes: list[Route]
    bases: dict[int, str]


def make_plan(config: CompareConfig) -> Plan:
    """The jobs of all methods, seeds and varied values, and the base's own evaluation."""
    shared = config.model_dump(mode="json", exclude_defaults=True)
    jobs: dict[str, Job] = {}
    routes, bases = [], {}
    for seed in config.seeds:
        bases[seed] = _add(jobs, _base(config, shared, seed))
    for method in config.methods:
        for seed in config.seeds:
            routes.append(_route(config, shared, jobs, method, seed, None))
        for name, values in method.vary.items():
            routes += [
                _route(config, shared, jobs, method, config.seeds[0], (name, value))
                for value in values
            ]
    return Plan(jobs, routes, bases)


def for_seed(config: CompareConfig, seed: int) -> CompareConfig:
    """The comparison with ``${seed}`` filled in, its methods left aside."""
    shared = config.model_dump(mode="json", exclude={"methods"})
    known = {"seed": str(seed)}
    filled = _each_text(shared, lambda text: _resolved(text, known, None))
    return CompareConfig.model_validate({**filled, "methods": config.methods})


def _route(
    config: CompareConfig,
    shared: Settings,
    jobs: dict[str, Job],
    method: MethodConfig,
    seed: int,
    varied: tuple[str, Any] | None,
) -> Route:
    if method.best_of is not None:
        names = [_add(jobs, job) for job in _best_of(config, shared, method, seed)]
        return Route(method, seed, tuple(names))
    place = config.directory / "runs" / slug(method.name) / f"seed-{seed}"
    if varied is not None:
        place = place / f"{varied[0]}-{value_name(varied[1])}"
    made: dict[str, Job] = {}
    for stage in method.stages:
        last = stage is method.stages[-1]
        settings = _filled(config, shared, method, stage, made, seed, place / stage.label)
        if last and varied is not None:
            _set(settings, varied[0], varied[1])
        job = Job(
            name=str((place / stage.label).relative_to(config.directory / "runs")),
            command=stage.command,
            directory=place / stage.label,
            settings=settings,
            after=tuple(job.name for job in made.values()),
            chain=tuple(job.name for job in made.values()),
            share=_share(config, method, stage),
            budget=config.budget if _spends(stage, config.budget) else None,
        )
        made[stage.label] = jobs[_add(jobs, job)]
    return Route(method, seed, tuple(job.name for job in made.values()), varied)


def _add(jobs: dict[str, Job], job: Job) -> str:
    """Add a job unless an equal one is there; the name under which it is."""
    for known in jobs.values():
        if _identity(known) == _identity(job):
            return known.name
    jobs[job.name] = job
    return job.name


def _identity(job: Job) -> str:
    """What makes two jobs the same: everything but where they are written."""
    text = json.dumps(replace_paths(job.settings, str(job.directory), "."), sort_keys=True)
    after = "" if job.budget is None or job.share is not None else job.chain
    return f"{job.command} {text} {job.share} {job.budget} {after}"


def replace_paths(value: Any, old: str, new: str) -> Any:
    """The value with ``old`` replaced in all its texts."""
    return _each_text(value, lambda text: text.replace(old, new))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _each_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(item, change) for item in value]
    return value


# --- What a stage's configuration says ------------------------------------------------------------


def _filled(
    config: CompareConfig,
    shared: Settings,
    method: MethodConfig,
    stage: StageConfig,
    made: Mapping[str, Job],
    seed: int,
    place: Path,
) -> Settings:
    """The stage's settings, and what it does not set itself."""
    own = stage.anchored_settings()
    given = _defaults(shared, stage, made) | own
    if stage.command in ("pairs", "sample"):
        given |= {"output": str(place / "rows.jsonl"), "overwrite": True, "seed": seed}
    else:
        run = {"directory": str(place), "seed": seed, "overwrite": True}
        given["run"] = {**given.get("run", {}), **run}
        if stage is method.stages[-1]:
            given["evaluation"] = {**_held_out(config, shared), **own.get("evaluation", {})}
    if stage.command == "sft" and "evaluation" in given:
        given.setdefault("measure_kl", True)
    if config.budget is not None and _spends(stage, config.budget):
        _lift_steps(stage, given)
    known = {label: str(job.directory) for label, job in made.items()} | {"seed": str(seed)}
    return _each_text(given, lambda text: _resolved(text, known, method))


def _held_out(config: CompareConfig, shared: Settings) -> Settings:
    """The evaluation of every method: all that is left to a run's own settings is said."""
    asked = config.evaluation.sampling(config.sampling)
    said = {
        "rewards": shared["rewards"],
        "at_start": False,
        "max_tokens": asked.max_tokens,
        "stop": list(asked.stop),
        "stop_tokens": list(asked.stop_tokens),
    }
    return {**said, **shared["evaluation"]}


def _defaults(shared: Settings, stage: StageConfig, made: Mapping[str, Job]) -> Settings:
    """What the comparison says, in the words of the stage's command."""
    policies = [job for job in made.values() if job.command in POLICY_COMMANDS]
    model = {**shared["model"], "path": str(policies[-1].directory / "final")} if policies else None
    found: Settings = {"model": model or shared["model"]}
    rows = {job.command: str(job.directory / "rows.jsonl") for job in made.values()}
    if stage.command in ("pairs", "sample", "ppo", "grpo"):
        found |= {"data": shared["data"], "rewards": _rewards(shared, stage, made)}
        found |= {"sampling": shared.get("sampling", {})}
    elif stage.command == "dpo" and "online" not in stage.settings and "pairs" in rows:
        found["data"] = {"path": rows["pairs"]}
    elif stage.command == "reward-model" and "steps" not in stage.settings and "pairs" in rows:
        found["pairs"] = {"path": rows["pairs"]}
    elif stage.command == "sft" and "sample" in rows:
        found["data"] = {"path": rows["sample"], "columns": {"completion": "response"}}
    return found


def _rewards(shared: Settings, stage: StageConfig, made: Mapping[str, Job]) -> list[Settings]:
    """PPO and GRPO learn from the method's reward model, if it trains one; all else as shared."""
    models = [job for job in made.values() if job.command == "reward-model"]
    if stage.command not in ("ppo", "grpo") or not models:
        return shared["rewards"]
    arguments: Settings = {"path": str(models[-1].directory / "final")}
    if "steps" not in models[-1].settings:
        return [{"function": "reward_model", "arguments": arguments}]
    arguments["aggregate"] = "product"
    return [{"function": "process_reward_model", "arguments": arguments}]


def _spends(stage: StageConfig, budget: BudgetOfMethods | None) -> bool:
    """Whether a stage can spend the currency at all."""
    if budget is None:
        return False
    online = stage.command in ("pairs", "sample", "ppo", "grpo") or "online" in stage.settings
    if budget.currency == "generated_tokens":
        return online
    return budget.currency != "trained_tokens" or stage.command not in ("pairs", "sample")


def _lift_steps(stage: StageConfig, settings: Settings) -> None:
    """Where only the budget ends a stage, its own count of steps must not."""
    if stage.command == "grpo" and "iterations" not in settings:
        settings.setdefault("steps_per_iteration", MANY_STEPS)
    elif stage.command == "ppo":
        settings.setdefault("steps", MANY_STEPS)
    elif stage.command == "dpo" and "online" in settings:
        settings["online"] = {"steps": MANY_STEPS, **settings["online"]}


def _share(config: CompareConfig, method: MethodConfig, stage: StageConfig) -> float | None:
    """The stage's share of the budget; None for the last that spends: what is left.

    The stages that name none share the rest evenly.
    """
    spending = [s for s in method.stages if _spends(s, config.budget)]
    if not spending or stage is spending[-1] or stage not in spending:
        return None
    named = sum(s.share or 0.0 for s in spending)
    unnamed = sum(s.share is None for s in spending)
    return stage.share if stage.share is not None else (1 - named) / unnamed


def _base(config: CompareConfig, shared: Settings, seed: int) -> Job:
    """The evaluation of the base, once for all seeds that share it."""
    return _evaluation(config, shared, "base", seed, {})


def _best_of(config: CompareConfig, shared: Settings, method: MethodConfig, seed: int) -> list[Job]:
    """Several responses of the base per prompt, their quality and their training reward."""
    samples = {"samples": method.best_of}
    quality = _evaluation(config, shared, f"{slug(method.name)}-quality", seed, samples)
    rewards = {"rewards": shared["rewards"]}
    return [
        quality,
        _evaluation(config, shared, f"{slug(method.name)}-reward", seed, samples | rewards),
    ]


def _evaluation(
    config: CompareConfig, shared: Settings, name: str, seed: int, changes: Settings
) -> Job:
    held_out = _held_out(config, shared)
    taken = ("rewards", "max_tokens", "stop", "stop_tokens")
    settings = {
        "model": shared["model"],
        "data": {**held_out["data"]},
        **{name: held_out[name] for name in taken},
        "samples": config.evaluation.samples,
        "temperature": config.sampling.temperature,
        "seed": config.evaluation.seed,
        **changes,
    }
    if config.evaluation.prompts is not None:
        settings["data"]["limit"] = config.evaluation.prompts
    place = config.directory / "runs" / "base" / f"{name}-seed-{seed}"
    resolved = _each_text(settings, lambda text: _resolved(text, {"seed": str(seed)}, None))
    resolved |= {"output": str(place / "evaluation.json"), "overwrite": True}
    return Job(f"base/{name}-seed-{seed}", "evaluate", place, resolved)


def _resolved(text: str, known: Mapping[str, str], method: MethodConfig | None) -> str:
    """The text with ``${name}`` replaced by what it stands for."""

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            where = "" if method is None else f"method {method.name}: "
            raise ConfigurationError(
                f"{where}{match[0]} in {text!r} names nothing that is known there: use one of "
                + ", ".join(f"${{{name}}}" for name in known)
            )
        return known[match[1]]

    return _PLACEHOLDER.sub(value, text)


def _set(settings: Settings, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    settings[last] = value


def value_name(value: Any) -> str:
    """A varied value as part of a directory's name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", json.dumps(value)).strip("_")


def with_budget(job: Job, spent: float) -> Job:
    """The job with its part of the budget written into its settings, given what its method spent."""
    if job.budget is None:
        return job
    whole = job.budget.amount
    mine = whole - spent if job.share is None else whole * job.share
    if mine <= 0:
        raise ConfigurationError(
            f"{job.name}: the stages before it spent {spent:,.4g} of {whole:,.4g} "
            f"{job.budget.currency}, and nothing is left for it: give them smaller shares, or "
            "raise the budget"
        )
    budget = {job.budget.currency: mine}
    settings = dict(job.settings)
    if "run" in settings:
        settings["run"] = {**settings["run"], "budget": budget}
    else:
        settings["budget"] = budget
    return replace(job, settings=settings)
