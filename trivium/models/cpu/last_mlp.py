"""The last layer's MLP, for the positions that are used.

Log-probs are read where a response token is predicted, and a reward at a response's last token. The
MLP of the last layer computes nothing else: for long prompts and few layers a tenth of a step.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from trivium.models.cpu.decode import GATED, is_known
from trivium.models.cpu.replace import is_replaced, replace_forward

DENSE_THRESHOLD = 0.8
"""If a larger share of the tokens is used, computing all of them is faster."""

_output_positions: ContextVar[Tensor | None] = ContextVar("output_positions", default=None)
"""The layout's ``output_positions`` in this forward pass."""


def limit_last_mlp(backbone: nn.Module) -> None:
    """Make the last layer's MLP compute the layout's ``output_positions`` only."""
    layer: Any = [None, *getattr(backbone, "layers", ())][-1]
    attention, mlp = (getattr(layer, name, None) for name in ("self_attn", "mlp"))
    if attention is None or mlp is None or not is_known(attention):
        return
    gated = {name for name, _ in mlp.named_children()} == GATED
    if gated and not is_replaced(mlp, _forward_output_positions):
        replace_forward(mlp, _forward_output_positions)
        # A hook, because gradient checkpointing calls the layer again after the forward pass.
        layer.register_forward_pre_hook(_note_output_positions, with_kwargs=True)


def _forward_output_positions(mlp: nn.Module, x_1LD: Tensor) -> Tensor:
    """Compute the output positions, with zeros at all others."""
    at, forward = _output_positions.get(), type(mlp).forward
    if at is None or len(at) > DENSE_THRESHOLD * x_1LD.shape[1]:
        return forward(mlp, x_1LD)
    used = forward(mlp, x_1LD.index_select(1, at))
    return torch.zeros_like(x_1LD).index_copy(1, at, used)


def _note_output_positions(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _output_positions.set(getattr(kwargs.get("layout"), "output_positions", None))
