"""What can be said of a reward before its code runs.

A user's file may import anything and take seconds, so it is only read here: is it there, is it
Python, does it define the function? Built-in rewards are held to their arguments and columns.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

from trivium.errors import ConfigurationError
from trivium.rewards.functions import find_file, fit, load_function, nearest
from trivium.rewards.reward import BUILT_IN, function_faults
from trivium.rewards.reward_config import LEARNED, RewardConfig


def source_faults(config: RewardConfig) -> Iterator[str]:
    """Yield what is wrong with the reward's function as far as reading shows it."""
    place, colon, name = config.function.rpartition(":")
    if config.function in LEARNED:
        return
    try:
        if not colon:
            function = load_function(config.function, [], BUILT_IN)
            yield from function_faults(config, function)
        elif place.endswith(".py") and name:
            yield from _file_faults(find_file(place, config.directories), place, name)
        elif not place or not name:
            load_function(config.function, [], BUILT_IN)
    except ConfigurationError as error:
        yield str(error)


def column_faults(config: RewardConfig, columns: Collection[str]) -> list[str]:
    """Return which columns a built-in reward needs and the data does not have."""
    if config.function not in BUILT_IN:
        return []
    return fit(BUILT_IN[config.function], config.arguments, config.columns, columns)[1]


def _file_faults(path: Path, place: str, name: str) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except SyntaxError as error:
        yield f"{path}:{error.lineno}: not valid Python: {error.msg}; correct the file"
        return
    except (OSError, ValueError, RecursionError) as error:
        yield f"{path}: cannot be read as Python: {error}; correct the file"
        return
    defined = {*_names(tree)}
    if name not in defined and not defined & {"*", "__getattr__", "globals", "exec"}:
        yield (
            f"{place!r} defines no {name!r}{nearest(name, defined)}: name a function "
            "'def reward(prompts, responses, **columns)' that stands in it"
        )


def _names(tree: ast.AST) -> Iterator[str]:
    """Yield every name that is bound, imported or mentioned anywhere in the file."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Name(id=name):
                yield name
            case ast.alias(name=name, asname=alias):
                yield (alias or name).split(".")[0]
