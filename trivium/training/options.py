"""Settings that choose an equation: their types, and how a choice becomes a function.

A choice is a name in a table of ``maths.options``, or a user's own ``file.py:function``. A user's
function is called on a tiny batch before anything is loaded, so that a wrong shape, a value that is
not finite or a missing gradient ends the run at once. Nothing here imports torch at import time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from trivium.config.option import Option
from trivium.maths.options import (
    ADVANTAGES,
    AGGREGATIONS,
    IMPORTANCE_WEIGHTS,
    KL_ESTIMATORS,
    PREFERENCE_LOSSES,
    SURROGATES,
)

ADVANTAGE = Option(
    "advantage", ADVANTAGES, "def advantage(rewards_N, sizes_G, *, scale)", "a number per response"
)
SURROGATE = Option(
    "surrogate",
    SURROGATES,
    "def surrogate(logprobs_T, old_logprobs_T, advantages_T, lengths_N, *, clip_low, clip_high)",
    "a loss per token",
)
KL_ESTIMATOR = Option(
    "KL estimator", KL_ESTIMATORS, "def kl(logprobs_T, ref_logprobs_T)", "an estimate per token"
)
PREFERENCE_LOSS = Option(
    "preference loss",
    PREFERENCE_LOSSES,
    "def loss(margins_P, *, beta, label_smoothing, target_margin)",
    "a loss per pair",
)
AGGREGATION = Option("aggregation", AGGREGATIONS)
IMPORTANCE_WEIGHT = Option("importance weight", IMPORTANCE_WEIGHTS)

AdvantageName = Annotated[str, ADVANTAGE]
SurrogateName = Annotated[str, SURROGATE]
KLEstimatorName = Annotated[str, KL_ESTIMATOR]
PreferenceLossName = Annotated[str, PREFERENCE_LOSS]
AggregationName = Annotated[str, AGGREGATION]
ImportanceWeightName = Annotated[str, IMPORTANCE_WEIGHT]


def load_option(option: Option, choice: str) -> Callable[..., Any]:
    """Return the function of a choice; a user's own is checked on a tiny batch first.

    Raises:
        ConfigurationError: the function cannot be imported, fails on the tiny batch, or does
            not return one finite number per item.
    """
    function = option.load(choice)
    if option.is_users(choice):
        from trivium.training.option_checks import check

        check(option, choice, function)
    return function
