"""Gated MLPs that keep less for the backward pass, and compute fewer tokens in the last layer.

A module is replaced only after both computations were compared on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.models.cpu.linear import (
    add_product,
    layer_gradients,
    linear,
    multiply,
    pairs,
)
from trivium.models.cpu.norms import computes
from trivium.models.cpu.replace import original_forward, replace_forward

DENSE_THRESHOLD = 0.8
"""If a larger share of the tokens is output, compute all: other shapes need their own kernels."""
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}

_output_positions: ContextVar[Tensor | None] = ContextVar("output_positions", default=None)
"""The layout's ``output_positions`` in this forward pass, for the last layer's MLP."""

PadRows = Callable[..., int]


def gated_forward(mlp: Any, x: Tensor) -> Tensor:
    """``W_down (act(W_gate x) · W_up x)`` (Shazeer 2020), keeping the two inner products."""
    parts = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    plain = all(type(part) is nn.Linear for part in parts)
    if plain and not torch.is_autocast_enabled(x.device.type):
        layers = (tensor for part in parts for tensor in (part.weight, part.bias))
        return _Gated.apply(x.flatten(0, -2), mlp.act_fn, *layers).view(x.shape)
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


class _Gated(torch.autograd.Function):
    """Recomputes the activation in the backward pass instead of keeping it and the product."""

    @staticmethod
    def forward(
        ctx: Any, x_LD: Tensor, activation: Callable[[Tensor], Tensor], *layers: Tensor | None
    ) -> Tensor:
        gate, up, down = pairs(layers)
        gate_LE, up_LE = linear(x_LD, *gate), linear(x_LD, *up)
        ctx.save_for_backward(x_LD, gate_LE, up_LE, *layers)
        ctx.activation = activation
        active_LE = activation(gate_LE)
        inner_LE = active_LE * up_LE if active_LE is gate_LE else active_LE.mul_(up_LE)
        return linear(inner_LE, *down)

    @staticmethod
    def backward(ctx: Any, grad_LD: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_LD, gate_LE, up_LE, *layers = ctx.saved_tensors
        needs_x, _, *needed = ctx.needs_input_grad
        with torch.enable_grad():
            gate_LE = gate_LE.detach().requires_grad_()
            active_LE = ctx.activation(gate_LE)
        inner_LE = active_LE.detach() * up_LE
        grad_down = layer_gradients(grad_LD, inner_LE, layers[4:], needed[4:])
        grad_inner = multiply(grad_LD, layers[4].t())
        grad_up_LE = torch.mul(active_LE.detach(), grad_inner, out=inner_LE)
        (grad_gate_LE,) = torch.autograd.grad(active_LE, gate_LE, grad_inner.mul_(up_LE))
        del active_LE, grad_inner
        grad_gate = layer_gradients(grad_gate_LE, x_LD, layers[:2], needed[:2])
        grad_up = layer_gradients(grad_up_LE, x_LD, layers[2:4], needed[2:4])
        grad_x = None
        if needs_x:
            grad_x = add_product(multiply(grad_gate_LE, layers[0].t()), grad_up_LE, layers[2].t())
        return grad_x, None, *grad_gate, *grad_up, *grad_down


def is_gated(module: nn.Module) -> bool:
    """Return whether a module is a gated MLP that computes the same as ``gated_forward``."""
    names = {name for name, _ in module.named_children()}
    return names == GATED and computes(module, gated_forward)


def replace_gated_mlps(model: nn.Module) -> None:
    """Replace every gated MLP of ``model``."""
    for module in model.modules():
        if is_gated(module):
            replace_forward(module, gated_forward)


def limit_last_mlp(backbone: nn.Module, pad_rows: PadRows) -> None:
    """Make the last layer's gated MLP compute the layout's ``output_positions`` only."""
    layer: nn.Module = [backbone, *getattr(backbone, "layers", ())][-1]
    mlp = getattr(layer, "mlp", None)
    if mlp is not None and is_gated(mlp):
        replaced = vars(mlp).get("forward")
        forward = original_forward if replaced is None else replaced.__func__
        replace_forward(mlp, partial(_forward_output_positions, forward, pad_rows))
        # A hook, because gradient checkpointing calls the layer again after the forward pass.
        layer.register_forward_pre_hook(_note_output_positions, with_kwargs=True)


def _forward_output_positions(
    forward: Callable[..., Tensor], pad_rows: PadRows, mlp: nn.Module, x: Tensor
) -> Tensor:
    """Compute the output positions, with zeros at all others."""
    at = _output_positions.get()
    if at is None or len(at) > DENSE_THRESHOLD * x.shape[1]:
        return forward(mlp, x)
    rows = x.index_select(1, at)
    more = pad_rows(len(at), rows)
    padded = F.pad(rows, (0, 0, 0, more)) if more else rows
    return torch.zeros_like(x).index_copy(1, at, forward(mlp, padded).narrow(1, 0, len(at)))


def _note_output_positions(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    layout = kwargs.get("layout")
    _output_positions.set(None if layout is None else layout.output_positions)
