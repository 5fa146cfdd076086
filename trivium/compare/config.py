"""Configuration of a comparison: one base model, one set of prompts, and several methods.

A method is a sequence of ordinary commands. Shared settings (model, prompts, rewards, sampling,
evaluation, seed, budget) are written once and filled in for every stage; a stage's own settings
override them. In any string, ``${seed}`` is the seed, ``${task}`` is the directory of the built-in
task, ``${name}`` is the output of the method's stage with that name, and ``${name.directory}`` is
its directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from trivium.config.base import Configuration, Conflict
from trivium.data.prompts import PromptsConfig
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.hf.model_config import ModelConfig
from trivium.jobs.budget import MethodBudget
from trivium.jobs.job import anchor_functions
from trivium.pipelines.config import RESERVED, SEED, TASK
from trivium.pipelines.task import TASK_DIRECTORY, TaskConfig
from trivium.rewards.reward_config import RewardConfigs
from trivium.rollout.sampling import Sampling

StageCommand = Literal["sft", "reward-model", "ppo", "dpo", "grpo", "sample", "pairs"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
POLICY_COMMANDS = ("sft", "ppo", "dpo", "grpo")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MAX_SHARES = 1 + 1e-9


def slug(text: str) -> str:
    """Return a method's name in a form that can be a directory name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


class StageConfig(Configuration):
    """One command of a method."""

    command: StageCommand
    """Name of a Trivium command."""
    name: str = ""
    """Name for references from other stages, as in ${name}; the command's name by default."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The command's own settings, which override those that the comparison fills in."""
    share: float | None = Field(default=None, gt=0, lt=1)
    """Share of the method's budget. Stages without a share divide the rest evenly, and the last
    stage gets the budget that is left."""

    _directory: Path | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        self._directory = (context or {}).get("directory")

    def anchored_settings(self) -> dict[str, Any]:
        """Return the settings with reward files given relative to the configuration's directory."""
        return anchor_functions(self.settings, self._directory)

    @property
    def label(self) -> str:
        return self.name or self.command


class MethodConfig(Configuration):
    """One method: training commands that start from the base, a recipe of them, or best-of-n
    sampling."""

    name: str = Field(min_length=1)
    """Name of the method in the report."""
    stages: tuple[StageConfig, ...] = ()
    """Commands of the method, in order; the last one trains the policy that is compared."""
    recipe: str | None = None
    """A pipeline instead of stages: the name of a recipe that comes with Trivium (`trivium
    recipes`), or the path of a pipeline's file. Its model, data, rewards, sampling, evaluation and
    seed are the comparison's; settings of its stages stay."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Changes of the recipe by dotted name, as in stages.grpo.beta: 0.0."""
    best_of: int | None = Field(default=None, ge=2)
    """Number of responses of best-of-n sampling, instead of stages: sample n responses from the
    base and keep the one with the highest training reward (no training; every prompt costs n
    responses)."""
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    """One setting of the last stage and its values, as in beta: [0.01, 0.1]. Each value is run with
    the first seed and shown in the reward-KL frontier."""

    def conflicts(self) -> Iterator[Conflict]:
        given = (bool(self.stages), self.recipe is not None, self.best_of is not None)
        if sum(given) != 1:
            yield "", f"method {self.name}: give one of stages, recipe or best_of"
        if self.changes and self.recipe is None:
            yield (
                "changes",
                f"method {self.name}: changes are those of a recipe: write them in the settings "
                "of a stage",
            )
        if self.best_of is not None and self.vary:
            yield (
                "vary",
                f"method {self.name}: vary changes a setting of a stage, and best_of has none",
            )
        if len(self.vary) > 1 or any(not values for values in self.vary.values()):
            yield "vary", f"method {self.name}: vary takes one setting with at least one value"
        if self.stages:
            yield from self._stage_conflicts()

    def _stage_conflicts(self) -> Iterator[Conflict]:
        if self.stages[-1].command not in POLICY_COMMANDS:
            yield (
                "stages",
                f"method {self.name}: the last stage, {self.stages[-1].command}, trains no policy: "
                f"end the method with one of {', '.join(POLICY_COMMANDS)}",
            )
        labels = [stage.label for stage in self.stages]
        duplicate = next((label for label in labels if labels.count(label) > 1), None)
        if duplicate is not None:
            yield (
                "stages",
                f"method {self.name}: two stages are called {duplicate}: give one another name",
            )
        reserved = next((label for label in labels if label in RESERVED), None)
        if reserved is not None:
            yield (
                "stages",
                f"method {self.name}: the stage name {reserved!r} is the name of something else, "
                f"${{{reserved}}}: give the stage another name",
            )
        invalid = next((label for label in labels if not _NAME.fullmatch(label)), None)
        if invalid is not None:
            yield (
                "stages",
                f"method {self.name}: the stage name {invalid!r} cannot be a directory name: use "
                "letters, digits, dots, dashes and underscores",
            )
        if sum(stage.share or 0.0 for stage in self.stages[:-1]) >= _MAX_SHARES:
            yield "stages", f"method {self.name}: the shares leave no budget for the last stage"


class CompareConfig(Configuration):
    """Configuration of a comparison."""

    is_template: ClassVar[bool] = True
    """Paths may contain ``${seed}`` and ``${task}``."""

    model: ModelConfig
    """Base model: the start of every method, and the reference of KL and win rates."""
    data: PromptsConfig
    """Prompts for sampling during training."""
    rewards: RewardConfigs = Field(min_length=1)
    """Training rewards."""
    evaluation: EvaluationConfig
    """Held-out prompts, and the rewards that measure quality (the training rewards by default)."""
    sampling: Sampling = Sampling()
    """Sampling settings during training."""
    task: TaskConfig = TaskConfig()
    """Size of the built-in task, which is written with the first seed where something names
    ${task}: train.jsonl, test.jsonl and labels.jsonl, and an untrained model in base."""
    methods: tuple[MethodConfig, ...] = Field(min_length=1)
    """Methods to compare."""
    budget: MethodBudget | None = None
    """Budget of each method; by default each stage runs its own number of steps."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """Seeds with which every method is run."""
    parallel: int = Field(default=0, ge=0)
    """Number of jobs that run in parallel; 0: the number of cores."""
    credit: int = Field(default=0, ge=0)
    """Number of independent batches for the gradient signal-to-noise ratio of every method at the
    base; 0: do not measure it."""
    memory: bool = False
    """Predict the memory of every stage, and measure it in one step of each."""
    risk: bool = False
    """Measure preference coverage, and the accuracy of reward models on the policy's responses."""
    directory: Path = Path("runs/compare")
    """Output directory; rerun the command with the same directory to resume the comparison."""
    title: str = "Comparison"
    """Title of the report."""

    @property
    def task_directory(self) -> Path:
        """Directory of the built-in task, ``${task}``."""
        return self.directory / TASK_DIRECTORY

    def variables(self, seed: int) -> dict[str, str]:
        """Return the values of ``${seed}`` and ``${task}``."""
        return {SEED: str(seed), TASK: str(self.task_directory)}

    def conflicts(self) -> Iterator[Conflict]:
        names = [method.name for method in self.methods]
        duplicate = next((name for name in names if names.count(name) > 1), None)
        slugs = [slug(name) for name in names]
        if duplicate is not None:
            yield "methods", f"two methods are called {duplicate}: give one another name"
        elif "" in slugs or len(set(slugs)) < len(slugs):
            yield (
                "methods",
                f"the method names {names} become the directory names {slugs}, which are empty or "
                "equal: choose names that differ in letters or digits",
            )
        if len(set(self.seeds)) < len(self.seeds):
            yield "seeds", "a seed appears twice: remove one"
        if self.credit == 1:
            yield "credit", "1 batch shows no noise: write at least 2, or 0 to leave it out"
