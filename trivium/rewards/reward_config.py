"""How a reward is configured: its function, what it is given, and what it counts for.

Finding and calling the function is for ``functions`` and ``component``; what a learned reward's
model says is for ``learned``. Nothing here runs a user's code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, field_serializer

from trivium.config.base import Configuration, Conflict
from trivium.config.functions import anchored, nearest
from trivium.config.paths import looked_up
from trivium.config.secrets import secrets_in

Aggregate = Literal["none", "product", "minimum"]
OUTCOME, PROCESS = "reward_model", "process_reward_model"
_WHOLE = ("code", "format", "gsm8k", "length", "math", OUTCOME)
_APART = ("code", "math", "server")
"""Built-in rewards that wait for other processes, and score each response by itself."""
_LONGEST = 1e9


class LearnedArguments(Configuration):
    """What ``reward_model`` takes as ``arguments``."""

    path: str = Field(min_length=1)
    """The reward model: a run's final directory, a checkpoint or a hub name."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of its weights and arithmetic."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:[0-9]+)?$")
    """Where it lives."""


class ProcessArguments(LearnedArguments):
    """What ``process_reward_model`` takes as ``arguments``."""

    separator: str = Field(default="\n", min_length=1)
    """What stands between two steps."""
    aggregate: Aggregate = "none"
    """Score steps, or the response by all of them."""


LEARNED: dict[str, type[LearnedArguments]] = {OUTCOME: LearnedArguments, PROCESS: ProcessArguments}


class RewardConfig(Configuration):
    """One reward function, and what it counts for in the sum."""

    function: str = Field(min_length=1)
    """`file.py:function`, `package.module:function`, or a built-in reward's name; a relative file
    is looked for in the current directory, then in the configuration's."""

    name: str | None = Field(None, min_length=1)
    """Name in metrics and messages; the function's own name by default."""

    weight: float = 1.0
    """Factor of this reward in the sum; may be negative, or 0 for one that is only reported."""

    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments for the function, the same in every call."""

    columns: dict[str, str] = Field(default_factory=dict)
    """The function's parameter and the data column to give it, where their names differ."""

    timeout: float | None = Field(60.0, gt=0, le=_LONGEST)
    """Seconds that one call, with all responses of a step, may take; null calls the function in
    the main thread, without a limit."""

    fallback: float | None = None
    """Value for responses that the function fails to score; null stops the run instead."""

    while_sampling: bool | None = None
    """Score groups that have ended while others are still sampled, in calls for some of them. null:
    only `server`, `code` and `math`, which wait for other processes. For your own function: true
    where a value depends on its own group alone, and where it waits, as computing gains nothing."""

    _directory: Path | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        self._directory = (context or {}).get("directory")

    @field_serializer("function")
    def _from_anywhere(self, function: str) -> str:
        return anchored(function, self._directory)

    def inputs(self) -> Iterator[Path]:
        """The function's file, and whatever the argument ``path`` names."""
        place = looked_up(anchored(self.function, self._directory).rpartition(":")[0])
        model = looked_up(str(self.arguments.get("path", "")))
        yield from (p for p in (place, model) if p.name and p.exists())

    @property
    def directories(self) -> list[Path]:
        """Where a relative file is looked for: the current directory, then the configuration's."""
        return [Path.cwd(), *([self._directory.resolve()] if self._directory else [])]

    @property
    def early(self) -> bool:
        """Whether it may be called for some of a batch's responses before the others are there."""
        if self.while_sampling is None:
            return self.function in _APART and self.timeout is not None
        return self.while_sampling

    @property
    def label(self) -> str:
        """What the reward is called in metrics and messages."""
        return self.name or self.function.rpartition(":")[2]

    def conflicts(self) -> Iterator[Conflict]:
        for name in secrets_in(self.arguments):
            yield (
                "arguments",
                f"`{name}` looks like a secret, which the saved configuration and its reports "
                f"would show (its value is not shown here): put it into an environment variable, "
                f"read it in the function with os.environ, and leave `{name}` out (a reward "
                "server takes `headers_from_env`)",
            )
        if self.while_sampling and self.timeout is None:
            yield (
                "while_sampling",
                "`timeout: null` calls the function in the main thread, which is sampling then: "
                "give it a timeout, or leave while_sampling out",
            )
        if self.function in LEARNED:
            yield from _unfit(self.function, self.arguments)


def _unfit(function: str, arguments: dict[str, Any]) -> Iterator[Conflict]:
    """Yield what is wrong with a learned reward's arguments."""
    kind = LEARNED[function]
    try:
        kind.model_validate(arguments)
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
                known = ", ".join(kind.model_fields)
                yield (
                    "arguments",
                    f"{function} takes no `{name}`{nearest(name, kind.model_fields)}; it takes "
                    f"{known}",
                )
            else:
                reason = detail["msg"].replace("Input should", "it must", 1)
                yield f"arguments.{name}", f"{reason} ({kind.model_fields[name].description})"


def _told_apart(rewards: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
    labels = [reward.label for reward in rewards]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{labels.count(twice)} rewards are called {twice!r}: give each a 'name' of its own"
        )
    if rewards and not any(reward.weight for reward in rewards):
        raise ValueError("every weight is 0, so nothing is rewarded: give one another weight")
    return rewards


RewardConfigs = Annotated[tuple[RewardConfig, ...], AfterValidator(_told_apart)]
"""Rewards whose names differ, and which count for something."""


def none_scores_steps(rewards: Sequence[RewardConfig]) -> bool:
    """Whether every reward is known to score whole responses only."""
    return all(
        reward.function in _WHOLE
        or (reward.function == PROCESS and reward.arguments.get("aggregate", "none") != "none")
        for reward in rewards
    )
