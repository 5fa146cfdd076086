"""Training budgets: limits on seconds, tokens or FLOPs, and how much of them a run has spent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field

from trivium.config.base import Configuration, Conflict

CURRENCIES = {
    "seconds": "time/total",
    "generated_tokens": "tokens/generated",
    "trained_tokens": "tokens/trained",
    "flops": "flops",
}
"""The units of a budget, each with the metric whose sum over the steps is the amount spent."""


class BudgetConfig(Configuration):
    """Ends the run after the step that reaches a limit. Schedules follow the fraction spent."""

    seconds: float | None = Field(default=None, gt=0)
    """Wall-clock time of the training steps, without evaluation and saving."""
    generated_tokens: float | None = Field(default=None, gt=0)
    """Number of tokens sampled for training."""
    trained_tokens: float | None = Field(default=None, gt=0)
    """Number of response tokens with a gradient, counted once per epoch."""
    flops: float | None = Field(default=None, gt=0)
    """Number of floating-point operations of all models."""

    def conflicts(self) -> Iterator[Conflict]:
        if all(getattr(self, currency) is None for currency in CURRENCIES):
            yield "", f"budget is empty: give one of {', '.join(CURRENCIES)}"


class BudgetTracker:
    """Amount spent of a budget. Without a budget it is never exhausted."""

    def __init__(self, budget: BudgetConfig | None) -> None:
        self.limits = {} if budget is None else budget.model_dump(exclude_none=True)
        self.spent = dict.fromkeys(CURRENCIES, 0.0)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one step."""
        for currency, name in CURRENCIES.items():
            self.spent[currency] += metrics.get(name, 0.0)

    def fraction_spent(self) -> float:
        """Return the largest fraction of a limit that is spent, at most 1."""
        fractions = [self.spent[currency] / limit for currency, limit in self.limits.items()]
        return min(1.0, max(fractions, default=0.0))

    @property
    def exhausted(self) -> bool:
        """Whether a limit is reached."""
        return self.fraction_spent() >= 1

    def __str__(self) -> str:
        return ", ".join(f"{self.spent[c]:,.4g} of {x:,.4g} {c}" for c, x in self.limits.items())
