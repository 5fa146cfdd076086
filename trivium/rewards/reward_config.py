"""Configuration of a reward: function, arguments and weight.

``functions`` and ``component`` load and call the function, and ``learned`` computes learned
rewards. Nothing here runs a user's code.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_serializer

from trivium.config.base import Configuration, Conflict
from trivium.config.functions import anchored, nearest
from trivium.config.paths import looked_up
from trivium.config.secrets import secrets_in
from trivium.hf.model_config import FastPath

Aggregate = Literal["none", "product", "minimum"]
OUTCOME, PROCESS = "reward_model", "process_reward_model"
_OUTCOME_ONLY = ("code", "format", "gsm8k", "language", "length", "math", "tags", OUTCOME)
_OVERLAPPED_BY_DEFAULT = ("code", "math", "server")
"""Built-in rewards that wait for other processes and score each response independently."""
_MAX_TIMEOUT = 1e9


class LearnedArguments(Configuration):
    """Arguments of ``reward_model``."""

    path: str = Field(min_length=1)
    """Reward model: a run's final directory, a checkpoint or a hub name."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Data type of its weights and computation."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:[0-9]+)?$")
    """Device of the model."""
    fast_path: FastPath = "auto"
    """Faster implementations of its layers on a CPU: auto or off, as for ``model``."""
    template_arguments: dict[str, Any] | None = None
    """Variables for its chat template, if it does not have the policy's vocabulary."""


class ProcessArguments(LearnedArguments):
    """Arguments of ``process_reward_model``."""

    separator: str = Field(default="\n", min_length=1)
    """Text between two steps."""
    aggregate: Aggregate = "none"
    """Score of the whole response from its steps; none scores each step."""


LEARNED: dict[str, type[LearnedArguments]] = {OUTCOME: LearnedArguments, PROCESS: ProcessArguments}


class RewardConfig(Configuration):
    """One reward function and its weight in the sum."""

    function: str = Field(min_length=1)
    """`file.py:function`, `package.module:function`, or a built-in reward's name; a relative file
    is searched for in the current directory, then in the configuration's directory."""

    name: str | None = Field(None, min_length=1)
    """Name in metrics and messages; by default the function's name."""

    weight: float = 1.0
    """Factor of this reward in the sum; may be negative. 0 only reports the reward."""

    arguments: dict[str, Any] = Field(default_factory=dict)
    """Additional keyword arguments for the function, the same in every call."""

    columns: dict[str, str] = Field(default_factory=dict)
    """Data column of a function parameter (parameter: column), if their names differ."""

    only: dict[str, list[Any]] = Field(default_factory=dict)
    """Score only the responses to rows whose column has one of these values, as in
    {source: [math]} for a mixture of data; to others the reward does not apply."""

    timeout: float | None = Field(60.0, gt=0, le=_MAX_TIMEOUT)
    """Seconds that one call, with all responses of a step, may take; null calls the function in
    the main thread, without a timeout."""

    fallback: float | None = None
    """Value for responses that the function fails to score; null stops the run with an error."""

    while_sampling: bool | None = None
    """Score finished groups while others are still sampled, in several calls. null: only `server`,
    `code` and `math`, which wait for other processes. Set true for your own function if a value
    depends only on its own group and the function mostly waits; computation gains nothing."""

    whole_batch: bool = False
    """Call the function once, with all responses of a step. Set true if a value depends on
    responses to other prompts: with several processes, each otherwise calls the function for the
    responses to its own share of the prompts (docs/scale.md)."""

    _directory: Path | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        self._directory = (context or {}).get("directory")

    @field_serializer("function")
    def _serialize_function(self, function: str) -> str:
        return anchored(function, self._directory)

    def inputs(self) -> Iterator[Path]:
        """Yield the function's file and the path in the argument ``path``, if they exist."""
        file = looked_up(anchored(self.function, self._directory).rpartition(":")[0])
        model = looked_up(str(self.arguments.get("path", "")))
        yield from (p for p in (file, model) if p.name and p.exists())

    @property
    def directories(self) -> list[Path]:
        """Directories to search for a relative file: the current one, then the configuration's."""
        return [Path.cwd(), *([self._directory.resolve()] if self._directory else [])]

    @property
    def overlaps_sampling(self) -> bool:
        """Whether scoring may start while other groups of the batch are still sampled."""
        if self.whole_batch:
            return False
        if self.while_sampling is None:
            return self.function in _OVERLAPPED_BY_DEFAULT and self.timeout is not None
        return self.while_sampling

    @property
    def label(self) -> str:
        """Name of the reward in metrics and messages."""
        return self.name or self.function.rpartition(":")[2]

    def applies_to(self, columns: Mapping[str, Any]) -> bool:
        """Return whether the reward scores responses to a row with these columns."""
        return all(columns.get(name) in values for name, values in self.only.items())

    def missing_columns(self, columns: Collection[str]) -> list[str]:
        """Return the faults of ``only`` whose columns the data does not have."""
        known = ", ".join(sorted(columns)) or "(none)"
        return [
            f"`only` names the column {name!r}, which the data does not have"
            f"{nearest(name, columns)}; the columns are {known}"
            for name in self.only
            if name not in columns
        ]

    def conflicts(self) -> Iterator[Conflict]:
        for name, values in self.only.items():
            if not values:
                yield "only", f"{name} has no value, so that no row is scored: name at least one"
        for name in secrets_in(self.arguments):
            yield (
                "arguments",
                f"`{name}` looks like a secret, and the saved configuration and reports would show "
                "it (its value is not shown here): put it into an environment variable, read it in "
                f"the function with os.environ, and remove `{name}` (a reward server takes "
                "`headers_from_env`)",
            )
        if self.while_sampling and self.timeout is None:
            yield (
                "while_sampling",
                "`timeout: null` calls the function in the main thread, which is busy with "
                "sampling: set a timeout, or remove while_sampling",
            )
        if self.while_sampling and self.whole_batch:
            yield (
                "while_sampling",
                "it calls the function for some responses while others are sampled, but "
                "whole_batch asks for one call: leave one of them out",
            )
        if self.function in LEARNED:
            yield from _argument_conflicts(self.function, self.arguments)


def _argument_conflicts(function: str, arguments: dict[str, Any]) -> Iterator[Conflict]:
    """Yield the errors in a learned reward's arguments."""
    arguments_class = LEARNED[function]
    fields = arguments_class.model_fields
    try:
        arguments_class.model_validate(arguments)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0])
            if detail["type"] == "missing":
                yield (
                    "arguments",
                    f"{function} needs the path of its model: write "
                    f"`arguments: {{{name}: runs/reward/final}}`",
                )
            elif detail["type"] == "extra_forbidden":
                yield (
                    "arguments",
                    f"{function} takes no `{name}`{nearest(name, fields)}; it takes "
                    f"{', '.join(fields)}",
                )
            else:
                reason = detail["msg"].replace("Input should", "it must", 1)
                yield f"arguments.{name}", f"{reason} ({fields[name].description})"


def _check_names_and_weights(rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
    labels = [reward.label for reward in rewards]
    duplicate = next((label for label in labels if labels.count(label) > 1), None)
    if duplicate is not None:
        raise ValueError(
            f"{labels.count(duplicate)} rewards are called {duplicate!r}: give each its own 'name'"
        )
    if rewards and not any(reward.weight for reward in rewards):
        raise ValueError("every weight is 0, so no response is rewarded: give one another weight")
    return rewards


RewardConfigs = Annotated[tuple[RewardConfig, ...], AfterValidator(_check_names_and_weights)]
"""Rewards with distinct names and at least one nonzero weight."""


def scores_steps(reward: RewardConfig) -> bool:
    """Return whether a built-in reward is known to score steps."""
    aggregate = reward.arguments.get("aggregate", "none")
    return reward.function == "steps" or (reward.function == PROCESS and aggregate == "none")


def none_scores_steps(rewards: Sequence[RewardConfig]) -> bool:
    """Return whether every reward is known to score whole responses only."""
    return all(
        reward.function in _OUTCOME_ONLY
        or (reward.function == PROCESS and reward.arguments.get("aggregate", "none") != "none")
        for reward in rewards
    )
