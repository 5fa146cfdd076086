"""Argument parser of the command line.

Each command's parser sets `run` to the function in ``commands.dispatch`` that takes the parsed
arguments. Neither module imports torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from trivium.cli.dispatch import (
    chat_config_class,
    check_rewards_config_class,
    run_chat,
    run_check_rewards,
    run_command,
    run_demo,
    run_memory,
    run_pipeline,
    run_push,
    run_recipes,
    run_report,
    run_resume,
    run_watch,
)
from trivium.commands import COMMANDS, Command
from trivium.commands.help_texts import (
    CHAT,
    CHECK_REWARDS,
    DEMO,
    DESCRIPTION,
    EXAMPLE,
    MEMORY,
    PUSH,
    RECIPES,
    REPORT,
    RESUME,
    WATCH,
)
from trivium.config.field_reference import describe
from trivium.errors import ConfigurationError

_OTHERS = (
    "recipes", "resume", "push", "memory", "check-rewards", "chat", "report", "watch", "demo"
)  # fmt: skip
_STYLE: dict[str, Any] = {
    "formatter_class": partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
    "allow_abbrev": False,
}


_FLAGS = ("--resume", "--allow-changes", "--push", "--dry-run", "--until")


class Parser(argparse.ArgumentParser):
    """Argument parser whose error for a setting with dashes shows the right form."""

    def error(self, message: str) -> NoReturn:
        dashed = [word for word in message.split() if word.startswith("--") and "=" in word]
        if dashed and "unrecognized" in message:
            message += f"; settings have no dashes: write {dashed[0].lstrip('-')}"
        super().error(message)


class FieldsAction(argparse.Action):
    """Print the reference of a command's settings and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        print(describe(self.const()))
        parser.exit()


class SettingAction(argparse.Action):
    """A flag that is short for a setting."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        namespace.flags = [*namespace.flags, self.const]


class ValueSettingAction(argparse.Action):
    """A flag with a value that is short for a setting, which `const` names."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        namespace.flags = [*namespace.flags, f"{self.const}={json.dumps(values)}"]


def check_command_name(arguments: Sequence[str]) -> None:
    """Raise ConfigurationError for an unknown command, with the most similar one."""
    names = [*COMMANDS, *_OTHERS]
    word = next(iter(arguments), "-")
    if word.startswith("-") or word in names:
        return
    near = difflib.get_close_matches(word, names, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"the commands are {', '.join(names)}"
    raise ConfigurationError(f"`{word}` is not a command: {hint}")


def flags_last(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with flags that stand for settings moved to the end.

    argparse does not accept a flag between two settings.
    """
    others: list[str] = []
    flags: list[str] = []
    words = iter(arguments)
    for word in words:
        (flags if word.partition("=")[0] in _FLAGS else others).append(word)
        if word in ("--push", "--until"):
            flags += islice(words, 1)
    return [*others, *flags]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands. It sets `run` to the command's function."""
    parser = Parser(prog="trivium", description=DESCRIPTION, **_STYLE)
    parser.add_argument("--version", action="version", version=f"trivium {installed_version()}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        _add_command(commands, name, command)

    def add(name: str, summary: str, description: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=description, **_STYLE)

    _add_recipes(add("recipes", "list the recipes, or print one", RECIPES))
    _add_resume(add("resume", "resume a run", RESUME))
    _add_push(add("push", "upload a run's model to the Hugging Face Hub", PUSH))
    _add_memory(add("memory", "predict the memory of a run, and what fits", MEMORY))
    _add_check_rewards(add("check-rewards", "check rewards on a few responses", CHECK_REWARDS))
    _add_chat(add("chat", "talk to a checkpoint", CHAT))
    _add_report(add("report", "write a run's report", REPORT))
    _add_watch(add("watch", "show a run's report live", WATCH))
    _add_demo(add("demo", "run every method on a small task", DEMO))
    return parser


def _add_command(commands: Any, name: str, command: Command) -> None:
    """Add the parser of a command with a configuration file."""
    yaml = "".join(f"  {line}\n" for line in command.example.splitlines())
    example = EXAMPLE.format(name=name, yaml=yaml, arguments=command.arguments)
    parser = commands.add_parser(
        name,
        help=command.help.replace("%", "%%"),
        description=command.help,
        epilog=example,
        **_STYLE,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="the configuration file")
    _add_settings(parser, command.config_class)
    if command.trains:
        _add_run_flags(parser)
        parser.add_argument(
            "--resume",
            action=SettingAction,
            const="run.resume=true",
            help="require a stopped run in run.directory, and resume it",
        )
    if name == "run":
        _add_pipeline_flags(parser)
    function = run_pipeline if name == "run" else run_command
    parser.set_defaults(run=partial(function, command))


def _add_pipeline_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--until", metavar="STAGE", help="run the stages up to this one")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the stages that would run, with predicted memory and FLOPs",
    )


def _add_recipes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="a recipe of the list")
    parser.set_defaults(run=run_recipes)


def _add_settings(parser: argparse.ArgumentParser, config_class: Callable[[], type]) -> None:
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings to override")
    parser.add_argument(
        "--fields", action=FieldsAction, nargs=0, const=config_class, help="list all settings"
    )


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(flags=[], several_processes=True)
    parser.add_argument(
        "--allow-changes",
        action=SettingAction,
        const="run.allow_changes=true",
        help="resume a run even if its configuration, data or code changed",
    )
    parser.add_argument(
        "--push",
        action=ValueSettingAction,
        const="run.push",
        metavar="OWNER/NAME",
        help="upload the model to this repository of the Hugging Face Hub at the end",
    )


def _add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings to change")
    _add_run_flags(parser)
    parser.set_defaults(run=run_resume)


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument("repository", metavar="OWNER/NAME", help="a repository on the Hub")
    parser.set_defaults(run=run_push)


def _add_memory(parser: argparse.ArgumentParser) -> None:
    training_commands = [name for name, command in COMMANDS.items() if command.trains]
    parser.add_argument(
        "kind", metavar="COMMAND", choices=training_commands, help=", ".join(training_commands)
    )
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="its configuration file")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings to override")
    parser.set_defaults(run=run_memory)


def _add_check_rewards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="the configuration file")
    parser.add_argument("--rows", type=row_count, default=50, help="rows to use (default: 50)")
    _add_settings(parser, check_rewards_config_class)
    parser.set_defaults(run=run_check_rewards)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", help="a checkpoint, a run's directory or a hub name"
    )
    _add_settings(parser, chat_config_class)
    parser.set_defaults(run=run_chat)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: RUN/report.html")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=run_report)


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument(
        "--port", type=port_number, default=0, help="0 to 65535; 0, the default, takes a free port"
    )
    parser.set_defaults(run=run_watch)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a short run, under two minutes")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/demo"), help="the output directory"
    )
    parser.add_argument(
        "--seed", type=seed_number, nargs="+", default=[0], help="one or more seeds"
    )
    parser.set_defaults(run=run_demo)


def port_number(text: str) -> int:
    """Parse a port between 0 and 65535."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: write a number from 0 to 65535")
    return int(text)


def row_count(text: str) -> int:
    """Parse a number of rows: a whole number from 1 to a million."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10**6):
        reason = f"{text!r} is not a number of rows: write a whole number from 1 to 1000000"
        raise argparse.ArgumentTypeError(reason)
    return int(text)


def seed_number(text: str) -> int:
    """Parse a seed: a whole number from 0 to 2**63 − 1."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed: write a whole number from 0 on")
    return int(text)


def installed_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("trivium")
    except PackageNotFoundError:
        return "(not installed)"
