"""Settings that do not fit asynchronous sampling, which ``rollout_step`` starts."""

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
