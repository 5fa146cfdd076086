"""What Trivium raises when a user's input, or the world, is wrong.

Each error also inherits the standard type a caller would expect to catch. A message states the
value, where it came from, why it is wrong and what to write instead; the command line prints it
without a traceback. What a message quotes was written by others: control characters in it are
escaped here, so that no log and no terminal obeys them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TriviumError(Exception):
    """Base of every error that is addressed to the user."""

    def __init__(self, message: str = "") -> None:
        super().__init__(escaped(message))


class ConfigurationError(TriviumError, ValueError):
    """A configuration file, override or argument is wrong."""


class DataError(TriviumError, ValueError):
    """A data file is missing, malformed or unfit for its use."""


class ModelError(TriviumError, ValueError):
    """A checkpoint or tokenizer cannot be loaded or does not fit the others."""


class RewardError(TriviumError, RuntimeError):
    """A reward raised, ran past its limit or returned something that is not a reward."""


class TrainingError(TriviumError, RuntimeError):
    """A run cannot go on: memory does not suffice, or a batch holds nothing to learn."""


class NonFiniteError(TrainingError):
    """A loss or gradient is not finite; nothing was moved.

    ``evidence`` (``runs.nonfinite.NonFiniteReport``) is the batch and what was seen of it; ``saved`` is where
    ``runs.nonfinite`` wrote it, which the message then names.
    """

    def __init__(self, message: str, evidence: Any) -> None:
        super().__init__(message)
        self.evidence = evidence
        self.saved: Path | None = None

    def __str__(self) -> str:
        place = "" if self.saved is None else f". The batch is in {self.saved}"
        return super().__str__() + place


class CheckpointError(TriviumError, ValueError):
    """A checkpoint is torn or altered, or is not one of the run's own."""


def escaped(text: str) -> str:
    """Return text whose characters, but for its line breaks, can all be shown."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return text in which line breaks are escaped too, so that one fault cannot look like two."""
    return escaped(text).replace("\n", "\\n")
