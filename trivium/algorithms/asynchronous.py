"""Settings that do not fit asynchronous sampling, which ``rollout_step`` starts, or its correction.

The correction is in ``sampler_correction``.
"""

from __future__ import annotations

from collections.abc import Iterator

from trivium.config.base import Conflict


def async_conflicts(
    asynchronous: bool, importance_sampling_cap: float | None, steps: int
) -> Iterator[Conflict]:
    """Yield settings that do not fit sampling ahead in a loop of ``steps`` steps."""
    if asynchronous and importance_sampling_cap is None:
        yield (
            "asynchronous",
            "responses are then one step old, and nothing corrects for it: set "
            "importance_sampling_cap, 2 is usual, or leave it out",
        )
    if asynchronous and steps == 1:
        yield (
            "asynchronous",
            "there is no second step to sample ahead: take more steps, or leave it out",
        )


def importance_conflicts(kind: str, cap: float | None) -> Iterator[Conflict]:
    """Yield settings of importance sampling that do not fit each other."""
    if cap is None and kind != "token_truncate":
        yield (
            "importance_sampling",
            "it needs a bound of the weights: set importance_sampling_cap, 2 is usual, or leave it "
            "out",
        )
    if cap is not None and cap <= 1 and kind.endswith("_mask"):
        yield (
            "importance_sampling_cap",
            f"{kind} leaves out what is above it, and the weight of a response that the trainer "
            "would sample as often is 1: raise it above 1, 2 is usual",
        )
