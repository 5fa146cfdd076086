"""Root-mean-square normalization that keeps only its input and scale for the backward pass.

``transformers`` writes it as a chain of small operations, and autograd keeps the result of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trivium.models.cpu.replace import replace_forward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """``w · x / sqrt(mean(x²) + ε)`` (Zhang and Sennrich 2019)."""
    return _RMSNorm.apply(x, weight_D, epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, 2, -1, keepdim=True)
        scale = torch.addcmul(
            wide.new_tensor(epsilon), length, length, value=1 / x.shape[-1]
        ).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        normed = wide * scale
        return normed.mul_(weight_D) if wide is x else weight_D * normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_D, scale = ctx.saved_tensors
        wide, grad, weight = (t.to(scale.dtype) for t in (x, grad, weight_D))
        # PyTorch's backward kernel of layer normalization, with a mean of zero, is one pass over
        # its input. It subtracts the gradient that would flow through the mean: add it again.
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, wide, weight.shape, torch.zeros_like(scale), scale, weight, None,
            [True, ctx.needs_input_grad[1], False],
        )  # fmt: skip
        grad_x.add_((grad @ weight)[..., None].mul_(scale).div_(len(weight)))
        grad_weight = grad_weight.to(weight_D.dtype) if ctx.needs_input_grad[1] else None
        return grad_x.to(x.dtype), grad_weight, None


def norm_forward(norm: Any, hidden_states: Tensor) -> Tensor:
    """Compute a ``transformers`` RMSNorm module by ``rms_norm``."""
    return rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


def replace_norms(model: nn.Module) -> None:
    """Replace every RMSNorm of ``model`` that computes the same as ``rms_norm``."""
    for module in model.modules():
        is_norm = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
        if is_norm and _computes_rms_norm(module):
            replace_forward(module, norm_forward)


@torch.no_grad()
def _computes_rms_norm(module: Any) -> bool:
    """Return whether a module equals ``rms_norm`` on two rows."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.dtype not in DTYPES:
        return False
    x = torch.linspace(-3, 3, 2 * weight.shape[-1]).to(weight).view(1, 2, -1)
    expected, found = type(module).forward(module, x), norm_forward(module, x)
    share = 1e3 * torch.finfo(weight.dtype).eps if weight.dtype.itemsize > 2 else 0.05
    return torch.allclose(found, expected, share, share * float(expected.abs().max()))
