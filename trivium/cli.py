"""The command line: which command, which configuration, and how a mistake is told.

A user's mistake is one message on stderr and exit status 2, an interruption by a signal 128 and its
number; whatever else goes wrong keeps its traceback. Nothing here imports torch: help, and a
mistake in a configuration, must not wait for it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from trivium.commands import COMMANDS, Command
from trivium.commands.help_texts import (
    CHAT,
    DEMO,
    DESCRIPTION,
    EXAMPLE,
    MEMORY,
    REPORT,
    RESUME,
    WATCH,
)
from trivium.config.base import Configuration, load_configuration
from trivium.config.field_reference import describe
from trivium.errors import ConfigurationError, TriviumError
from trivium.models.hf_checkpoint import check_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with told_messages():
            require_command(arguments)
            parsed = make_parser().parse_args(flags_last(arguments))
            parsed.run(parsed)
            sys.stdout.flush()
    except TriviumError as error:
        tell("error: ", str(error), "bold red")
        return 2
    except KeyboardInterrupt as stopped:
        tell("", str(stopped) or "interrupted", "bold red")
        return 128 + getattr(stopped, "signal", signal.SIGINT)
    except BrokenPipeError:
        # Whoever read the output has left; nothing may be written to it while Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


# --- What is said ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Tells what to write instead of a setting with dashes."""

    def error(self, message: str) -> NoReturn:
        dashed = [word for word in message.split() if word.startswith("--") and "=" in word]
        if dashed and "unrecognized" in message:
            message += f"; settings have no dashes: write {dashed[0].lstrip('-')}"
        super().error(message)


class Fields(argparse.Action):
    """Prints the reference of a command's settings and leaves."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        print(describe(self.const()))
        parser.exit()


class Setting(argparse.Action):
    """A flag that stands for a setting."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        namespace.flags = [*namespace.flags, self.const]


def require_command(arguments: Sequence[str]) -> None:
    """Refuse a word that is no command, with the nearest one."""
    names = [*COMMANDS, "resume", "memory", "chat", "report", "watch", "demo"]
    word = next(iter(arguments), "-")
    if word.startswith("-") or word in names:
        return
    near = difflib.get_close_matches(word, names, n=1)
    remedy = f"did you mean `{near[0]}`?" if near else f"the commands are {', '.join(names)}"
    raise ConfigurationError(f"`{word}` is not a command: {remedy}")


def flags_last(arguments: Sequence[str]) -> list[str]:
    """The arguments with flags that stand for settings moved behind the settings, between which
    argparse does not take them."""
    return sorted(arguments, key=("--resume", "--allow-changes").__contains__)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to what takes the parsed arguments."""
    style: dict[str, Any] = {
        "formatter_class": partial(argparse.RawDescriptionHelpFormatter, max_help_position=26),
        "allow_abbrev": False,
    }
    parser = Parser(prog="trivium", description=DESCRIPTION, **style)
    parser.add_argument("--version", action="version", version=f"trivium {installed_version()}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        yaml = "".join(f"  {line}\n" for line in command.example.splitlines())
        example = EXAMPLE.format(name=name, yaml=yaml, arguments=command.arguments)
        sub = commands.add_parser(
            name,
            help=command.help.replace("%", "%%"),
            description=command.help,
            epilog=example,
            **style,
        )
        sub.add_argument("config", metavar="CONFIG.yaml", type=Path, help="the configuration file")
        _add_settings(sub, lambda command=command: command.config_class())
        if command.trains:
            _add_resuming(sub)
            insist = "insist on going on with a run that was stopped in run.directory"
            sub.add_argument("--resume", action=Setting, const="run.resume=true", help=insist)
        sub.set_defaults(run=lambda parsed, command=command: run_command(command, parsed))
    resume = commands.add_parser("resume", help="go on with a run", description=RESUME, **style)
    resume.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    resume.add_argument("settings", metavar="key=value", nargs="*", help="settings to change")
    _add_resuming(resume)
    resume.set_defaults(run=run_resume)
    _add_memory(
        commands.add_parser(
            "memory", help="how much memory a run needs, and what fits", description=MEMORY, **style
        )
    )
    chat = commands.add_parser("chat", help="talk to a checkpoint", description=CHAT, **style)
    chat.add_argument("path", metavar="PATH", help="a checkpoint, a run's directory or a hub name")
    _add_settings(chat, _chat_config)
    chat.set_defaults(run=run_chat)
    _add_report(
        commands.add_parser("report", help="write a run's report", description=REPORT, **style)
    )
    _add_watch(
        commands.add_parser("watch", help="show a run while it goes on", description=WATCH, **style)
    )
    _add_demo(commands.add_parser("demo", help="watch every method", description=DEMO, **style))
    return parser


def _add_settings(parser: argparse.ArgumentParser, fields: Callable[[], type]) -> None:
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings to correct")
    parser.add_argument(
        "--fields", action=Fields, nargs=0, const=fields, help="show every setting and leave"
    )


def _add_resuming(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(flags=[])
    parser.add_argument(
        "--allow-changes",
        action=Setting,
        const="run.allow_changes=true",
        help="go on with a run even where its configuration, data or code changed",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    trained = [name for name, command in COMMANDS.items() if command.trains]
    parser.add_argument("kind", metavar="COMMAND", choices=trained, help=", ".join(trained))
    parser.add_argument("config", metavar="CONFIG.yaml", type=Path, help="its configuration file")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings to correct")
    parser.set_defaults(run=run_memory)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument("--output", metavar="FILE", type=Path, help="by default RUN/report.html")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(run=run_report)


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory", metavar="RUN", type=Path, help="a run's directory")
    parser.add_argument(
        "--port", type=port_number, default=0, help="0 to 65535; 0, the default, takes a free one"
    )
    parser.set_defaults(run=run_watch)


def port_number(text: str) -> int:
    """A port between 0 and 65535."""
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: write a number from 0 to 65535")
    return int(text)


def seed_number(text: str) -> int:
    """A seed: a whole number from 0 on."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: write a whole number from 0 on")
    return int(text)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the same story in under two minutes")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/demo"), help="where it is written"
    )
    parser.add_argument(
        "--seed", type=seed_number, nargs="+", default=[0], help="one or several seeds"
    )
    parser.set_defaults(run=run_demo)


def installed_version() -> str:
    """Trivium's version, as its installation knows it."""
    try:
        return version("trivium")
    except PackageNotFoundError:
        return "(not installed)"


# --- What is run ----------------------------------------------------------------------------------


def run_command(command: Command, parsed: argparse.Namespace) -> None:
    """Run a command that has a configuration file, and print what came of it."""
    settings = [*parsed.settings, *(parsed.flags if command.trains else [])]
    config = load_configuration(command.config_class(), parsed.config, settings)
    with quiet_libraries():
        outcome = command.run(config)
    show(outcome)


def run_resume(parsed: argparse.Namespace) -> None:
    """Go on with a run by its own configuration, from where its command was given."""
    from trivium.runs.store import read_run

    path = parsed.run_directory.absolute()
    record = read_run(path)
    command = COMMANDS.get(record["kind"])
    if command is None or "from" not in record:
        raise ConfigurationError(
            f"{path}: is a run of {record['kind']!r} that cannot go on: it was begun by another "
            "version of trivium; begin it anew by its own command"
        )
    if Path(record["from"]).is_dir():
        os.chdir(record["from"])
    parsed.config = path / "config.yaml"
    where = f"run.directory={json.dumps(str(path), ensure_ascii=False)}"
    parsed.settings = [where, "run.resume=true", "run.overwrite=false", *parsed.settings]
    run_command(command, parsed)


def run_memory(parsed: argparse.Namespace) -> None:
    """Say what a run would need, and which micro-batches fit."""
    from trivium.preflight import preflight

    config_class = COMMANDS[parsed.kind].config_class()
    config = load_configuration(config_class, parsed.config, parsed.settings)
    preflight(config)
    # This imports torch, which a mistake in what was asked for must not wait for.
    from trivium.commands import memory

    with quiet_libraries():
        show(memory.run(parsed.kind, config))


def run_chat(parsed: argparse.Namespace) -> None:
    """Talk to the checkpoint at a path."""
    from trivium.commands.chat_config import ChatConfig

    settings = [f"model.path={json.dumps(parsed.path, ensure_ascii=False)}", *parsed.settings]
    config = load_configuration(ChatConfig, None, settings)
    check_checkpoint(config.checkpoint().path)
    # This imports torch, which a mistake in what was asked for must not wait for.
    from trivium.commands.chat import chat

    with quiet_libraries():
        chat(config)


def run_report(parsed: argparse.Namespace) -> None:
    """Write the report of a run, or of a comparison."""
    from trivium.report import compare
    from trivium.report.run import write

    directory, output = parsed.run_directory, parsed.output
    if (directory / compare.NUMBERS).is_file():
        show(compare.rewrite(directory, output, overwrite=parsed.overwrite))
    else:
        show(write(directory, output, overwrite=parsed.overwrite))


def run_watch(parsed: argparse.Namespace) -> None:
    """Serve the report of a run until Ctrl-C."""
    from trivium.report.watch import watch

    watch(parsed.run_directory, parsed.port)


def run_demo(parsed: argparse.Namespace) -> None:
    """Run the demo, which prints its own table."""
    from trivium.commands.output import require_directory
    from trivium.demo import run

    require_directory(parsed.directory, f"--directory {parsed.directory}")
    twice = [seed for seed in parsed.seed if parsed.seed.count(seed) > 1]
    if twice:
        raise ConfigurationError(f"--seed: {twice[0]} is there twice: keep one")
    run(parsed.directory, quick=parsed.quick, seeds=tuple(parsed.seed))


def _chat_config() -> type[Configuration]:
    from trivium.commands.chat_config import ChatConfig

    return ChatConfig


def show(outcome: Any) -> None:
    """Print where a command wrote to, or the table that it measured."""
    from rich.console import Console

    if isinstance(outcome, Path):
        print(f"written to {outcome}")
    else:
        Console().print(outcome)


# --- How it looks ---------------------------------------------------------------------------------


def tell(label: str, message: str, style: str) -> None:
    """Write a message to stderr: in color on a terminal, never with codes that are not ours."""
    from rich.console import Console
    from rich.text import Text

    from trivium.monitoring.progress import printable

    text = "\n".join(printable(line) for line in message.splitlines())
    Console(stderr=True).print(Text(label, style) + Text(text, ""), soft_wrap=True)


class Messages(logging.Handler):
    """Shows what happened, and how grave it is where it is grave."""

    def emit(self, record: logging.LogRecord) -> None:
        labels = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "bold red")}
        label, style = labels.get(record.levelno, ("", ""))
        tell(label, record.getMessage(), style)


@contextmanager
def told_messages() -> Iterator[None]:
    """Show Trivium's own messages, from INFO on, on stderr."""
    logger, handler = logging.getLogger("trivium"), Messages()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def _not_noise(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed)" not in record.getMessage()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence a notice that images would be read in another way; other warnings are shown.

    What reading and writing weights would say is `models.loading`'s business.
    """
    notices = logging.getLogger("transformers.utils.import_utils")
    notices.addFilter(_not_noise)
    try:
        yield
    finally:
        notices.removeFilter(_not_noise)
