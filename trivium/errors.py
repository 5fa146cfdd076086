"""Errors that Trivium raises for a user's mistakes and for failures of the environment.

Each error also inherits the standard type that a caller would expect to catch. A message states
the value, where it came from, why it is wrong and what to write instead. The command line prints
the message without a traceback. A message may quote untrusted text, so control characters are
escaped before they reach a log or a terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class TriviumError(Exception):
    """Base of all errors with a message for the user."""

    def __init__(self, message: str = "") -> None:
        super().__init__(escaped(message))


class ConfigurationError(TriviumError, ValueError):
    """A configuration file, override or argument is wrong."""


class DataError(TriviumError, ValueError):
    """A data file is missing, malformed or unsuitable for its use."""


class ModelError(TriviumError, ValueError):
    """A checkpoint or tokenizer cannot be loaded, or does not match the other models."""


class RewardError(TriviumError, RuntimeError):
    """A reward function raised, timed out or returned an invalid reward."""


class TrainingError(TriviumError, RuntimeError):
    """A run cannot continue: it is out of memory, or a batch has no training signal."""


class NonFiniteError(TrainingError):
    """A loss or gradient is not finite. The optimizer step was not applied.

    Attributes:
        report: the batch and its tensors (``runs.nonfinite.NonFiniteReport``).
        saved: the directory that ``runs.nonfinite`` wrote the batch to, which the message names;
            None before that.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report
        self.saved: Path | None = None

    def __str__(self) -> str:
        place = "" if self.saved is None else f". The batch is in {self.saved}"
        return super().__str__() + place


class CheckpointError(TriviumError, ValueError):
    """A checkpoint is incomplete or altered, or belongs to another run."""


def escaped(text: str) -> str:
    """Return text with every unprintable character escaped except line breaks."""
    return "".join(c if c == "\n" or c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return text with line breaks escaped too, so that one fault cannot look like two."""
    return escaped(text).replace("\n", "\\n")
