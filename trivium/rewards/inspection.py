"""What can be said of a reward before its code runs.

A user's file may import anything and take seconds, so it is only read here: is it there, is it
Python, does it define the function? Built-in rewards are held to their arguments and columns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trivium.config.functions import file_faults, find_file, load_function
from trivium.errors import ConfigurationError
from trivium.rewards.functions import fit
from trivium.rewards.reward import REWARD, function_faults
from trivium.rewards.reward_config import LEARNED, RewardConfig


def source_faults(config: RewardConfig) -> Iterator[str]:
    """Yield what is wrong with the reward's function as far as reading shows it."""
    place, colon, name = config.function.rpartition(":")
    if config.function in LEARNED:
        return
    try:
        if not colon:
            function = load_function(config.function, [], REWARD)
            yield from function_faults(config, function)
        elif place.endswith(".py") and name:
            yield from file_faults(find_file(place, config.directories), place, name, REWARD)
        elif not place or not name:
            load_function(config.function, [], REWARD)
    except ConfigurationError as error:
        yield str(error)


def column_faults(config: RewardConfig, columns: Collection[str]) -> list[str]:
    """Return which columns a built-in reward needs and the data does not have."""
    if config.function not in REWARD.built_in:
        return []
    return fit(REWARD.built_in[config.function], config.arguments, config.columns, columns)[1]
