"""How far an optimizer step moves the weights, measured on a sample of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SAMPLE_PER_TENSOR = 1024
"""Weights that are read of each tensor, evenly spread."""


class WeightSample:
    """The weights of a sample before an optimizer step, and their gradients.

    Args:
        parameters: the weights that the optimizer updates: of mixed precision, the float32 copies.
    """

    @torch.no_grad()
    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.grad is not None]
        self.before = [_sampled(p) for p in self.parameters]
        self.has_gradient = [_sampled(p.grad) != 0 for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the metrics of the step that was taken meanwhile; none without a gradient.

        ``‖Δw‖`` and ``‖Δw‖/‖w‖`` are estimates: each tensor counts with the mean square of its
        sample. ``changed_share`` is over the weights whose gradient is not zero.
        """
        moved = size = changed = trained = 0.0
        for parameter, before, has_gradient in zip(
            self.parameters, self.before, self.has_gradient, strict=True
        ):
            change = _sampled(parameter) - before
            count = parameter.numel()
            moved += count * float(change.square().mean())
            size += count * float(before.square().mean())
            changed += count * float(((change != 0) & has_gradient).float().mean())
            trained += count * float(has_gradient.float().mean())
        if trained == 0:
            return {}
        return {
            "weights/changed_share": changed / trained,
            "weights/update_norm": moved**0.5,
            "weights/relative_update": (moved / size) ** 0.5 if size else 0.0,
        }


def _sampled(x: Tensor) -> Tensor:
    """Return a sample of a tensor's numbers, in float32 or wider."""
    step = -(-x.numel() // SAMPLE_PER_TENSOR)
    sample = x.reshape(-1)[::step]
    return sample.to(torch.promote_types(sample.dtype, torch.float32), copy=True)
