"""Results of a call of a reward function: a list of entries, or the reason why it has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trivium.rewards.values import Value, describe_value


@dataclass(frozen=True)
class Fault:
    """Reason why a response has no value; `whole_batch` if no single response is the cause."""

    reason: str
    whole_batch: bool = False
    cause: BaseException | None = None

    def __reduce__(self) -> tuple[type[Fault], tuple[str, bool]]:
        """Leave the cause, which may hold anything, in the process that called the function."""
        return Fault, (self.reason, self.whole_batch)


CheckedValue = Value | Fault
"""A function's checked value for one response, or the reason why it has none."""


class CallFailed(Exception):
    """A call failed; `retry_one_by_one` if single calls can find the response that causes it."""

    def __init__(
        self, reason: str, retry_one_by_one: bool, cause: BaseException | None = None
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry_one_by_one, self.cause = reason, retry_one_by_one, cause


def to_list(result: Any, count: int) -> list[Any]:
    """Return a call's result as a list with one entry per response."""
    try:
        shape = tuple(getattr(result, "shape", ()))
        if callable(getattr(result, "tolist", None)) and len(shape) <= 1:
            result = result.tolist()
    except Exception as error:
        reason = f"returned {describe_value(result)}, which raises {type(error).__name__}"
        raise CallFailed(reason, retry_one_by_one=False, cause=error) from error
    if len(shape) > 1:
        kind = type(result).__name__
        raise CallFailed(
            f"returned {kind} of the shape {shape}, not one value per response ({count}): "
            "flatten it",
            retry_one_by_one=False,
        )
    if not isinstance(result, list | tuple):
        raise CallFailed(
            f"returned {describe_value(result)}, not a list of {count} values",
            retry_one_by_one=False,
        )
    if len(result) != count:
        values = "value" if len(result) == 1 else "values"
        raise CallFailed(f"returned {len(result)} {values} for {count}", retry_one_by_one=True)
    return list(result)
