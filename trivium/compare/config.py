"""What is compared: one base, one set of prompts, one measure of quality, and several methods.

A method is a chain of ordinary commands. What they share (model, prompts, rewards, sampling,
evaluation, seed, budget) is said once and filled in; what a stage sets itself holds. In any text,
``${seed}`` is the seed and ``${name}`` the directory of the method's stage of that name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from trivium.config.base import Configuration, Conflict
from trivium.config.functions import anchored
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.models.model_config import ModelConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling
from trivium.runs.budget import CURRENCIES

StageCommand = Literal["sft", "reward-model", "ppo", "dpo", "grpo", "sample", "pairs"]
Currency = Literal["seconds", "generated_tokens", "trained_tokens", "flops"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
POLICY_COMMANDS = ("sft", "ppo", "dpo", "grpo")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SHARES = 1 + 1e-9


def slug(text: str) -> str:
    """A method's name as that of a directory."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


class StageConfig(Configuration):
    """One command of a method."""

    command: StageCommand
    """An ordinary command of Trivium."""
    name: str = ""
    """What other stages call it, as in ${name}; the command's name by default."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The command's own configuration, where it differs from what the comparison fills in."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the method's budget; by default the rest is shared evenly, and the last stage gets
    what is left."""

    _directory: Path | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        self._directory = (context or {}).get("directory")

    def anchored_settings(self) -> dict[str, Any]:
        """The settings, with reward files that lie beside the configuration named in full."""
        return _anchored(self.settings, self._directory)

    @property
    def label(self) -> str:
        return self.name or self.command


def _anchored(value: Any, directory: Path | None) -> Any:
    if isinstance(value, dict):
        return {
            key: anchored(item, directory)
            if key == "function" and isinstance(item, str)
            else _anchored(item, directory)
            for key, item in value.items()
        }
    return [_anchored(item, directory) for item in value] if isinstance(value, list) else value


class MethodConfig(Configuration):
    """One way from the base to an aligned model."""

    name: str = Field(min_length=1)
    """What the table calls it."""
    stages: tuple[StageConfig, ...] = ()
    """Its commands, in order; the last one ends in the policy that is compared."""
    best_of: int | None = Field(default=None, ge=2)
    """Instead of stages: draw so many responses from the base and keep the one with the highest
    training reward (no training; the cost falls on every use)."""
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    """One setting of the last stage and its values, as in beta: [0.01, 0.1]; each is run with the
    first seed and drawn in the reward-KL frontier."""

    def conflicts(self) -> Iterator[Conflict]:
        if bool(self.stages) == (self.best_of is not None):
            yield "", f"method {self.name}: give either stages or best_of"
        if self.best_of is not None and self.vary:
            yield "vary", f"method {self.name}: it changes a setting of a stage; there is none"
        if len(self.vary) > 1 or any(not values for values in self.vary.values()):
            yield "vary", f"method {self.name}: it takes one setting with at least one value"
        if self.stages:
            yield from self._wrong_stages()

    def _wrong_stages(self) -> Iterator[Conflict]:
        if self.stages[-1].command not in POLICY_COMMANDS:
            yield (
                "stages",
                f"method {self.name} ends in {self.stages[-1].command}, which trains no policy: end "
                f"it in one of {', '.join(POLICY_COMMANDS)}",
            )
        labels = [stage.label for stage in self.stages]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            yield "stages", f"method {self.name} has two stages called {twice}: name them apart"
        unfit = next((label for label in labels if not _NAME.fullmatch(label)), None)
        if unfit is not None:
            yield (
                "stages",
                f"method {self.name}: the stage name {unfit!r} becomes a directory; use letters, "
                "digits, points, dashes and underscores",
            )
        if sum(stage.share or 0.0 for stage in self.stages[:-1]) >= _SHARES:
            yield "stages", f"method {self.name}: the shares add up to 1, leaving the last nothing"


class BudgetOfMethods(Configuration):
    """What every method may spend in all, for equal footing."""

    currency: Currency
    """seconds (wall-clock), generated_tokens, trained_tokens or flops."""
    amount: float = Field(gt=0)
    """How much of it."""


class CompareConfig(Configuration):
    """Everything a comparison depends on."""

    model: ModelConfig
    """The base: where every method starts, and what KL and win rates are measured from."""
    data: PromptsConfig
    """Prompts to sample from while training."""
    rewards: RewardConfigs = Field(min_length=1)
    """What is rewarded in training."""
    evaluation: EvaluationConfig
    """Held-out prompts, and what quality is (the training rewards by default)."""
    sampling: Sampling = Sampling()
    """How responses are drawn while training."""
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    """What is compared."""
    budget: BudgetOfMethods | None = None
    """The same for each method; without one, each takes the steps that its stages say."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """Every method is run with each of them."""
    parallel: int = Field(default=0, ge=0)
    """Methods side by side; 0: as many as there are cores."""
    credit: int = Field(default=0, ge=0)
    """Measure every method's gradient at the base on so many independent batches; 0: leave out."""
    memory: bool = False
    """Predict every stage's memory, and measure it in one step of each."""
    risk: bool = False
    """Measure preference coverage, and reward models' accuracy on the policy's own responses."""
    directory: Path = Path("runs/compare")
    """Where everything is written; a comparison that was stopped goes on there."""
    title: str = "Comparison"
    """The report's title."""

    def conflicts(self) -> Iterator[Conflict]:
        names = [method.name for method in self.methods]
        twice = next((name for name in names if names.count(name) > 1), None)
        slugs = [slug(name) for name in names]
        if twice is not None:
            yield "methods", f"two methods are called {twice}: name them apart"
        elif "" in slugs or len(set(slugs)) < len(slugs):
            yield (
                "methods",
                f"the methods' names {names} become directories {slugs}: give each letters or digits "
                "of its own",
            )
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds", "one is there twice: keep one"
        if self.credit == 1:
            yield "credit", "noise shows between at least two batches: write 2 or more, or 0"


assert set(CURRENCIES) == set(Currency.__args__)
