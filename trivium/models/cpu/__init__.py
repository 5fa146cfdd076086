"""The CPU's fast path, behind one call: ``accelerate_for_cpu``.

It has two pieces, which ``docs/performance.md`` weighs: a forward pass for sampling (``decode``),
and on some CPUs another matrix product (``linear``). Classes, parameters and their names stay as
they were.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from trivium.models.cpu.decode import find_decoder
from trivium.models.cpu.linear import matmul_backend, multiply, outer, replace_linears
from trivium.models.fast_path import Kernels
from trivium.models.layout import Forward
from trivium.numerics import register_choice


def accelerate_for_cpu(model: PreTrainedModel) -> Kernels:
    """Replace the linear layers of ``model``, which is on a CPU; return its other kernels."""
    register_choice("matmul_backend", lambda: matmul_backend.name, matmul_backend.use)
    replace_linears(model)
    return CpuKernels()


class CpuKernels(Kernels):
    """The replaced operations."""

    def multiply(self, a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        return multiply(a_LD, b_ED, bias_E)

    def outer(self, a_LD: Tensor, b_LE: Tensor) -> Tensor:
        return outer(a_LD, b_LE)

    def decoder(self, backbone: PreTrainedModel) -> Callable[[], Forward] | None:
        return find_decoder(backbone)
