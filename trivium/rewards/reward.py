"""Weighted sum of reward functions.

A reward function receives texts and data columns, and returns a number or a list of scored spans
per response. An exception in place of a value gives the reason why that response has no value.
``reward_config`` holds the configuration, ``functions`` loads and calls functions, ``component``
checks their values, and the other modules of this package implement single rewards.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from trivium.config.functions import Function, FunctionKind, load_function, printable
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.code import code
from trivium.rewards.component import CheckedValue, Component, columns_of, raw_text
from trivium.rewards.format import format, length, tags
from trivium.rewards.functions import (
    argument_faults,
    match_columns,
    signature_faults,
)
from trivium.rewards.language import language
from trivium.rewards.math import gsm8k
from trivium.rewards.math import math as math_verified
from trivium.rewards.reward_config import RewardConfig
from trivium.rewards.server import server
from trivium.rewards.steps import steps
from trivium.rewards.values import Step
from trivium.serialization import serializable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trivium.data.prompts import Prompt
    from trivium.data.response import Response

logger = logging.getLogger("trivium")

BUILT_IN: dict[str, Function] = {
    "code": code,
    "format": format,
    "gsm8k": gsm8k,
    "language": language,
    "length": length,
    "math": math_verified,
    "server": server,
    "steps": steps,
    "tags": tags,
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
        outcomes: weighted sum of the outcome rewards that apply, per response.
        steps: per response, the end (in characters) and the weighted value of each step, in order.
            Values of steps that end at the same position are added. None without process rewards.
        components: per reward, its unweighted value for each response, None where it does not
            apply; for a process reward, the mean over the response's steps, or 0 without steps.
        fallbacks: per reward, the number of responses that got its fallback value.
    """

    outcomes: list[float]
    steps: list[list[Step]] | None
    components: dict[str, list[float | None]]
    fallbacks: dict[str, int]


class Rewards:
    """Reward functions that are loaded once and called for every batch of responses."""

    def __init__(
        self,
        configs: Sequence[RewardConfig],
        *,
        functions: Mapping[str, Function] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Load the functions and check their signatures; raise ConfigurationError with all errors.

        `functions` adds names beside the built-in ones, for functions that need an object of the
        caller, such as a loaded reward model. `tokenizer` is the policy's, for functions that read
        special tokens.
        """
        self._tokenizer = tokenizer
        added = {} if tokenizer is None else tokenizer.added_tokens_decoder
        self._special_tokens = frozenset(i for i, token in added.items() if token.special)
        self._told_of_special_tokens = False
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
            self._components.append(Component(config, function, tokenizer))
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

    @property
    def need_whole_batch(self) -> bool:
        """Whether a reward must see all responses of a batch in one call."""
        return any(component.config.whole_batch for component in self._components)

    def check_values(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        columns: Collection[str],
        precomputed: Mapping[str, list[CheckedValue]] = MappingProxyType({}),
    ) -> dict[str, list[CheckedValue]]:
        """Return the checked values of a share of a batch, by reward, for ``score``.

        Rewards that need the whole batch are left out, and after a failure those that follow.
        `columns` are the columns of all prompts in the batch.
        """
        checked: dict[str, list[CheckedValue]] = {}
        for component in self._components:
            if component.config.whole_batch:
                continue
            values = precomputed.get(component.name)
            if values is None:
                values = component.check_values(prompts, responses, columns)
            checked[component.name] = values
            if component.fails(values):
                break
        return checked

    def check_whole_batch(
        self, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> dict[str, list[CheckedValue]]:
        """Return the checked values of the rewards that need the whole batch, by reward."""
        columns = columns_of(prompts)
        return {
            component.name: component.check_values(prompts, responses, columns)
            for component in self._components
            if component.config.whole_batch
        }

    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        precomputed: Mapping[str, list[CheckedValue]] = MappingProxyType({}),
    ) -> Scores:
        """Score responses; `prompts` holds the prompt of each response.

        A column that only some prompts have is None for the others. If a call raises or returns the
        wrong number of values, the function is called again for each response alone, to find the
        response at fault. Rewards with `precomputed` values are not called. The total is the
        weighted sum of the rewards that apply to the response. Raises RewardError that names the
        function and the response, or a response that no reward with a weight applies to.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        outcomes = [0.0] * len(responses)
        values_by_end: list[dict[int, float]] = [{} for _ in responses]
        components: dict[str, list[float | None]] = {}
        fallbacks: dict[str, int] = {}
        for component in self._components:
            weight, name = component.config.weight, component.name
            values, fallbacks[name] = component.values(prompts, responses, precomputed.get(name))
            components[name] = [None if value is None else _mean(value) for value in values]
            for index, value in enumerate(values):
                if value is None:
                    continue
                if not isinstance(value, list):
                    outcomes[index] += weight * value
                    continue
                for end, number in value:
                    values_by_end[index][end] = values_by_end[index].get(end, 0.0) + weight * number
        self._require_value(components, prompts)
        self._tell_of_special_tokens(responses)
        _require_finite(outcomes, values_by_end)
        is_process = any(component.is_process for component in self._components)
        ordered = [sorted(step_values.items()) for step_values in values_by_end]
        return Scores(outcomes, ordered if is_process else None, components, fallbacks)

    def _require_value(
        self, components: Mapping[str, Sequence[float | None]], prompts: Sequence[Prompt]
    ) -> None:
        """Raise RewardError for a response that no reward with a weight applies to."""
        weighted = [components[c.name] for c in self._components if c.config.weight]
        weighted = weighted or list(components.values())
        for index, prompt in enumerate(prompts):
            if all(values[index] is None for values in weighted):
                raise RewardError(
                    f"response {index} of {len(prompts)} (prompt row {prompt.index}): every reward "
                    f"({', '.join(self.names)}) returned None, which says that it does not apply: "
                    "return a number from one of them (is a `return` missing?), or remove the row"
                )

    def _tell_of_special_tokens(self, responses: Sequence[Response]) -> None:
        """Log, once, that rewards read a text from which special tokens were stripped."""
        if self._told_of_special_tokens or not self._special_tokens:
            return
        readers = [c.name for c in self._components if not c.sees_special_tokens]
        for response in responses if readers else ():
            inner = response.tokens[:-1] if response.finish_reason == "eos" else response.tokens
            if not self._special_tokens.isdisjoint(inner):
                self._told_of_special_tokens = True
                logger.warning(
                    "responses hold special tokens, which are not in the text that rewards read "
                    "(%s): %s is given as %s. Take the parameter `raw_responses` in your own "
                    "function, or set `arguments: {special_tokens: true}` for `format` and `tags`",
                    ", ".join(readers),
                    printable(repr(raw_text(self._tokenizer, response)), 80),
                    printable(repr(response.text), 80),
                )
                return


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


def _mean(value: float | list[Step]) -> float:
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
