"""Configurations that the tests of configurations read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from trivium.config.base import Configuration, load_configuration
from trivium.errors import ConfigurationError


class Step(Configuration):
    """How far each update goes."""

    rate: float = Field(default=1e-3, gt=0, le=1)
    """Step size."""
    decay: float = 0.0
    kind: Literal["adam", "sgd"] = "adam"
    """Update rule."""


class Reward(Configuration):
    """One reward."""

    name: str
    """Where the reward's function is."""
    weight: float = 1.0


class Inner(Configuration):
    step: Step = Step(rate=0.5, decay=0.25)
    depth: int = 1


class Recipe(Configuration):
    step: Step = Step(rate=1e-5)
    inner: Inner = Inner(depth=7, step=Step(rate=0.125))
    rewards: list[Reward] = Field(default=[Reward(name="exact")], min_length=1)
    """What is rewarded."""
    steps: int = Field(default=10, gt=0)
    """How many steps."""
    limit: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    seed: int | None = Field(default=None, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    extra: dict[str, Any] = Field(default={})
    label: str = ""
    directory: Path | None = None
    fast: bool = False
    stop: tuple[str, ...] = ()
    weights: dict[str, float] = Field(default={})

    @model_validator(mode="after")
    def _short_enough(self) -> Recipe:
        if self.steps > 100 and self.fast:
            raise ValueError(f"steps is {self.steps}, too many for fast: lower it to 100")
        return self


class Needy(Configuration):
    rewards: list[Reward]
    """What is rewarded."""
    steps: int


def load_text(
    directory: Path, text: str, *arguments: str, cls: type[Configuration] = Recipe
) -> Any:
    """Load YAML text as a file named recipe.yaml, with arguments."""
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_configuration(cls, path, arguments)


def faults_of(
    directory: Path, text: str, *arguments: str, cls: type[Configuration] = Recipe
) -> list[str]:
    """Return the faults found in YAML text and arguments; the file goes by its bare name."""
    with pytest.raises(ConfigurationError) as caught:
        load_text(directory, text, *arguments, cls=cls)
    message = str(caught.value).replace(f"{directory}/", "")
    head, *rest = message.split("\n  - ")
    if rest:
        assert head == f"recipe.yaml: found {len(rest)} faults:"
    return rest or [head]
