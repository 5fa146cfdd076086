"""Linear layers by the fastest matrix product of this CPU.

PyTorch's own product of float32 matrices uses half the width of some CPUs' vector units; oneDNN,
which comes with PyTorch, uses all of it. Which one is faster is measured once per process
(``MatmulBackend``). Both compute in float32. All other devices and types use PyTorch's product.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
them: oneDNN compiles and keeps a kernel for every row count that it meets."""
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


def pad_rows(rows: int, *tensors: Tensor) -> int:
    """Return how many rows to append so that products meet few different row counts.

    PyTorch multiplies bfloat16 by oneDNN, which keeps kernels of those products too.
    """
    half = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
    kept = rows >= MIN_ROWS if half else matmul_backend.supports(rows, *tensors)
    return -rows % row_multiple(rows) if kept else 0


def row_multiple(rows: int) -> int:
    """Return the number that ``rows`` is padded to a multiple of."""
    return max(ROUND, 1 << max(0, rows.bit_length() - 6))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``; differs from ``torch.nn.functional.linear`` in the last bits only."""
    rows = x.numel() // max(1, x.shape[-1])
    if not matmul_backend.supports(rows, x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], len(weight))


def multiply(a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` of matrices, for backward passes: no gradient flows."""
    if matmul_backend.supports(min(len(a_LD), len(b_ED)), a_LD, b_ED):
        return onednn_linear(a_LD, b_ED, bias_E)
    return F.linear(a_LD, b_ED, bias_E)


def add_product(total_LE: Tensor, a_LD: Tensor, b_ED: Tensor) -> Tensor:
    """``total += a bᵀ``, for backward passes."""
    if matmul_backend.supports(min(len(a_LD), len(b_ED)), a_LD, b_ED):
        return total_LE.add_(onednn_linear(a_LD, b_ED))
    return total_LE.addmm_(a_LD, b_ED.t())


def outer(a_LD: Tensor, b_LE: Tensor) -> Tensor:
    """``aᵀ b``, for backward passes."""
    if not matmul_backend.supports(len(a_LD), a_LD, b_LE):
        return a_LD.t() @ b_LE
    # oneDNN copies its second argument: pass the narrower matrix there.
    if a_LD.shape[1] <= b_LE.shape[1]:
        return onednn_linear(a_LD.t(), b_LE.t())
    return onednn_linear(b_LE.t(), a_LD.t()).t()


Layer = tuple[Tensor, Tensor | None]
"""The weight and the bias of a linear layer."""


def pairs(tensors: Sequence[Tensor | None]) -> list[Layer]:
    """Return layers from their alternating weights and biases."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))  # type: ignore[arg-type]


def joined(*layers: Layer) -> Layer:
    """Return layers with a common input as one layer with concatenated outputs."""
    if len(layers) == 1:
        return layers[0]
    weights = [w for w, _ in layers]
    if all(b is None for _, b in layers):
        return torch.cat(weights), None
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in layers]
    return torch.cat(weights), torch.cat(biases)


def reordered(layer: Layer, order_E: Tensor) -> Layer:
    """Return a layer with reordered outputs: ``y[order]`` for ``y``."""
    weight, bias = layer
    return weight.index_select(0, order_E), None if bias is None else bias.index_select(0, order_E)


def layer_gradients(
    grad_LE: Tensor,
    x_LD: Tensor,
    layers: Sequence[Tensor | None],
    needed: Sequence[bool],
    order_E: Tensor | None = None,
) -> list[Tensor | None]:
    """Return gradients of the alternating weights and biases of joined (and reordered) layers."""

    def parts(joint: Tensor) -> tuple[Tensor, ...]:
        if order_E is not None:
            joint = torch.empty_like(joint).index_copy_(0, order_E, joint)
        return joint.split([len(weight) for weight, _ in pairs(layers)])

    gradients: list[Tensor | None] = [None] * len(layers)
    if any(needed[::2]):
        gradients[::2] = parts(outer(grad_LE, x_LD))
    if any(needed[1::2]):
        # A product with ones is faster than a sum over the longer dimension.
        gradients[1::2] = parts(grad_LE.new_ones(len(grad_LE)) @ grad_LE)
    return [x if is_needed else None for x, is_needed in zip(gradients, needed, strict=True)]


def linear_forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """Compute a ``torch.nn.Linear`` by ``linear``."""
    return linear(input, layer.weight, layer.bias)


def replace_linears(model: nn.Module) -> None:
    """Make all plain linear layers of a model use the fastest product."""
    for module in model.modules():
        if type(module) is nn.Linear:
            replace_forward(module, linear_forward)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_LD, weight_ED)
        return onednn_linear(x_LD, weight_ED, bias_E)

    @staticmethod
    def backward(ctx: Any, grad_LE: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_LD, weight_ED = ctx.saved_tensors
        needs_x, *needs_layer = ctx.needs_input_grad
        grad_x = onednn_linear(grad_LE, weight_ED.t()) if needs_x else None
        return grad_x, *layer_gradients(grad_LE, x_LD, (weight_ED, None), needs_layer)


def onednn_linear(a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` by oneDNN; ``b`` may be a weight in oneDNN's layout."""
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
