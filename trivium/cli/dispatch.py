"""One function per command: load the configuration, run the command, print the result.

Modules that import torch are imported inside the functions, after the configuration is checked.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trivium import distributed
from trivium.commands import COMMANDS, Command
from trivium.config.base import Configuration, load_configuration
from trivium.errors import ConfigurationError, DataError, RewardError, escaped
from trivium.hf.checkpoint_files import check_checkpoint


def run_command(command: Command, parsed: argparse.Namespace) -> None:
    """Run a command that has a configuration file, and print its result.

    Of several processes the first checks the configuration, while the others wait to join it.
    """
    if command.trains and not distributed.is_first():
        distributed.join()
    settings = [*parsed.settings, *(parsed.flags if command.trains else [])]
    config = load_configuration(command.config_class(), parsed.config, settings)
    with quiet_libraries():
        result = command.run(config)
    if distributed.is_first():
        print_result(result)


def run_pipeline(command: Command, parsed: argparse.Namespace) -> None:
    """Run the stages of a recipe, or print its plan."""
    config: Any = load_configuration(command.config_class(), parsed.config, parsed.settings)
    from trivium.pipelines.run import checked_jobs, run

    if not parsed.dry_run:
        print_result(run(config, parsed.until))
        return
    checked_jobs(config, parsed.until)
    from trivium.pipelines.dry_run import plan  # imports torch, so only after the checks

    with quiet_libraries():
        print_result(plan(config, parsed.until))


def run_recipes(parsed: argparse.Namespace) -> None:
    """List the recipes, or print one."""
    from trivium.pipelines.recipes import list_recipes, read_recipe

    if parsed.name is not None:
        sys.stdout.write(read_recipe(parsed.name))
        return
    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, summary in recipes.items():
        print(f"{name:{width}}  {summary}")


def run_resume(parsed: argparse.Namespace) -> None:
    """Resume a run with its own configuration, in the directory where its command was started."""
    from trivium.runs.files import open_regular
    from trivium.runs.store import read_run

    path = parsed.run_directory.absolute()
    record = read_run(path)
    command = COMMANDS.get(record["kind"])
    if command is None or "from" not in record:
        raise ConfigurationError(
            f"{path}: this run of {record['kind']!r} cannot be resumed: another version of trivium "
            "wrote it; start it again with its own command"
        )
    parsed.config = path / "config.yaml"
    try:
        open_regular(parsed.config).close()
        if Path(record["from"]).is_dir():
            os.chdir(record["from"])
    except OSError as error:
        raise DataError(f"{error.filename}: the run cannot be resumed: {error.strerror}") from None
    directory = f"run.directory={json.dumps(str(path), ensure_ascii=False)}"
    parsed.settings = [directory, "run.resume=true", "run.overwrite=false", *parsed.settings]
    run_command(command, parsed)


def run_push(parsed: argparse.Namespace) -> None:
    """Upload the model of a finished run to the Hugging Face Hub."""
    from trivium.runs.hub import push_finished

    print(f"uploaded to {push_finished(parsed.run_directory, parsed.repository)}")


def run_memory(parsed: argparse.Namespace) -> None:
    """Predict the memory of a run, and find the micro-batches that fit."""
    from trivium.preflight import preflight

    config_class = COMMANDS[parsed.kind].config_class()
    config = load_configuration(config_class, parsed.config, parsed.settings)
    preflight(config)
    from trivium.commands import memory  # imports torch, so only after the checks

    with quiet_libraries():
        print_result(memory.run(parsed.kind, config))


def run_check_rewards(parsed: argparse.Namespace) -> None:
    """Check the rewards of a configuration on the first rows of its data."""
    from trivium.preflight import reward_faults

    config: Any = load_configuration(check_rewards_config_class(), parsed.config, parsed.settings)
    reward_faults(config)
    from trivium.commands import check_rewards

    with quiet_libraries():
        table, faults = check_rewards.run(config, parsed.rows)
    print_result(table)
    if faults:
        raise RewardError("\n  - ".join([f"found {len(faults)} faults:", *faults]))


def run_chat(parsed: argparse.Namespace) -> None:
    """Talk to the checkpoint at a path."""
    settings = [f"model.path={json.dumps(parsed.path, ensure_ascii=False)}", *parsed.settings]
    config: Any = load_configuration(chat_config_class(), None, settings)
    check_checkpoint(config.checkpoint().path)
    from trivium.commands.chat import chat  # imports torch, so only after the checks

    with quiet_libraries():
        chat(config)


def run_report(parsed: argparse.Namespace) -> None:
    """Write the report of a run, of a comparison, or of a pipeline."""
    from trivium.report import compare, pipeline
    from trivium.report.run import write

    directory, output = parsed.run_directory, parsed.output
    if (directory / compare.NUMBERS).is_file():
        print_result(compare.rewrite(directory, output, overwrite=parsed.overwrite))
    elif (directory / pipeline.NUMBERS).is_file():
        print_result(pipeline.write(directory, output, overwrite=parsed.overwrite))
    else:
        print_result(write(directory, output, overwrite=parsed.overwrite))


def run_watch(parsed: argparse.Namespace) -> None:
    """Serve the report of a run until Ctrl-C."""
    from trivium.report.watch import watch

    watch(parsed.run_directory, parsed.port)


def run_demo(parsed: argparse.Namespace) -> None:
    """Run the demo, which prints its own table."""
    from trivium.commands.output import require_directory
    from trivium.demo import run

    require_directory(parsed.directory, f"--directory {parsed.directory}")
    repeated = [seed for seed in parsed.seed if parsed.seed.count(seed) > 1]
    if repeated:
        raise ConfigurationError(f"--seed: {repeated[0]} is given twice: keep one")
    run(parsed.directory, quick=parsed.quick, seeds=tuple(parsed.seed))


def check_rewards_config_class() -> type[Configuration]:
    """Return the configuration class of `check-rewards`."""
    from trivium.commands.check_rewards_config import CheckRewardsConfig

    return CheckRewardsConfig


def chat_config_class() -> type[Configuration]:
    """Return the configuration class of `chat`."""
    from trivium.commands.chat_config import ChatConfig

    return ChatConfig


def print_result(result: Any) -> None:
    """Print the path that a command wrote to, or the table that it returned."""
    from rich.console import Console

    if isinstance(result, Path):
        print(f"written to {escaped(str(result))}")
    else:
        Console().print(result)


def _is_wanted(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed)" not in record.getMessage()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence a transformers notice about image processors. Other warnings are shown.

    Messages about reading and writing weights are handled in ``hf.loading``.
    """
    notices = logging.getLogger("transformers.utils.import_utils")
    notices.addFilter(_is_wanted)
    try:
        yield
    finally:
        notices.removeFilter(_is_wanted)
