"""Linear layers through the fastest matrix product that this CPU has.

PyTorch's own product of float32 matrices uses half the width of some CPUs' vector units; oneDNN,
which comes with PyTorch, uses all of it. Which one is faster is measured once per process
(``MatmulBackend``). Both are float32 throughout, and every other device or type is left to PyTorch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIN_ROWS = 128
"""Below this many rows, bringing the weights into oneDNN's order costs more than it gains."""
PACKED_FOR = 128
"""The number of rows that weights are packed for; any other number is served, too."""
ROUND = 16
"""Numbers of rows are filled up to a multiple of this, or of a power of two that is between a 64th
and a 32nd of them: oneDNN makes and keeps a kernel for every number that it meets."""
MIN_FLOPS = 1 << 19
"""Products of fewer multiplications are faster as PyTorch does them."""
PROBE, NUM_PROBES, MIN_SPEEDUP = 256, 40, 1.5
"""The measured product's size, how often it is measured, and what oneDNN must gain to be used."""

Backend = Literal["torch", "onednn"]


class MatmulBackend:
    """Which implementation multiplies float32 matrices on the CPU in this process."""

    def __init__(self) -> None:
        self._name: Backend | None = None

    @property
    def name(self) -> Backend:
        if self._name is None:
            self._name = _faster()
        return self._name

    def use(self, name: Backend) -> None:
        """Use this one from now on, as where a run goes on that began with it."""
        self._name = name

    def supports(self, rows: int, *tensors: Tensor) -> bool:
        """Whether oneDNN is to multiply these."""
        plain = all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
        return plain and rows >= MIN_ROWS and self.name == "onednn"


matmul_backend = MatmulBackend()


def pad_rows(rows: int, *tensors: Tensor) -> int:
    """How many rows to add to so many, where these are multiplied and kernels are kept.

    PyTorch itself leaves products in bfloat16 to oneDNN, which keeps kernels of those, too.
    """
    half = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
    kept = rows >= MIN_ROWS if half else matmul_backend.supports(rows, *tensors)
    return -rows % _step(rows) if kept else 0


def _step(rows: int) -> int:
    return max(ROUND, 1 << max(0, rows.bit_length() - 6))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b`` as ``torch.nn.functional.linear`` computes it, but for the last bits."""
    rows = x.numel() // max(1, x.shape[-1])
    if not matmul_backend.supports(rows, x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], len(weight))


def multiply(a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """``a bᵀ + bias`` of matrices, for use inside a backward pass: no gradient flows."""
    if matmul_backend.supports(min(len(a_LD), len(b_ED)), a_LD, b_ED):
        return _onednn(a_LD, b_ED, bias_E)
    return F.linear(a_LD, b_ED, bias_E)


def add_product(total_LE: Tensor, a_LD: Tensor, b_ED: Tensor) -> Tensor:
    """``total += a bᵀ`` inside a backward pass."""
    if matmul_backend.supports(min(len(a_LD), len(b_ED)), a_LD, b_ED):
        return total_LE.add_(_onednn(a_LD, b_ED))
    return total_LE.addmm_(a_LD, b_ED.t())


def outer(a_LD: Tensor, b_LE: Tensor) -> Tensor:
    """``aᵀ b`` for use inside a backward pass: no gradient flows."""
    if not matmul_backend.supports(len(a_LD), a_LD, b_LE):
        return a_LD.t() @ b_LE
    # Of the two the narrower is the one that oneDNN copies.
    if a_LD.shape[1] <= b_LE.shape[1]:
        return _onednn(a_LD.t(), b_LE.t())
    return _onednn(b_LE.t(), a_LD.t()).t()


Layer = tuple[Tensor, Tensor | None]
"""The weight and the bias of a linear layer."""


def pairs(tensors: Sequence[Tensor | None]) -> list[Layer]:
    """Layers from their weights and biases in turn."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))  # type: ignore[arg-type]


def joined(*layers: Layer) -> Layer:
    """Layers of one input as one: an output behind the other."""
    if len(layers) == 1:
        return layers[0]
    weights = [w for w, _ in layers]
    if all(b is None for _, b in layers):
        return torch.cat(weights), None
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in layers]
    return torch.cat(weights), torch.cat(biases)


def reordered(layer: Layer, order_E: Tensor) -> Layer:
    """A layer whose outputs come in another order: ``y[order]`` for ``y``."""
    weight, bias = layer
    return weight.index_select(0, order_E), None if bias is None else bias.index_select(0, order_E)


def layer_gradients(
    grad_LE: Tensor,
    x_LD: Tensor,
    layers: Sequence[Tensor | None],
    wanted: Sequence[bool],
    order_E: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of the weights and biases, in turn, of layers that were joined (and reordered)."""

    def parts(joint: Tensor) -> tuple[Tensor, ...]:
        if order_E is not None:
            joint = torch.empty_like(joint).index_copy_(0, order_E, joint)
        return joint.split([len(weight) for weight, _ in pairs(layers)])

    found: list[Tensor | None] = [None] * len(layers)
    if any(wanted[::2]):
        found[::2] = parts(outer(grad_LE, x_LD))
    if any(wanted[1::2]):
        # A product with ones is faster than a sum over the longer dimension.
        found[1::2] = parts(grad_LE.new_ones(len(grad_LE)) @ grad_LE)
    return [gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)]


class Linear(nn.Linear):
    """``torch.nn.Linear`` with the product above."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def use_fast_linears(model: nn.Module) -> None:
    """Let all plain linear layers of a model use the fastest product."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _can_be_packed(*weights: Tensor) -> bool:
    if all(w.dtype == torch.bfloat16 and w.device.type == "cpu" for w in weights):
        return matmul_backend.name == "onednn" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return matmul_backend.supports(PACKED_FOR, *weights)


def _can_be_turned(*weights: Tensor) -> bool:
    """Whether PyTorch's own product of few rows is faster where weights lie column by column."""
    plain = (torch.float32, torch.float64)
    return all(w.dtype in plain and w.device.type == "cpu" for w in weights)


class Packed:
    """Linear layers of one input, as one product with weights in the order that it wants.

    Holds a copy of the weights as they are now, or the layers themselves where packing gains
    nothing. No gradient flows.
    """

    def __init__(self, *layers: Layer) -> None:
        self.layers = [(w.detach(), None if b is None else b.detach()) for w, b in layers]
        self.size = sum(w.numel() for w, _ in layers)
        self.weights = self.bias = self.turned_DE = None
        weights = [w for w, _ in self.layers]
        if _can_be_packed(*weights):
            weight, self.bias = joined(*self.layers)
            self.weights = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
        elif _can_be_turned(*weights):
            weight, self.bias = joined(*self.layers)
            self.turned_DE = weight.t().contiguous()

    @classmethod
    def of(cls, *layers: nn.Linear) -> Packed:
        return cls(*((layer.weight, layer.bias) for layer in layers))

    def __call__(self, x_LD: Tensor) -> Tensor:
        if self.turned_DE is not None:
            if self.bias is None:
                return x_LD @ self.turned_DE
            return torch.addmm(self.bias, x_LD, self.turned_DE)
        rows = len(x_LD)
        if self.weights is not None and rows * self.size >= MIN_FLOPS:
            if more := -rows % _step(rows):
                x_LD = F.pad(x_LD, (0, 0, 0, more))
            return _onednn(x_LD, self.weights, self.bias)[:rows]
        outputs = [F.linear(x_LD, weight, bias) for weight, bias in self.layers]
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_LD, weight_ED)
        return _onednn(x_LD, weight_ED, bias_E)

    @staticmethod
    def backward(ctx: Any, grad_LE: Tensor) -> Any:
        x_LD, weight_ED = ctx.saved_tensors
        of_x, *of_layer = ctx.needs_input_grad
        grad_x = _onednn(grad_LE, weight_ED.t()) if of_x else None
        return grad_x, *layer_gradients(grad_LE, x_LD, (weight_ED, None), of_layer)


def _onednn(a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a_LD, b_ED, bias_E, "none", [], "")


def _faster() -> Backend:
    if not torch.backends.mkldnn.is_available():
        return "torch"
    with torch.no_grad():
        a, b = torch.ones(2 * PROBE, PROBE), torch.ones(PROBE, PROBE)
        torchs, onednns = _seconds(lambda: F.linear(a, b), lambda: _onednn(a, b))
    return "onednn" if torchs > MIN_SPEEDUP * onednns else "torch"


def _seconds(*works: Callable[[], object]) -> list[float]:
    """The least time that each of these took, done in turn: what disturbs one disturbs all."""
    least = [math.inf] * len(works)
    for _ in range(NUM_PROBES):
        for i, work in enumerate(works):
            start = time.perf_counter()
            work()
            least[i] = min(least[i], time.perf_counter() - start)
    return least
