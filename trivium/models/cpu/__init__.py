"""The CPU's fast path, behind one call: ``accelerate_for_cpu``.

It replaces the ``forward`` of single modules and attaches ``CpuKernels`` to the backbone. Classes,
parameters and their names stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

import trivium.models.cpu.linear as linear
from trivium.data.batch import Batch
from trivium.models.cpu.decode import DecodeModel, decode_specs
from trivium.models.cpu.fused_qkv import fuse_qkv
from trivium.models.cpu.gated_mlp import limit_last_mlp, replace_gated_mlps
from trivium.models.cpu.linear import matmul_backend, replace_linears
from trivium.models.cpu.norms import replace_norms
from trivium.models.cpu.packed import Packed
from trivium.models.cpu.prefix_attention import Block, SharedAttention, plan, plan_rows
from trivium.models.equivalence import probe_hidden_states, uses_ragged_attention
from trivium.models.kernels import Attend, Kernels, attach_kernels, kernels_of
from trivium.models.layout import Forward
from trivium.models.loading import unwrap_peft
from trivium.models.numerics import register_choice

PIECES = frozenset(
    {
        "matmul",
        "pad_rows",
        "packed",
        "decode_model",
        "prefix_attention",
        "norms",
        "gated_mlp",
        "last_mlp",
        "fused_qkv",
    }
)
"""The parts of the fast path, each of which works without the others."""


@torch.no_grad()
def accelerate_for_cpu(model: PreTrainedModel, pieces: frozenset[str] = PIECES) -> None:
    """Install the fast path in ``model``, which is on a CPU, and in every copy of it.

    A model that has it stays as it is. ``pieces`` are for benchmarks and tests:

    - ``matmul``: the faster of two float32 products (``linear``). Without it the whole process
      uses PyTorch's, until ``matmul_backend.use`` is called.
    - ``pad_rows``: few different row counts in oneDNN's products (``linear.pad_rows``).
    - ``packed``: weights in the product's layout while sampling (``packed``).
    - ``decode_model``: the forward pass for sampling (``decode``).
    - ``prefix_attention``: attention without copies of prompts' keys (``prefix_attention``).
    - ``norms``, ``gated_mlp``: modules that keep less for the backward pass (``norms``,
      ``gated_mlp``).
    - ``last_mlp``: the last layer's MLP computes output positions only (``gated_mlp``).
    - ``fused_qkv``: one QKV product, rotated as complex numbers (``fused_qkv``); attention layers
      with norms of heads need ``norms`` too.
    """
    base = unwrap_peft(model)
    backbone: PreTrainedModel = base.base_model  # type: ignore[assignment]
    if isinstance(kernels_of(backbone), CpuKernels):
        return
    if not pieces <= PIECES:
        raise ValueError(f"{sorted(pieces - PIECES)} are no pieces: take some of {sorted(PIECES)}")
    register_choice("matmul_backend", lambda: matmul_backend.name, matmul_backend.use)
    shared = uses_ragged_attention(base) and "fused_qkv" in pieces
    probe = probe_hidden_states(backbone) if shared else None
    kernels = CpuKernels(pieces)
    if "matmul" in pieces:
        replace_linears(model)
    else:
        matmul_backend.use("torch")
    if "norms" in pieces:
        replace_norms(model)
    if "gated_mlp" in pieces:
        replace_gated_mlps(model)
    if "last_mlp" in pieces:
        limit_last_mlp(backbone, kernels.pad_rows)
    attach_kernels(backbone, kernels)
    if probe is not None:
        _, expected_LD, specs = probe
        fuse_qkv(backbone, specs, expected_LD)


@dataclass(frozen=True)
class CpuKernels(Kernels):
    """The replaced operations of the pieces that are installed."""

    pieces: frozenset[str]

    def multiply(self, a_LD: Tensor, b_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        return linear.multiply(a_LD, b_ED, bias_E)

    def pad_rows(self, rows: int, *tensors: Tensor) -> int:
        return linear.pad_rows(rows, *tensors) if "pad_rows" in self.pieces else 0

    def pack(self, weight_ED: Tensor, bias_E: Tensor | None) -> Callable[[Tensor], Tensor]:
        return Packed((weight_ED, bias_E), pack="packed" in self.pieces)

    def group_attention(self, batch: Batch, output_positions: Tensor | None) -> Attend | None:
        if "prefix_attention" not in self.pieces:
            return None
        return partial(_attend, plan(batch, output_positions))

    def row_attention(
        self, starts: Tensor, lengths: Tensor, output_positions: Tensor | None
    ) -> Attend | None:
        if "prefix_attention" not in self.pieces:
            return None
        return partial(_attend, plan_rows(starts, lengths, output_positions))

    def decoder(self, backbone: PreTrainedModel) -> Callable[[], Forward] | None:
        specs = decode_specs(backbone) if "decode_model" in self.pieces else None
        if specs is None:
            return None
        return partial(DecodeModel, backbone, specs, pack="packed" in self.pieces)


def _attend(
    blocks: list[Block], query_LHW: Tensor, key_LHW: Tensor, value_LHW: Tensor, scaling: float
) -> Tensor:
    return SharedAttention.apply(query_LHW, key_LHW, value_LHW, blocks, scaling)
