"""The CPU's fast path, behind one call: ``accelerate_for_cpu``.

Its pieces are weighed in ``docs/internals/benchmarks.md``: a forward pass for sampling
(``decode``), attention of groups in parts (``prefix_attention``), less work in the last layer
(``last_mlp``), norms that keep less for the backward pass (``norms``), and on some CPUs another
matrix product (``linear``). Classes, parameters and their names stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from trivium.data.batch import Batch
from trivium.hf.adapters import unwrap_peft
from trivium.models.cpu.decode import find_decoder
from trivium.models.cpu.last_mlp import limit_last_mlp
from trivium.models.cpu.linear import matmul_backend, multiply, outer, replace_linears
from trivium.models.cpu.norms import replace_norms
from trivium.models.cpu.prefix_attention import PrefixLayout
from trivium.models.fast_path import Kernels
from trivium.models.group_layout import GroupLayout
from trivium.models.layout import Forward
from trivium.numerics import register_choice


def register_cpu_choices() -> None:
    """Register the choices that decide the last bits of results."""
    register_choice("matmul_backend", lambda: matmul_backend.name, matmul_backend.use)


def accelerate_for_cpu(model: PreTrainedModel) -> Kernels:
    """Replace modules of ``model``, which is on a CPU; return its other kernels."""
    register_cpu_choices()
    replace_linears(model)
    replace_norms(model)
    base = unwrap_peft(model)
    limit_last_mlp(base.base_model)
    return CpuKernels(base.config.get_text_config().num_hidden_layers - 1)


@dataclass(frozen=True)
class CpuKernels(Kernels):
    """The replaced operations of a backbone whose last ``layer_idx`` is ``last_layer``."""

    last_layer: int

    def multiply(self, a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        return multiply(a_LD, b_ED, bias_E)

    def outer(self, a_LD: Tensor, b_LE: Tensor) -> Tensor:
        return outer(a_LD, b_LE)

    def layout(self, batch: Batch, output_positions: Tensor | None) -> GroupLayout:
        return PrefixLayout(batch, output_positions, self.last_layer)

    def decoder(self, backbone: PreTrainedModel) -> Callable[[], Forward] | None:
        return find_decoder(backbone)
