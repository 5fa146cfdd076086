"""Command line entry point: run a command, and report a mistake.

A user's mistake is one message on stderr and exit status 2. An interruption by a signal exits with
128 plus the signal's number. Any other error keeps its traceback. The command line does not import
torch: help texts and errors in a configuration appear at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper

from trivium import distributed
from trivium.cli.parser import check_command_name, flags_last, make_parser
from trivium.errors import ConfigurationError, TriviumError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with log_to_stderr():
            check_command_name(arguments)
            parsed = make_parser().parse_args(flags_last(arguments))
            require_one_process(parsed)
            parsed.run(parsed)
            sys.stdout.flush()
    except TriviumError as error:
        print_final_message("error: ", str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        print_final_message("", str(interrupt) or "interrupted")
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except BrokenPipeError:
        # The reader closed the pipe. Redirect stdout, so that Python's exit does not write to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        distributed.final_message(f"{type(error).__name__}: {error}")
        raise
    return 0


def require_one_process(parsed: argparse.Namespace) -> None:
    """Raise ConfigurationError if a launcher started several processes of a command that is one."""
    processes = distributed.launched()[1]
    if processes > 1 and not getattr(parsed, "several_processes", False):
        raise ConfigurationError(
            f"{processes} processes of this command were started, and it is one process: start it "
            "without torchrun. Only sft, reward-model, ppo, dpo, grpo and resume divide their work"
        )


def print_final_message(label: str, message: str) -> None:
    """Print the message that ends the command; of several processes one prints it."""
    text = distributed.final_message(message)
    if text is not None:
        print_message(label, text, "bold red")


def print_message(label: str, message: str, style: str) -> None:
    """Print a message to stderr, in color on a terminal, with control characters escaped."""
    from rich.console import Console
    from rich.text import Text

    from trivium.monitoring.progress import printable

    text = "\n".join(printable(line) for line in message.splitlines())
    Console(stderr=True).print(Text(label, style) + Text(text, ""), soft_wrap=True)


class StderrHandler(logging.Handler):
    """Log handler that prints messages to stderr, with a label for warnings and errors."""

    def emit(self, record: logging.LogRecord) -> None:
        if not distributed.is_first():
            return  # The first of several processes reports what all of them do.
        labels = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "bold red")}
        label, style = labels.get(record.levelno, ("", ""))
        print_message(label, record.getMessage(), style)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Print Trivium's own log messages, from INFO on, to stderr."""
    logger, handler = logging.getLogger("trivium"), StderrHandler()
    previous_level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(previous_level)
        logger.removeHandler(handler)
