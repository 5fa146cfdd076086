"""One configured reward function: calling it and checking every value that it returns.

A NaN or a shifted list would train a policy for hours without an error, so everything a function
returns is checked here. Each error names the function and the response. If the user configured a
fallback value, it replaces missing or invalid values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from trivium.config.functions import Function, error_with_location, message_of
from trivium.data.chat import decode_response
from trivium.errors import ConfigurationError, RewardError
from trivium.rewards.functions import (
    SPECIAL_TOKEN_INPUTS,
    CallTimeout,
    accepted_inputs,
    call,
    match_columns,
)
from trivium.rewards.results import CallFailed, CheckedValue, Fault, to_list
from trivium.rewards.values import Value, check_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trivium.data.prompts import Prompt
    from trivium.data.response import Response
    from trivium.rewards.reward_config import RewardConfig


def _has_form(value: CheckedValue) -> bool:
    """Whether the value is a number or a list of steps."""
    return value is not None and not isinstance(value, Fault)


def raw_text(tokenizer: PreTrainedTokenizerBase | None, response: Response) -> str:
    """Return a response's text with special tokens, but for the token that ended it."""
    assert tokenizer is not None, "checked by accepted_inputs"
    tokens = response.tokens[:-1] if response.finish_reason == "eos" else response.tokens
    return decode_response(tokenizer, tokens, keep_special=True)


def columns_of(prompts: Sequence[Prompt]) -> set[str]:
    """Return the columns that at least one prompt has."""
    return {column for prompt in prompts for column in prompt.columns}


# --- One reward ----------------------------------------------------------------------------------


class Component:
    """A configured reward function; its first values show whether it is a process reward."""

    def __init__(
        self,
        config: RewardConfig,
        function: Function,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config, self.function, self.tokenizer = config, function, tokenizer
        self.name = config.label
        self.is_process: bool | None = None

    @property
    def sees_special_tokens(self) -> bool:
        """Whether the function reads special tokens, or no text of the responses."""
        if self.config.function in ("format", "tags"):
            return bool(self.config.arguments.get("special_tokens"))
        inputs = accepted_inputs(self.function)
        return "responses" not in inputs or bool(set(SPECIAL_TOKEN_INPUTS) & set(inputs))

    def values(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        precomputed: list[CheckedValue] | None = None,
    ) -> tuple[list[Value], int]:
        """Return the value of every response, and the number of fallback values.

        `precomputed` holds values from earlier calls for all responses; None calls the function.
        """
        results = self._call_and_check(prompts, responses) if precomputed is None else precomputed
        values = self._require_one_form(results)
        faults = {i: value for i, value in enumerate(values) if isinstance(value, Fault)}
        fallback = self.config.fallback
        if faults and fallback is None:
            raise self._reward_error(faults, prompts, responses)
        values_or_fallbacks = [
            self._fallback(responses[i].text) if isinstance(value, Fault) else value
            for i, value in enumerate(values)
        ]
        return values_or_fallbacks, len(faults)

    def check_values(
        self, prompts: Sequence[Prompt], responses: Sequence[Response], columns: Collection[str]
    ) -> list[CheckedValue]:
        """Return the checked value of every response, which may be a share of a batch.

        `columns` are the columns of all prompts in the batch.
        """
        if not responses:
            return []
        values = self._call_and_check(prompts, responses, columns)
        # The search for the response at fault ends with the first one; what follows is not used.
        filler: CheckedValue = next((v for v in values if not isinstance(v, Fault)), 0.0)
        return values + [filler] * (len(responses) - len(values))

    def fails(self, values: Sequence[CheckedValue]) -> bool:
        """Return whether ``values`` raises RewardError for these checked values."""
        return self.config.fallback is None and any(isinstance(v, Fault) for v in values)

    def score_subset(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        columns: Collection[str],
        seconds: float,
    ) -> list[CheckedValue] | None:
        """Score some of a batch's responses; return None if the call fails.

        `columns` are the columns of all prompts in the batch. After a failed call, a call for all
        responses decides which of them are at fault.
        """
        try:
            entries = self._call(prompts, responses, seconds, columns)
        except CallFailed:
            return None
        return [self._check_value(e, r.text) for e, r in zip(entries, responses, strict=True)]

    def _fallback(self, text: str) -> Value:
        assert self.config.fallback is not None, "faults without a fallback are raised earlier"
        if not self.is_process:
            return self.config.fallback
        return [(len(text), self.config.fallback)] if text else []

    def _call(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        seconds: float | None,
        columns: Collection[str] | None = None,
    ) -> list[Any]:
        """Return the function's entry for every response, and None where it does not apply."""
        scored = [i for i, p in enumerate(prompts) if self.config.applies_to(p.columns)]
        if len(scored) == len(prompts):
            return self._call_function(prompts, responses, seconds, columns)
        entries: list[Any] = [None] * len(prompts)
        columns = columns_of(prompts) if columns is None else columns
        faults = self.config.missing_columns(columns)
        if faults:
            raise ConfigurationError("\n".join(f"reward {self.name!r}: {f}" for f in faults))
        if scored:
            found = self._call_function(
                [prompts[i] for i in scored], [responses[i] for i in scored], seconds, columns
            )
            for i, entry in zip(scored, found, strict=True):
                entries[i] = entry
        return entries

    def _call_function(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        seconds: float | None,
        columns: Collection[str] | None,
    ) -> list[Any]:
        available = columns_of(prompts) if columns is None else columns
        try:
            keywords = self._keywords(prompts, responses, available)
            result = call(self.function, keywords, seconds)
        except CallTimeout:
            reason = f"exceeded its timeout of {seconds:g} s"
            raise CallFailed(reason, retry_one_by_one=False) from None
        except (KeyboardInterrupt, ConfigurationError):
            raise
        except RewardError as error:
            # The function reports the reason itself, so no search for one response is needed.
            raise CallFailed(message_of(error), retry_one_by_one=False, cause=error) from error
        except BaseException as error:
            file = getattr(getattr(self.function, "__code__", None), "co_filename", None)
            reason = f"raised {error_with_location(error, lambda frame: frame == file)}"
            if "main thread" in message_of(error):
                reason += "; set 'timeout: null' to call it there, without a timeout"
            raise CallFailed(reason, retry_one_by_one=True, cause=error) from error
        return to_list(result, len(responses))

    def _keywords(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        available: Collection[str],
    ) -> dict[str, Any]:
        column_of, faults = match_columns(
            self.function, self.config.arguments, self.config.columns, available
        )
        if faults:
            raise ConfigurationError("\n".join(f"reward {self.name!r}: {f}" for f in faults))
        names = accepted_inputs(self.function, has_tokenizer=self.tokenizer is not None)
        inputs: dict[str, Callable[[], Any]] = {
            "prompts": lambda: [prompt.text for prompt in prompts],
            "responses": lambda: [response.text for response in responses],
            "prompt_tokens": lambda: [list(prompt.tokens) for prompt in prompts],
            "response_tokens": lambda: [list(response.tokens) for response in responses],
            "response_ids": lambda: [list(response.tokens) for response in responses],
            "raw_responses": lambda: [raw_text(self.tokenizer, r) for r in responses],
            "tokenizer": lambda: self.tokenizer,
            "finish_reasons": lambda: [response.finish_reason for response in responses],
        }
        return {
            **{name: inputs[name]() for name in names},
            **{
                name: [p.columns.get(column) for p in prompts] for name, column in column_of.items()
            },
            **self.config.arguments,
        }

    def _call_and_check(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        columns: Collection[str] | None = None,
    ) -> list[CheckedValue]:
        try:
            entries = self._call(prompts, responses, self.config.timeout, columns)
        except CallFailed as failure:
            if failure.retry_one_by_one and len(responses) > 1:
                return self._one_by_one(failure, prompts, responses, columns)
            whole_batch = not failure.retry_one_by_one
            return [Fault(failure.reason, whole_batch, failure.cause)] * len(responses)
        return [self._check_value(e, r.text) for e, r in zip(entries, responses, strict=True)]

    def _check_value(self, entry: Any, text: str) -> CheckedValue:
        if isinstance(entry, Exception):
            return Fault(message_of(entry) or type(entry).__name__, cause=entry)
        try:
            return check_value(entry, text)
        except ValueError as error:
            return Fault(str(error))

    def _one_by_one(
        self,
        failure: CallFailed,
        prompts: Sequence[Prompt],
        responses: Sequence[Response],
        columns: Collection[str] | None,
    ) -> list[CheckedValue]:
        """Call the function for each response alone, to find those that made the batch call fail.

        All these calls share one timeout. Without a fallback, the first failure ends the search.
        """
        limit = self.config.timeout
        deadline = None if limit is None else time.monotonic() + limit
        values: list[CheckedValue] = []
        for prompt, response in zip(prompts, responses, strict=True):
            seconds = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
            try:
                [entry] = self._call([prompt], [response], seconds, columns)
                values.append(self._check_value(entry, response.text))
            except CallFailed as single_failure:
                values.append(Fault(single_failure.reason, cause=single_failure.cause))
            if isinstance(values[-1], Fault) and self.config.fallback is None:
                return values
        if any(isinstance(value, Fault) for value in values):
            return values
        reason = f"{failure.reason}; a second call for each response alone raised no error"
        return [Fault(reason, whole_batch=True, cause=failure.cause)] * len(responses)

    def _require_one_form(self, values: list[CheckedValue]) -> list[CheckedValue]:
        """Replace values whose form (number or steps) differs from the first value by faults."""
        form = self.is_process
        if form is None:
            form = next((isinstance(v, list) for v in values if _has_form(v)), None)
        self.is_process = form
        reason = "its value is {}, but the value of the first scored response is {}"
        texts = ("a number", "a list of steps") if form else ("a list of steps", "a number")
        return [
            value
            if not _has_form(value) or isinstance(value, list) == form
            else Fault(reason.format(*texts))
            for value in values
        ]

    def _reward_error(
        self, faults: dict[int, Fault], prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> RewardError:
        index, fault = next(iter(faults.items()))
        source = self.config.function
        label = f"reward {self.name!r}" + (f" ({source})" if source != self.name else "")
        text = responses[index].text
        quoted = f"{text[:80]!r}{'…' if len(text) > 80 else ''}"
        if fault.whole_batch:
            where = f"a batch of {len(responses)} responses (the first is {quoted})"
        else:
            row = prompts[index].index
            where = f"response {index} of {len(responses)} (prompt row {row}), {quoted}"
        single = fault.whole_batch or len(faults) == 1
        others = "" if single else f" ({len(faults) - 1} more failed)"
        error = RewardError(
            f"{label}, on {where}: {fault.reason}{others}. Fix the function, or set 'fallback' to "
            "the value for responses that it cannot score"
        )
        error.__cause__ = fault.cause
        return error
