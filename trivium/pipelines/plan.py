"""Turn a pipeline into jobs: fill in what its stages share, and the outputs of earlier stages."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trivium.commands import COMMANDS
from trivium.config.base import Configuration, sections_in
from trivium.data.preferences import PreferencesConfig, StepLabelsConfig
from trivium.data.prompts import PromptsConfig
from trivium.data.rows import RowsConfig
from trivium.errors import ConfigurationError
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.jobs.job import (
    PLACEHOLDER,
    Job,
    Settings,
    map_strings,
    output_settings,
    stage_variables,
    substitute,
    texts_in,
)
from trivium.jobs.settings import evaluate_settings, evaluation_settings, template_arguments
from trivium.pipelines.config import SEED, TASK, PipelineConfig

_FILLED = ("model", "data", "rewards", "sampling", "evaluation")
_FILLED_INSIDE = ("data", "rewards", "sampling")


def make_jobs(
    config: PipelineConfig,
    task: Path | None = None,
    add: Callable[[Job], Job] = lambda job: job,
) -> dict[str, Job]:
    """Return the jobs of all stages, in order.

    Args:
        config: the pipeline.
        task: directory of the built-in task; None: that of the pipeline.
        add: returns the job to use for a stage, such as an equal job of another pipeline.

    Raises:
        ConfigurationError: a stage names no stage, a later one or itself.
    """
    faults = [*_reference_faults(config)]
    if len(faults) == 1:
        raise ConfigurationError(faults[0])
    if faults:
        raise ConfigurationError("\n  - ".join([f"found {len(faults)} faults:", *faults]))
    jobs: dict[str, Job] = {}
    for name in config.stages:
        jobs[name] = add(_job(config, name, jobs, task or config.task_directory))
    return jobs


def _job(config: PipelineConfig, name: str, earlier: Mapping[str, Job], task: Path) -> Job:
    command, directory = config.command_of(name), config.directory / name
    own = config.stage_settings(name)
    settings = _filled(config, command, own)
    output = output_settings(command, directory, config.seed)
    if "run" in output:
        output = {"run": {**output["run"], **(own.get("run") or {})}}
    settings = {**output, **settings, **{k: v for k, v in output.items() if k == "run"}}
    variables = {
        **stage_variables(earlier),
        TASK: str(task),
        SEED: str(config.seed),
    }
    used = [earlier[stage].name for _, stage in _references(settings) if stage in earlier]
    return Job(
        name=name,
        command=command,
        directory=directory,
        settings=map_strings(settings, lambda t: substitute(t, variables, f"stage {name}: ")),
        dependencies=tuple(dict.fromkeys(used)),
        previous_stages=tuple(job.name for job in earlier.values()),
    )


# --- Shared settings ------------------------------------------------------------------------------


def _filled(config: PipelineConfig, command: str, own: Settings) -> Settings:
    """Return a stage's own settings, completed with those that all stages share."""
    cls = COMMANDS[command].config_class()
    shared = _shared(config)
    if command == "evaluate":
        held_out = evaluate_settings(shared.get("evaluation", {}), config.sampling.temperature)
        shared = {k: v for k, v in shared.items() if k != "data"} | held_out
        own = {k: v for k, v in held_out.items() if k not in _FILLED} | own
    if own.get("candidates"):  # the rows hold the responses: nothing is sampled or scored
        shared = {name: value for name, value in shared.items() if name == "data"}
    return _fill(cls, own, shared, _FILLED)


def _shared(config: PipelineConfig) -> Settings:
    """Return the shared sections that the pipeline sets."""
    shared = config.model_dump(mode="json", exclude_defaults=True, include={*_FILLED[:-1]})
    evaluation = config.evaluation_settings()
    if evaluation is not None:
        rewards = shared.get("rewards")
        evaluation = evaluation_settings(evaluation, rewards, config.sampling)
        prompts = {k: v for k, v in shared.get("data", {}).items() if k != "limit"}
        evaluation["data"] = _rows(PromptsConfig, evaluation.get("data") or {}, prompts)
        shared["evaluation"] = evaluation
    return shared


def _fill(
    cls: type[Configuration], own: Settings, shared: Settings, names: tuple[str, ...]
) -> Settings:
    """Return a section with the shared settings under the names that its class has."""
    filled = dict(own)
    for key, value in own.items():
        kinds = sections_in(cls.model_fields[key].annotation) if key in cls.model_fields else []
        if not isinstance(value, dict) or len(kinds) != 1:
            continue
        if issubclass(kinds[0], RowsConfig) and any(map(_is_output, _paths(value))):
            filled[key] = {**template_arguments(shared), **value}
        elif key not in _FILLED:
            filled[key] = _fill(kinds[0], value, shared, _FILLED_INSIDE)
    for name in names:
        field = cls.model_fields.get(name)
        if field is None or name not in shared or (name in own and own[name] is None):
            continue
        kind = next(iter(sections_in(field.annotation)), None)
        if name == "data" and kind in (PreferencesConfig, StepLabelsConfig):
            continue  # the shared rows are prompts
        value = shared[name]
        if isinstance(value, dict) and isinstance(own.get(name, {}), dict):
            value = _section(name, kind, filled.get(name, {}), value)
        else:
            value = own.get(name, value)
        filled[name] = value
    return filled


def _paths(rows: Settings) -> list[Any]:
    """Return the path of rows, or those of their mixture."""
    mixture = rows.get("mixture")
    sources = mixture if isinstance(mixture, list) else []
    return [rows.get("path"), *(s.get("path") for s in sources if isinstance(s, dict))]


def _is_output(path: Any) -> bool:
    """Return whether a path is a stage's output: its rows hold prompts of the shared data."""
    match = PLACEHOLDER.fullmatch(str(path))
    return match is not None and match[1] not in (TASK, SEED)


def _section(name: str, kind: Any, own: Settings, shared: Settings) -> Settings:
    """Return one section of a stage, completed with the shared section of the same name."""
    if isinstance(kind, type) and issubclass(kind, RowsConfig):
        return _rows(kind, own, shared)
    if name == "model" and "path" in own:
        shared = {k: v for k, v in shared.items() if k != "revision"}
    if kind is EvaluationConfig and isinstance(own.get("data"), dict):
        own = {**own, "data": _rows(PromptsConfig, own["data"], shared.get("data", {}))}
    return {**shared, **own}


def _rows(kind: type[RowsConfig], own: Settings, shared: Settings) -> Settings:
    """Return the source of a stage's rows: its own path or mixture, or the shared one, changed."""
    if "path" in own or "mixture" in own:
        return own
    kept = {name: value for name, value in shared.items() if name in kind.model_fields}
    known = kind.known_columns
    columns = {
        column: source
        for column, source in kept.pop("columns", {}).items()
        if known is None or column in known
    }
    columns |= own.get("columns") or {}
    return {**kept, **own, **({"columns": columns} if columns else {})}


# --- References -----------------------------------------------------------------------------------


def _references(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the place and the stage of every ``${stage}`` in settings."""
    for place, text in texts_in(settings):
        for match in PLACEHOLDER.finditer(text):
            yield place, match[1].removesuffix(".directory")


def _reference_faults(config: PipelineConfig) -> Iterator[str]:
    """Yield the references to no stage, to a later one, and to the stage itself."""
    names = [*config.stages]
    used = {name: [*_references(config.stage_settings(name))] for name in names}
    for place, name in _references(_shared(config)):
        if name not in (TASK, SEED):
            yield (
                f"{place}: ${{{name}}} is a stage's output, and shared settings are for all "
                "stages: write it in the stages that use it"
            )
    for at, name in enumerate(names):
        for place, other in dict.fromkeys(used[name]):
            where = f"stage {name}: {place} names ${{{other}}}"
            if other in (TASK, SEED) or other in names[:at]:
                continue
            if other not in names:
                yield f"{where}, and there is no such stage{_hint(other, names[:at])}"
            elif other == name:
                yield f"{where}, its own output: name an earlier stage{_hint('', names[:at])}"
            elif name in _needs(other, used):
                yield (
                    f"{where}, and {other} needs the output of {name}: neither can be first, so "
                    "remove one of the two references"
                )
            else:
                yield f"{where}, a later stage: move {other} before {name}"


def _needs(name: str, used: Mapping[str, list[tuple[str, str]]]) -> set[str]:
    """Return the stages whose output a stage needs, directly or not."""
    found: set[str] = set()
    pending = [name]
    while pending:
        for _, other in used.get(pending.pop(), []):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def _hint(name: str, earlier: list[str]) -> str:
    near = difflib.get_close_matches(name, earlier, n=1)
    if near:
        return f": did you mean ${{{near[0]}}}?"
    known = [*earlier, TASK]
    return f"; it can name {', '.join(f'${{{other}}}' for other in known)}"
