"""What a run may spend, in any of four currencies, and what it has spent."""

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
"""Each currency, and the metric that adds up to it."""


class BudgetConfig(Configuration):
    """Ends a run after the step in which a limit is reached; schedules follow what is spent."""

    seconds: float | None = Field(default=None, gt=0)
    """Wall-clock of the training steps, without evaluation and saving."""
    generated_tokens: float | None = Field(default=None, gt=0)
    """Tokens sampled to learn from."""
    trained_tokens: float | None = Field(default=None, gt=0)
    """Response tokens with a gradient, counted once per epoch over them."""
    flops: float | None = Field(default=None, gt=0)
    """Floating-point operations of all models."""

    def conflicts(self) -> Iterator[Conflict]:
        if all(getattr(self, currency) is None for currency in CURRENCIES):
            yield "", f"budget is empty: give one of {', '.join(CURRENCIES)}"


class Spending:
    """What was spent of a budget; without one, nothing is ever over."""

    def __init__(self, budget: BudgetConfig | None) -> None:
        self.limits = {} if budget is None else budget.model_dump(exclude_none=True)
        self.spent = dict.fromkeys(CURRENCIES, 0.0)

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add one step's metrics."""
        for currency, name in CURRENCIES.items():
            self.spent[currency] += metrics.get(name, 0.0)

    def share(self) -> float:
        """The largest share of a limit that is spent, at most 1."""
        shares = [self.spent[currency] / limit for currency, limit in self.limits.items()]
        return min(1.0, max(shares, default=0.0))

    @property
    def over(self) -> bool:
        """Whether a limit is reached."""
        return self.share() >= 1

    def __str__(self) -> str:
        return ", ".join(f"{self.spent[c]:,.4g} of {x:,.4g} {c}" for c, x in self.limits.items())
