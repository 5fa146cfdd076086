"""Linear layers for decoding, with weights in the layout that the product wants."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.models.cpu.linear import Layer, joined, matmul_backend, onednn_linear, row_multiple

PACKED_FOR = 128
"""The row count that weights are packed for; any other count works too."""
MIN_FLOPS = 1 << 19
"""Products with fewer multiplications are faster by PyTorch."""


class Packed:
    """Linear layers of one input, as one product.

    Holds a copy of the current weights, or refers to the layers where packing gains nothing. No
    gradient flows.

    Args:
        layers: the layers; their outputs are concatenated.
        pack: whether to change the layout of the weights.
    """

    def __init__(self, *layers: Layer, pack: bool = True) -> None:
        self.layers = [(w.detach(), None if b is None else b.detach()) for w, b in layers]
        self.size = sum(w.numel() for w, _ in layers)
        self.packed_weight = self.transposed_DE = self.bias = None
        weights = [w for w, _ in self.layers]
        if pack and _onednn_packs(*weights):
            weight, self.bias = joined(*self.layers)
            self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
        elif pack and _transpose_helps(*weights):
            weight, self.bias = joined(*self.layers)
            self.transposed_DE = weight.t().contiguous()

    @classmethod
    def of(cls, *layers: nn.Linear, pack: bool = True) -> Packed:
        return cls(*((layer.weight, layer.bias) for layer in layers), pack=pack)

    def __call__(self, x_LD: Tensor) -> Tensor:
        if self.transposed_DE is not None:
            if self.bias is None:
                return x_LD @ self.transposed_DE
            return torch.addmm(self.bias, x_LD, self.transposed_DE)
        rows = len(x_LD)
        if self.packed_weight is not None and rows * self.size >= MIN_FLOPS:
            if more := -rows % row_multiple(rows):
                x_LD = F.pad(x_LD, (0, 0, 0, more))
            return onednn_linear(x_LD, self.packed_weight, self.bias)[:rows]
        outputs = [F.linear(x_LD, weight, bias) for weight, bias in self.layers]
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]


def _onednn_packs(*weights: Tensor) -> bool:
    if all(w.dtype == torch.bfloat16 and w.device.type == "cpu" for w in weights):
        return matmul_backend.name == "onednn" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return matmul_backend.supports(PACKED_FOR, *weights)


def _transpose_helps(*weights: Tensor) -> bool:
    """Return whether PyTorch's product of few rows is faster with column-major weights."""
    plain = (torch.float32, torch.float64)
    return all(w.dtype in plain and w.device.type == "cpu" for w in weights)
