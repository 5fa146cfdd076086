"""Budget of a method in a comparison, which its jobs share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trivium.config.base import Configuration
from trivium.runs.budget import CURRENCIES

Currency = Literal["seconds", "generated_tokens", "trained_tokens", "flops"]


class MethodBudget(Configuration):
    """Total budget of every method."""

    currency: Currency
    """Unit of the budget: seconds (wall-clock), generated_tokens, trained_tokens or flops."""
    amount: float = Field(gt=0)
    """Size of the budget, in the currency."""


assert set(CURRENCIES) == set(Currency.__args__)
