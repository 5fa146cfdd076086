"""What Trivium raises when a user's input, or the world, is wrong.

Each error also inherits the standard type a caller would expect to catch. A message states the
value, where it came from, why it is wrong and what to write instead; the command line prints it
without a traceback.
"""


class TriviumError(Exception):
    """Base of every error that is addressed to the user."""


class ConfigurationError(TriviumError, ValueError):
    """A configuration file, override or argument is wrong."""


class DataError(TriviumError, ValueError):
    """A data file is missing, malformed or unfit for its use."""


class ModelError(TriviumError, ValueError):
    """A checkpoint or tokenizer cannot be loaded or does not fit the others."""


class RewardError(TriviumError, RuntimeError):
    """A reward raised, ran past its limit or returned something that is not a reward."""


class TrainingError(TriviumError, RuntimeError):
    """A run cannot go on: a loss or gradient is not finite, or a batch holds nothing to learn."""


class CheckpointError(TriviumError, ValueError):
    """A checkpoint is torn or altered, or is not one of the run's own."""
