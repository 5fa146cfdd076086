"""What contradicts sampling a step ahead (``asynchronous``); the sampling is ``rollout_step``'s."""

from __future__ import annotations

from collections.abc import Iterator

from trivium.config.base import Conflict


def async_conflicts(
    asynchronous: bool, importance_sampling_cap: float | None, steps: int
) -> Iterator[Conflict]:
    """What cannot be where ``steps`` steps in a row are to be sampled ahead."""
    if asynchronous and importance_sampling_cap is None:
        yield (
            "asynchronous",
            "responses are one step old then, and nothing corrects for it: set importance_sampling_cap, "
            "2 is usual, or leave it out",
        )
    if asynchronous and steps == 1:
        yield (
            "asynchronous",
            "there is no second step to sample ahead: take more steps, or leave it out",
        )
