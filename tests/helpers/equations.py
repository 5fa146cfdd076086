"""The functions of every option table, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trivium.training.options import (
    ADVANTAGE,
    AGGREGATION,
    IMPORTANCE_WEIGHT,
    KL_ESTIMATOR,
    PREFERENCE_LOSS,
    SURROGATE,
)


def functions(option: Any) -> dict[str, Callable[..., Any]]:
    """Return each name of an option's table with its function."""
    return {name: option.load(name) for name in option.table}


ADVANTAGES = functions(ADVANTAGE)
AGGREGATIONS = functions(AGGREGATION)
IMPORTANCE_WEIGHTS = functions(IMPORTANCE_WEIGHT)
KL_ESTIMATORS = functions(KL_ESTIMATOR)
PREFERENCE_LOSSES = functions(PREFERENCE_LOSS)
SURROGATES = functions(SURROGATE)
