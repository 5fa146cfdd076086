"""Linear layers by the fastest matrix product of this CPU.

PyTorch's own product of float32 matrices uses half the width of some CPUs' vector units; oneDNN,
which comes with PyTorch, uses all of it. Which one is faster is measured once per process
(``MatmulBackend``). Both compute in float32. All other types use PyTorch's product.

oneDNN compiles and keeps a kernel for every shape that it meets, so matrices get rows of zeros
until their row count is one of few.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from trivium.models.cpu.replace import replace_forward

MIN_ROWS = 128
"""With fewer rows, converting the weights to oneDNN's layout costs more than it gains."""
ROUND = 16
"""Row counts are padded to a multiple of this, or of a power of two between a 64th and a 32nd of
them."""
PROBE, NUM_PROBES, MIN_SPEEDUP = 256, 40, 1.5
"""Size of the measured product, number of measurements, and the speedup required of oneDNN."""

Backend = Literal["torch", "onednn"]


class MatmulBackend:
    """The implementation that multiplies float32 matrices on the CPU in this process."""

    def __init__(self) -> None:
        self._name: Backend | None = None

    @property
    def name(self) -> Backend:
        if self._name is None:
            self._name = _faster()
        return self._name

    def use(self, name: Backend) -> None:
        """Use this implementation from now on, as when a run resumes."""
        self._name = name

    def supports(self, rows: int, *tensors: Tensor) -> bool:
        """Return whether oneDNN multiplies these tensors."""
        plain = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        return plain and rows >= MIN_ROWS and self.name == "onednn"


matmul_backend = MatmulBackend()


def replace_linears(model: nn.Module) -> None:
    """Make all plain linear layers of a model use the fastest product."""
    for module in model.modules():
        if type(module) is nn.Linear:
            replace_forward(module, linear_forward)


def linear_forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """Compute a ``torch.nn.Linear`` by ``linear``."""
    return linear(input, layer.weight, layer.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``; differs from ``torch.nn.functional.linear`` in the last bits only."""
    rows = x.numel() // max(1, x.shape[-1])
    if not matmul_backend.supports(rows, x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_LD, weight_ED)
        return multiply(x_LD, weight_ED, bias_E)

    @staticmethod
    def backward(ctx: Any, grad_LE: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_LD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            multiply(grad_LE, weight_ED.t()) if needs_x else None,
            outer(grad_LE, x_LD) if needs_weight else None,
            grad_LE.sum(0) if needs_bias else None,
        )


def multiply(a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` of matrices; no gradient flows."""
    if not matmul_backend.supports(min(len(a_LD), len(b_ED)), a_LD, b_ED):
        return F.linear(a_LD, b_ED, bias_E)
    return onednn_linear(pad_rows(a_LD), b_ED, bias_E)[: len(a_LD)]


def outer(a_LD: Tensor, b_LE: Tensor) -> Tensor:
    """``aᵀ b`` of matrices; no gradient flows."""
    if not matmul_backend.supports(len(a_LD), a_LD, b_LE):
        return a_LD.t() @ b_LE
    a_LD, b_LE = pad_rows(a_LD), pad_rows(b_LE)
    # oneDNN copies its second argument: pass the narrower matrix there.
    if a_LD.shape[1] <= b_LE.shape[1]:
        return onednn_linear(a_LD.t(), b_LE.t())
    return onednn_linear(b_LE.t(), a_LD.t()).t()


def pad_rows(x_LD: Tensor) -> Tensor:
    """Append rows of zeros so that products meet few different row counts."""
    rows = len(x_LD)
    multiple = max(ROUND, 1 << max(0, rows.bit_length() - 6))
    more = -rows % multiple
    return F.pad(x_LD, (0, 0, 0, more)) if more else x_LD


def onednn_linear(a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(a_LD, b_ED, bias_E, "none", [], "")


def _faster() -> Backend:
    if not torch.backends.mkldnn.is_available():
        return "torch"
    # A dry run on tensors without data may be active: measure real ones.
    with torch.no_grad(), _disable_current_modes():
        a, b = torch.ones(2 * PROBE, PROBE), torch.ones(PROBE, PROBE)
        torch_s, onednn_s = _seconds(lambda: F.linear(a, b), lambda: onednn_linear(a, b))
    return "onednn" if torch_s > MIN_SPEEDUP * onednn_s else "torch"


def _seconds(*functions: Callable[[], object]) -> list[float]:
    """Return the least time of each function; alternating calls share any disturbance."""
    least = [math.inf] * len(functions)
    for _ in range(NUM_PROBES):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            least[i] = min(least[i], time.perf_counter() - start)
    return least
