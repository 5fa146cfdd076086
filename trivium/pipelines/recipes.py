"""Recipes that come with Trivium."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from trivium.errors import ConfigurationError

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


def _name(path: Path) -> str:
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def _summary(text: str) -> str:
    """Return the first line of the comment at the beginning of a recipe."""
    return text.partition("\n")[0].removeprefix("#").strip()
