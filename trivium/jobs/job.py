"""A job: one command with its settings, its directory, and the jobs whose output it uses.

Every job has the configuration of an ordinary run, so it can be repeated by hand. Settings name the
output of another stage as ``${stage}``, and the stage's directory as ``${stage.directory}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trivium.commands import COMMANDS
from trivium.config.functions import anchored
from trivium.errors import ConfigurationError
from trivium.jobs.budget import MethodBudget

Settings = dict[str, Any]
PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")
STAGE_COMMANDS = tuple(name for name, command in COMMANDS.items() if command.product)
"""Commands that can be a stage."""


@dataclass(frozen=True)
class Job:
    """One command of one method or pipeline, or of several methods that share it.

    Attributes:
        dependencies: names of the jobs whose results this job uses.
        previous_stages: names of the method's earlier jobs.
        share: share of ``budget`` for this job; None: the budget that the previous stages left.
    """

    name: str
    command: str
    directory: Path
    settings: Settings
    dependencies: tuple[str, ...] = ()
    previous_stages: tuple[str, ...] = ()
    share: float | None = None
    budget: MethodBudget | None = None

    def sibling(self, suffix: str) -> Path:
        """Return a path next to the job's directory: its configuration, log or completion file."""
        return self.directory.with_name(self.directory.name + suffix)

    @property
    def config(self) -> Path:
        return self.sibling(".yaml")

    @property
    def product(self) -> Path:
        """Checkpoint or file that the command produces."""
        return self.directory / COMMANDS[self.command].product


def output_settings(command: str, directory: Path, seed: int) -> Settings:
    """Return the settings that make a command write its product into a directory."""
    if COMMANDS[command].trains:
        return {"run": {"directory": str(directory), "seed": seed, "overwrite": True}}
    settings: Settings = {"output": str(directory / COMMANDS[command].product), "overwrite": True}
    # An evaluation has a seed of its own, so that all evaluations sample alike.
    return settings if command == "evaluate" else {**settings, "seed": seed}


def with_budget(job: Job, spent: float) -> Job:
    """Return the job with its part of the budget in its settings.

    Args:
        job: the job.
        spent: amount that the previous stages of its method spent.

    Raises:
        ConfigurationError: no budget is left for the job.
    """
    if job.budget is None:
        return job
    total = job.budget.amount
    amount = total - spent if job.share is None else total * job.share
    if amount <= 0:
        raise ConfigurationError(
            f"{job.name}: no budget is left, the stages before it spent {spent:,.4g} of "
            f"{total:,.4g} {job.budget.currency}: give them smaller shares or raise the budget"
        )
    budget = {job.budget.currency: amount}
    settings = dict(job.settings)
    if "run" in settings:
        settings["run"] = {**settings["run"], "budget": budget}
    else:
        settings["budget"] = budget
    return replace(job, settings=settings)


# --- Texts in settings ----------------------------------------------------------------------------


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return the value with a function applied to every text in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def replace_paths(value: Any, old: str, new: str) -> Any:
    """Return the value with ``old`` replaced by ``new`` in all strings."""
    return map_strings(value, lambda text: text.replace(old, new))


def texts_in(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in settings with its dotted name."""
    if isinstance(value, str):
        yield name, value
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from texts_in(item, f"{name}.{key}" if name else str(key))


def anchor_functions(value: Any, directory: Path | None) -> Any:
    """Return settings with reward files given relative to the configuration's directory."""
    if isinstance(value, dict):
        return {
            key: anchored(item, directory)
            if key == "function" and isinstance(item, str)
            else anchor_functions(item, directory)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [anchor_functions(item, directory) for item in value]
    return value


def stage_variables(jobs: Mapping[str, Job]) -> dict[str, str]:
    """Return the output and the directory of every stage, by the name in ``${…}``."""
    outputs = {name: str(job.product) for name, job in jobs.items()}
    return outputs | {f"{name}.directory": str(job.directory) for name, job in jobs.items()}


def substitute(text: str, variables: Mapping[str, str], owner: str = "") -> str:
    """Replace every ``${name}`` in the text by its value.

    Raises:
        ConfigurationError: a name is not defined, or a path continues a stage's output.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in variables:
            raise ConfigurationError(
                f"{owner}{match[0]} in {text!r} is not defined: use one of "
                + ", ".join(f"${{{known}}}" for known in variables)
            )
        if f"{name}.directory" in variables and text[match.end() :].startswith("/"):
            rest = text[match.end() :]
            raise ConfigurationError(
                f"{owner}{text!r}: ${{{name}}} is the stage's output, {variables[name]}: write "
                f"${{{name}}} for it, or ${{{name}.directory}}{rest} for a file beside it"
            )
        return variables[name]

    return PLACEHOLDER.sub(value, text)
