"""Rewards as plain functions: their weighted sum.

A function sees texts and the data's columns, and returns a number, or a list of scored spans, per
response; an exception in a value's place says why that response has none. How it is configured is
for ``reward_config``, how it is found and called for ``functions``, what it may return for
``component``, and what single rewards measure for the other modules of this package.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from trivium.config.functions import Function, FunctionKind, load_function
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.code import code
from trivium.rewards.component import Component, Entry, Step, Value
from trivium.rewards.format import format, length
from trivium.rewards.functions import (
    fit,
    objection_to_arguments,
    signature_faults,
)
from trivium.rewards.math import gsm8k
from trivium.rewards.math import math as math_verified
from trivium.rewards.reward_config import RewardConfig
from trivium.rewards.server import server
from trivium.rewards.steps import steps
from trivium.serialization import serializable

if TYPE_CHECKING:
    from trivium.data.prompts import Prompt
    from trivium.rollout.engine import Response

BUILT_IN: dict[str, Function] = {
    "code": code,
    "format": format,
    "gsm8k": gsm8k,
    "length": length,
    "math": math_verified,
    "server": server,
    "steps": steps,
}
REWARD = FunctionKind(
    name="reward",
    signature="'def reward(prompts, responses, **columns)'",
    result="that returns a number per response",
    built_in=BUILT_IN,
)


@serializable
@dataclass(frozen=True)
class Scores:
    """The rewards of N responses.

    Attributes:
        outcomes: the weighted sum of the outcome rewards, per response.
        steps: per response, by position, where each step ends (characters) and its weighted value;
            steps of several rewards that end at one place are added up. None where no reward is a
            process reward.
        components: per reward, its unweighted value for each response; for a process reward the
            mean over the response's steps, 0 where it has none.
        fallbacks: per reward, how many of the responses got its fallback value.
    """

    outcomes: list[float]
    steps: list[list[Step]] | None
    components: dict[str, list[float]]
    fallbacks: dict[str, int]


class Rewards:
    """Several reward functions as one: loaded once, called for every batch of responses."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        functions: Mapping[str, Function] | None = None,
    ) -> None:
        """Load the functions and check their signatures; raises ConfigurationError with all faults.

        `functions` are further names to use like the built-in ones, for functions that need
        something of the caller's, such as a loaded reward model.
        """
        kind = replace(REWARD, built_in={**BUILT_IN, **(functions or {})})
        faults = [] if configs else ["there is no reward: give at least one under 'rewards'"]
        self._components: list[Component] = []
        for index, config in enumerate(configs):
            where = f"rewards.{index} ({config.function})"
            try:
                function = load_function(config.function, config.directories, kind)
            except ConfigurationError as error:
                faults.append(f"{where}: {error}")
                continue
            self._components.append(Component(config, function))
            faults += [f"{where}: {fault}" for fault in function_faults(config, function)]
        _refuse(faults + _repeated(self.names))

    @property
    def names(self) -> list[str]:
        """The rewards' names, in order."""
        return [component.name for component in self._components]

    def check(self, columns: Collection[str]) -> None:
        """Raise ConfigurationError where a function needs a column that the data does not have."""
        faults = []
        for component in self._components:
            config = component.config
            _, missing = fit(component.function, config.arguments, config.columns, columns)
            faults += [f"reward {component.name!r} ({config.function}): {m}" for m in missing]
        _refuse(faults)

    @property
    def while_sampling(self) -> list[Component]:
        """The rewards that may score some of a batch's responses before the others."""
        return [component for component in self._components if component.config.early]

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        early: Mapping[str, list[Entry]] = MappingProxyType({}),
    ) -> Scores:
        """Return the rewards of responses, each to the prompt at its place in `prompts`.

        A column that only some of the prompts have is None for the others. Where a call raises or
        returns the wrong count, the function is called again for each response alone, to find the
        one at fault. Rewards that scored all responses `early` are not called. Raises RewardError
        that names the function and the response.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        outcomes = [0.0] * len(responses)
        by_end: list[dict[int, float]] = [{} for _ in responses]
        components: dict[str, list[float]] = {}
        fallbacks: dict[str, int] = {}
        for component in self._components:
            weight, name = component.config.weight, component.name
            values, fallbacks[name] = component.values(prompts, responses, early.get(name))
            components[name] = [_plain(value) for value in values]
            for index, value in enumerate(values):
                if not isinstance(value, list):
                    outcomes[index] += weight * value
                    continue
                for end, number in value:
                    by_end[index][end] = by_end[index].get(end, 0.0) + weight * number
        _require_finite(outcomes, by_end)
        process = any(component.process for component in self._components)
        ordered = [sorted(steps_of_one.items()) for steps_of_one in by_end]
        return Scores(outcomes, ordered if process else None, components, fallbacks)


def function_faults(config: RewardConfig, function: Function) -> list[str]:
    """Return what keeps the function from being called as this reward, whatever the data."""
    faults = signature_faults(function, config.arguments, config.columns)
    if not faults and function in BUILT_IN.values():
        faults = objection_to_arguments(function, config.arguments)
    return faults


def _repeated(names: Sequence[str]) -> list[str]:
    return [
        f"{names.count(name)} rewards are called {name!r}: give each a 'name' of its own"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigurationError("\n".join(faults))


def _plain(value: Value) -> float:
    if not isinstance(value, list):
        return value
    return math.fsum(number for _, number in value) / len(value) if value else 0.0


def _require_finite(outcomes: Sequence[float], by_end: Sequence[Mapping[int, float]]) -> None:
    for index, (outcome, of_one) in enumerate(zip(outcomes, by_end, strict=True)):
        if not all(map(math.isfinite, (outcome, *of_one.values()))):
            raise RewardError(
                f"response {index}: the weighted sum of its rewards is not finite, though each is: "
                "give smaller weights or values"
            )
