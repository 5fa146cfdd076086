"""Norms and gated MLPs that keep less for the backward pass, and do less where less is read.

``transformers`` writes them as chains of small operations, of which autograd keeps every result.
Here each is one function that keeps what it cannot recompute cheaply; the numbers are the same but
for the last bits. A module is exchanged only after both ways were compared on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.models.cpu.linear import (
    Linear,
    add_product,
    layer_gradients,
    linear,
    multiply,
    pad_rows,
    pairs,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DENSE_THRESHOLD = 0.8
"""Where more than this share is read, all is computed: other shapes cost kernels of their own."""
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}

_read: ContextVar[Tensor | None] = ContextVar("read", default=None)
"""What the layout of the pass says is read of its results: from the last layer to its MLP."""


class RMSNorm(nn.Module):
    """``w · x / sqrt(mean(x²) + ε)`` (Zhang and Sennrich 2019), with ``x`` and its scale kept."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor, order_D: Tensor | None = None) -> Tensor:
        """Of states whose coordinates come in another order, which weights then follow."""
        weight_D = self.weight if order_D is None else self.weight.index_select(0, order_D)
        return _RMSNorm.apply(hidden_states, weight_D, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = inverse_rms(wide, wide.new_tensor(epsilon))
        ctx.save_for_backward(x, weight_D, scale)
        normed = wide * scale
        return normed.mul_(weight_D) if wide is x else weight_D * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight_D, scale = ctx.saved_tensors
        wide, grad, weight = (t.to(scale.dtype) for t in (x, grad, weight_D))
        # PyTorch's kernel of layer normalization, with a mean of zero, is one pass over its input;
        # it takes away what would flow through the mean, which is given back.
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, wide, weight.shape, torch.zeros_like(scale), scale, weight, None,
            [True, ctx.needs_input_grad[1], False],
        )  # fmt: skip
        of_x.add_((grad @ weight)[..., None].mul_(scale).div_(len(weight)))
        of_weight = of_weight.to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return of_x.to(x.dtype), of_weight, None


def inverse_rms(x: Tensor, epsilon: Tensor) -> Tensor:
    """``1 / sqrt(mean(x²) + ε)`` over the last dimension, which is kept."""
    length = torch.linalg.vector_norm(x, 2, -1, keepdim=True)
    return torch.addcmul(epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()


class GatedMLP(nn.Module):
    """``W_down (act(W_gate x) · W_up x)`` (Shazeer 2020), with the two inner products kept.

    That of the last layer leaves out rows that no one reads: zeros are in their place.
    """

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Callable[[Tensor], Tensor]
    last = False

    def forward(self, x: Tensor) -> Tensor:
        read = _read.get() if self.last else None
        if read is None or len(read) > DENSE_THRESHOLD * x.shape[1]:
            return self._of(x)
        rows = x.index_select(1, read)
        more = pad_rows(len(read), rows)
        filled = F.pad(rows, (0, 0, 0, more)) if more else rows
        return torch.zeros_like(x).index_copy(1, read, self._of(filled).narrow(1, 0, len(read)))

    def _of(self, x: Tensor) -> Tensor:
        parts = self.gate_proj, self.up_proj, self.down_proj
        plain = all(type(part) is Linear for part in parts)
        if plain and not torch.is_autocast_enabled(x.device.type):
            layers = (tensor for part in parts for tensor in (part.weight, part.bias))
            return _Gated.apply(x.flatten(0, -2), self.act_fn, *layers).view(x.shape)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Gated(torch.autograd.Function):
    """Recomputes the activation in the backward pass instead of keeping it and the product."""

    @staticmethod
    def forward(
        ctx: Any, x_LD: Tensor, activation: Callable[[Tensor], Tensor], *layers: Tensor | None
    ) -> Tensor:
        of_gate, of_up, of_down = pairs(layers)
        gate_LE, up_LE = linear(x_LD, *of_gate), linear(x_LD, *of_up)
        ctx.save_for_backward(x_LD, gate_LE, up_LE, *layers)
        ctx.activation = activation
        active_LE = activation(gate_LE)
        inner_LE = active_LE * up_LE if active_LE is gate_LE else active_LE.mul_(up_LE)
        return linear(inner_LE, *of_down)

    @staticmethod
    def backward(ctx: Any, grad_LD: Tensor) -> Any:
        x_LD, gate_LE, up_LE, *layers = ctx.saved_tensors
        of_x, _, *wanted = ctx.needs_input_grad
        with torch.enable_grad():
            gate_LE = gate_LE.detach().requires_grad_()
            active_LE = ctx.activation(gate_LE)
        inner_LE = active_LE.detach() * up_LE
        of_down = layer_gradients(grad_LD, inner_LE, layers[4:], wanted[4:])
        of_inner = multiply(grad_LD, layers[4].t())
        of_up_LE = torch.mul(active_LE.detach(), of_inner, out=inner_LE)
        (of_gate_LE,) = torch.autograd.grad(active_LE, gate_LE, of_inner.mul_(up_LE))
        del active_LE, of_inner
        of_gate = layer_gradients(of_gate_LE, x_LD, layers[:2], wanted[:2])
        of_up = layer_gradients(of_up_LE, x_LD, layers[2:4], wanted[2:4])
        grad_x = None
        if of_x:
            grad_x = add_product(multiply(of_gate_LE, layers[0].t()), of_up_LE, layers[2].t())
        return grad_x, None, *of_gate, *of_up, *of_down


def swap_norms_and_mlps(model: nn.Module, backbone: nn.Module) -> None:
    """Exchange the norms and gated MLPs of ``model`` that compute what these here do.

    The last of ``backbone`` computes what the pass's layout says is read (``layout.output_positions``).
    """
    for module in model.modules():
        if isinstance(module, RMSNorm | GatedMLP):
            continue
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            _exchange(module, RMSNorm)
        elif {name for name, _ in module.named_children()} == GATED:
            _exchange(module, GatedMLP)
    layer: nn.Module = [backbone, *getattr(backbone, "layers", ())][-1]
    mlp = getattr(layer, "mlp", None)
    if isinstance(mlp, GatedMLP) and not mlp.last:
        mlp.last = True
        # A hook, because gradient checkpointing calls the layer again when the pass is over.
        layer.register_forward_pre_hook(_note_read, with_kwargs=True)


def _note_read(layer: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
    layout = keywords.get("layout")
    _read.set(None if layout is None else layout.output_positions)


@torch.no_grad()
def _exchange(module: nn.Module, kind: type[nn.Module]) -> None:
    """Make ``module`` one of ``kind``, unless that computes something else."""
    weight = next(module.parameters(), None)
    if weight is None or weight.dtype not in DTYPES:
        return
    x = torch.linspace(-3, 3, 2 * weight.shape[-1]).to(weight).view(1, 2, -1)
    before, expected = type(module), module(x)
    module.__class__ = kind
    share = 1e3 * torch.finfo(weight.dtype).eps if weight.dtype.itemsize > 2 else 0.05
    if not torch.allclose(module(x), expected, share, share * float(expected.abs().max())):
        module.__class__ = before
