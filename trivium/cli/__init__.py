"""Command line entry point: run a command, and report a mistake.

A user's mistake is one message on stderr and exit status 2. An interruption by a signal exits with
128 plus the signal's number. Any other error keeps its traceback. The command line does not import
torch: help texts and errors in a configuration appear at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper

from trivium.cli.parser import check_command_name, flags_last, make_parser
from trivium.errors import TriviumError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with log_to_stderr():
            check_command_name(arguments)
            parsed = make_parser().parse_args(flags_last(arguments))
            parsed.run(parsed)
            sys.stdout.flush()
    except TriviumError as error:
        print_message("error: ", str(error), "bold red")
        return 2
    except KeyboardInterrupt as interrupt:
        print_message("", str(interrupt) or "interrupted", "bold red")
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except BrokenPipeError:
        # The reader closed the pipe. Redirect stdout, so that Python's exit does not write to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


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
