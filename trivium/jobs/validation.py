"""Validation of the settings of all jobs, before any job runs."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from trivium.commands import COMMANDS
from trivium.config.base import Configuration, validation_messages
from trivium.errors import ConfigurationError, one_line
from trivium.jobs.job import Job


def validate_jobs(jobs: Mapping[str, Job]) -> list[Configuration]:
    """Validate the settings of all jobs before any job runs.

    Raises:
        ConfigurationError: names the errors of all jobs.
    """
    errors, configs = [], []
    for name, job in jobs.items():
        config_class = COMMANDS[job.command].config_class()
        try:
            configs.append(config_class.model_validate(job.settings))
        except ValidationError as error:
            messages = validation_messages(
                error, config_class, job.settings, lambda _, name=name: name
            )
            errors += map(one_line, messages)
    if len(errors) == 1:
        raise ConfigurationError(errors[0])
    if errors:
        raise ConfigurationError("\n  - ".join([f"found {len(errors)} errors:", *errors]))
    return configs
