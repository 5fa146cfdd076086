"""Checks of a reward function without running its code.

Importing a user's file can run any code and take seconds. Here the file is only parsed: does it
exist, is it valid Python, and does it define the function? For built-in rewards, the arguments and
columns are checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trivium.config.functions import file_faults, find_file, load_function
from trivium.errors import ConfigurationError
from trivium.rewards.functions import match_columns
from trivium.rewards.reward import REWARD, function_faults
from trivium.rewards.reward_config import LEARNED, RewardConfig


def source_faults(config: RewardConfig) -> Iterator[str]:
    """Yield the errors of the reward's function that parsing shows."""
    file_name, separator, name = config.function.rpartition(":")
    if config.function in LEARNED:
        return
    try:
        if not separator:
            function = load_function(config.function, [], REWARD)
            yield from function_faults(config, function)
        elif file_name.endswith(".py") and name:
            yield from file_faults(
                find_file(file_name, config.directories), file_name, name, REWARD
            )
        elif not file_name or not name:
            load_function(config.function, [], REWARD)
    except ConfigurationError as error:
        yield str(error)


def column_faults(config: RewardConfig, columns: Collection[str]) -> list[str]:
    """Return which columns a reward needs, as far as is known, and the data does not have."""
    faults = config.missing_columns(columns)
    if config.function not in REWARD.built_in:
        return faults
    function = REWARD.built_in[config.function]
    return faults + match_columns(function, config.arguments, config.columns, columns)[1]
