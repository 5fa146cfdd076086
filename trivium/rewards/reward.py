"""Weighted sum of reward functions.

A reward function receives texts and data columns, and returns a number or a list of scored spans
per response. An exception in place of a value gives the reason why that response has no value.
``reward_config`` holds the configuration, ``functions`` loads and calls functions, ``component``
checks their values, and the other modules of this package implement single rewards.
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
from trivium.rewards.component import CheckedValue, Component, Step, Value
from trivium.rewards.format import format, length
from trivium.rewards.functions import (
    argument_faults,
    match_columns,
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
    from trivium.data.response import Response

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
        outcomes: weighted sum of the outcome rewards, per response.
        steps: per response, the end (in characters) and the weighted value of each step, in order.
            Values of steps that end at the same position are added. None without process rewards.
        components: per reward, its unweighted value for each response; for a process reward, the
            mean over the response's steps, or 0 without steps.
        fallbacks: per reward, the number of responses that got its fallback value.
    """

    outcomes: list[float]
    steps: list[list[Step]] | None
    components: dict[str, list[float]]
    fallbacks: dict[str, int]


class Rewards:
    """Reward functions that are loaded once and called for every batch of responses."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        functions: Mapping[str, Function] | None = None,
    ) -> None:
        """Load the functions and check their signatures; raise ConfigurationError with all errors.

        `functions` adds names beside the built-in ones, for functions that need an object of the
        caller, such as a loaded reward model.
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
        _raise_if_any(faults + _duplicate_names(self.names))

    @property
    def names(self) -> list[str]:
        """Names of the rewards, in order."""
        return [component.name for component in self._components]

    def check(self, columns: Collection[str]) -> None:
        """Raise ConfigurationError if a function needs a column that the data lacks."""
        faults = []
        for component in self._components:
            config = component.config
            _, missing = match_columns(
                component.function, config.arguments, config.columns, columns
            )
            faults += [f"reward {component.name!r} ({config.function}): {m}" for m in missing]
        _raise_if_any(faults)

    @property
    def while_sampling(self) -> list[Component]:
        """Rewards that can score finished groups while other groups are still sampled."""
        return [component for component in self._components if component.config.overlaps_sampling]

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        precomputed: Mapping[str, list[CheckedValue]] = MappingProxyType({}),
    ) -> Scores:
        """Score responses; `prompts` holds the prompt of each response.

        A column that only some prompts have is None for the others. If a call raises or returns the
        wrong number of values, the function is called again for each response alone, to find the
        response at fault. Rewards with `precomputed` values are not called. Raises RewardError that
        names the function and the response.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        outcomes = [0.0] * len(responses)
        values_by_end: list[dict[int, float]] = [{} for _ in responses]
        components: dict[str, list[float]] = {}
        fallbacks: dict[str, int] = {}
        for component in self._components:
            weight, name = component.config.weight, component.name
            values, fallbacks[name] = component.values(prompts, responses, precomputed.get(name))
            components[name] = [_mean(value) for value in values]
            for index, value in enumerate(values):
                if not isinstance(value, list):
                    outcomes[index] += weight * value
                    continue
                for end, number in value:
                    values_by_end[index][end] = values_by_end[index].get(end, 0.0) + weight * number
        _require_finite(outcomes, values_by_end)
        is_process = any(component.is_process for component in self._components)
        ordered = [sorted(step_values.items()) for step_values in values_by_end]
        return Scores(outcomes, ordered if is_process else None, components, fallbacks)


def function_faults(config: RewardConfig, function: Function) -> list[str]:
    """Return why the function cannot be called as this reward, regardless of the data."""
    faults = signature_faults(function, config.arguments, config.columns)
    if not faults and function in BUILT_IN.values():
        faults = argument_faults(function, config.arguments)
    return faults


def _duplicate_names(names: Sequence[str]) -> list[str]:
    return [
        f"{names.count(name)} rewards are called {name!r}: give each its own 'name'"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]


def _raise_if_any(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigurationError("\n".join(faults))


def _mean(value: Value) -> float:
    if not isinstance(value, list):
        return value
    return math.fsum(number for _, number in value) / len(value) if value else 0.0


def _require_finite(
    outcomes: Sequence[float], values_by_end: Sequence[Mapping[int, float]]
) -> None:
    for index, (outcome, step_values) in enumerate(zip(outcomes, values_by_end, strict=True)):
        if not all(map(math.isfinite, (outcome, *step_values.values()))):
            raise RewardError(
                f"response {index}: the weighted sum of its rewards is not finite, although each "
                "reward is finite: use smaller weights or values"
            )
