"""Configuration classes for the tests of configurations, and helpers that load them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, model_validator

from trivium.config.base import Configuration, load_configuration
from trivium.errors import ConfigurationError


class Step(Configuration):
    """Size of each update."""

    rate: float = Field(default=1e-3, gt=0, le=1)
    """Step size."""
    decay: float = 0.0
    kind: Literal["adam", "sgd"] = "adam"
    """Update rule."""


class Reward(Configuration):
    """One reward."""

    name: str
    """Name of the reward's function."""
    weight: float = 1.0


class Inner(Configuration):
    step: Step = Step(rate=0.5, decay=0.25)
    depth: int = 1


class Recipe(Configuration):
    step: Step = Step(rate=1e-5)
    inner: Inner = Inner(depth=7, step=Step(rate=0.125))
    rewards: list[Reward] = Field(default=[Reward(name="exact")], min_length=1)
    """The rewards."""
    steps: int = Field(default=10, gt=0)
    """Number of steps."""
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
    def _limit_fast_steps(self) -> Recipe:
        if self.steps > 100 and self.fast:
            raise ValueError(f"steps is {self.steps}, too many for fast: lower it to 100")
        return self


class RequiredFields(Configuration):
    rewards: list[Reward]
    """The rewards."""
    steps: int


def load_text(
    directory: Path, text: str, *arguments: str, cls: type[Configuration] = Recipe
) -> Any:
    """Load YAML text from a file named recipe.yaml, with arguments."""
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_configuration(cls, path, arguments)


def faults_of(
    directory: Path, text: str, *arguments: str, cls: type[Configuration] = Recipe
) -> list[str]:
    """Return the faults in YAML text and arguments, with the file's directory left out."""
    with pytest.raises(ConfigurationError) as caught:
        load_text(directory, text, *arguments, cls=cls)
    message = str(caught.value).replace(f"{directory}/", "")
    head, *rest = message.split("\n  - ")
    if rest:
        assert head == f"recipe.yaml: found {len(rest)} faults:"
    return rest or [head]
