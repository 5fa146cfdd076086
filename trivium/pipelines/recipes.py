"""Recipes that come with Trivium."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import yaml

from trivium.config.yaml_source import YamlSource
from trivium.errors import ConfigurationError

_MARK = re.compile(r"# (paper|scaled|ours)(: .+)?$")
RECIPES = Path(str(files("trivium"))) / "recipes"


def list_recipes() -> dict[str, str]:
    """Return the first line of every recipe, by the recipe's name; pipelines come first."""
    paths = sorted(RECIPES.rglob("*.yaml"), key=lambda path: (len(path.parts), path))
    return {_name(path): _summary(path.read_text(encoding="utf-8")) for path in paths}


def read_recipe(name: str) -> str:
    """Return the text of a recipe.

    Raises:
        ConfigurationError: there is no recipe of this name.
    """
    return _path(name).read_text(encoding="utf-8")


def recipe_path(name: str) -> Path:
    """Return the path of a recipe, or ``name`` itself if it is the path of a YAML file.

    Raises:
        ConfigurationError: there is no such recipe.
    """
    return Path(name) if name.endswith((".yaml", ".yml")) else _path(name)


def _path(name: str) -> Path:
    names = [*list_recipes()]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the recipes are {', '.join(names)}"
        raise ConfigurationError(f"{name}: there is no such recipe: {hint}")
    return RECIPES / f"{name}.yaml"


@dataclass(frozen=True)
class Figure:
    """One setting of a recipe with its mark.

    Attributes:
        kind: ``paper``: the paper's figure; ``scaled``: smaller than the paper's; ``ours``: not in
            the paper.
        name: dotted name of the setting.
        value: its value here.
        note: what follows the mark: the paper's figure of a scaled setting, or a remark.
    """

    kind: str
    name: str
    value: Any
    note: str


def figures(path: Path) -> list[Figure]:
    """Return the marked settings of a recipe, in order.

    Raises:
        ValueError: a mark is on a line without a setting of its own.
    """
    text, values = path.read_text(encoding="utf-8"), YamlSource(path).values
    marks = {n: m for n, line in enumerate(text.splitlines()) if (m := _MARK.search(line))}
    found = []
    for line, name in _settings(yaml.compose(text), ""):
        if line in marks:
            mark, value = marks.pop(line), cast(Any, values)
            for key in name.split("."):
                value = value[int(key) if isinstance(value, list) else key]
            found.append(Figure(mark[1], name, value, (mark[2] or "").removeprefix(": ")))
    if marks:
        lines = ", ".join(str(n + 1) for n in marks)
        raise ValueError(f"{path}: marks on lines without a setting of their own: {lines}")
    return found


def _settings(node: yaml.Node, name: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of every setting below a node."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield item.start_mark.line, f"{name}.{index}"
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        dotted = f"{name}.{key.value}" if name else key.value
        yield key.start_mark.line, dotted
        if value.start_mark.line != key.start_mark.line:
            yield from _settings(value, dotted)


def _name(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def _summary(text: str) -> str:
    """Return the first line of the comment at the beginning of a recipe."""
    return text.partition("\n")[0].removeprefix("#").strip()
