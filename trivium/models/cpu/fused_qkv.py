"""Fused QKV projection with in-place rotary embedding.

``transformers`` computes three products of one input and rotates queries and keys by a dozen small
operations, each with its own backward pass. Here all of it is one function, whose heads have their
coordinates in ``rotary.interleave_pairs`` order. Layers of ``KNOWN`` classes get it. All layers of
a backbone lose it if hidden states then differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trivium.models.cpu.linear import (
    Layer,
    joined,
    layer_gradients,
    linear,
    multiply,
    pairs,
    reordered,
)
from trivium.models.cpu.norms import is_rms_norm, rms_norm
from trivium.models.cpu.replace import original_forward, replace_forward, restore_forward
from trivium.models.cpu.rotary import RotaryEmbedding, interleave_pairs
from trivium.models.equivalence import (
    HALF_PRECISION_TOL,
    is_precise,
    probe_hidden_states,
    states_match,
)
from trivium.models.layout import AttentionSpec, Layout

KNOWN = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
"""Attention classes of ``transformers`` whose code was read. Others look like these on a few tokens
and rotate, clip or scale differently at far positions or for large numbers."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
HEAD_NORMS = ("q_norm", "k_norm")


def is_known(layer: nn.Module) -> bool:
    """Return whether an attention layer's class is one of ``KNOWN``."""
    kind = type(layer)
    return kind.__name__ in KNOWN and kind.__module__.startswith("transformers.models.")


def fuse_qkv(
    backbone: PreTrainedModel, specs: Mapping[int, AttentionSpec], expected_LD: Tensor
) -> None:
    """Replace the attention layers of ``backbone``, which shares prompts, by ``qkv_forward``.

    Args:
        specs, expected_LD: attention rules and hidden states of ``probe_hidden_states``.
    """
    layers = [layer for layer in backbone.modules() if is_known(layer)]
    for layer in layers:
        spec = specs[int(layer.layer_idx)]  # type: ignore[arg-type]
        replace_forward(layer, partial(qkv_forward, spec))
    if not layers:
        return
    _, found_LD, _ = probe_hidden_states(backbone)
    tolerance = 1e-3 if is_precise(found_LD) else HALF_PRECISION_TOL
    if not states_match(found_LD, expected_LD, tolerance):
        for layer in layers:
            restore_forward(layer)


def qkv_forward(
    spec: AttentionSpec,
    attention: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    *args: Any,
    layout: Layout | None = None,
    **kwargs: Any,
) -> Any:
    """Compute an attention layer; all cases that the fused function does not cover as before."""
    if layout is None or position_embeddings is None or not _is_plain(attention, hidden_states):
        return original_forward(
            attention, hidden_states, position_embeddings, *args, layout=layout, **kwargs
        )
    width: int = attention.head_dim
    rotation = RotaryEmbedding.of(*(x[0] for x in position_embeddings))
    norms = [getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)]
    parts = [getattr(attention, name) for name in PROJECTIONS]
    query, key, value = _FusedQKV.apply(
        hidden_states[0],
        None if norms else rotation,
        width,
        *(tensor for part in parts for tensor in (part.weight, part.bias)),
    )
    if norms:
        order = interleave_pairs(width)
        query, key = (
            _Rotated.apply(
                rms_norm(heads, norm.weight.index_select(0, order), norm.variance_epsilon), rotation
            )
            for norm, heads in zip(norms, (query, key), strict=True)
        )
    attended = layout.attend(attention.layer_idx, query, key, value, spec=spec)
    return attention.o_proj(attended.flatten(1))[None], None


def _is_plain(attention: nn.Module, hidden_states: Tensor) -> bool:
    """Return whether the fused function applies: adapters, for example, wrap projections."""
    norms = [getattr(attention, name) for name in HEAD_NORMS if hasattr(attention, name)]
    return (
        all(type(getattr(attention, name)) is nn.Linear for name in PROJECTIONS)
        and all(is_rms_norm(norm) for norm in norms)
        and hidden_states.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


class _FusedQKV(torch.autograd.Function):
    """Maps ``[L, D]`` to queries, keys and values ``[L, heads, width]``, the first two rotated."""

    @staticmethod
    def forward(
        ctx: Any, x_LD: Tensor, rotation: RotaryEmbedding | None, width: int, *layers: Tensor | None
    ) -> Any:
        ctx.save_for_backward(x_LD, *layers)
        heads = [len(weight) // width for weight, _ in pairs(layers)]
        ctx.rotation, ctx.order = rotation, interleave_pairs(width, heads[0] + heads[1], heads[2])
        heads_LHW = linear(x_LD, *_fused(layers, ctx.order)).view(len(x_LD), -1, width)
        if rotation is not None:
            rotation.rotate_(heads_LHW.narrow(1, 0, heads[0] + heads[1]))
        return heads_LHW.split(heads, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_LD, *layers = ctx.saved_tensors
        needs_x, _, _, *needed = ctx.needs_input_grad
        grad_LHW = torch.cat(grads, 1)
        if ctx.rotation is not None:
            rotated = grads[0].shape[1] + grads[1].shape[1]
            ctx.rotation.transposed().rotate_(grad_LHW.narrow(1, 0, rotated))
        grad_LE = grad_LHW.flatten(1)
        grad_x = multiply(grad_LE, _fused(layers, ctx.order)[0].t()) if needs_x else None
        return grad_x, None, None, *layer_gradients(grad_LE, x_LD, layers, needed, ctx.order)


def _fused(layers: Sequence[Tensor | None], order: Tensor) -> Layer:
    return reordered(joined(*pairs(layers)), order)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LHW: Tensor, rotation: RotaryEmbedding) -> Tensor:
        ctx.rotation = rotation
        return rotation(x_LHW)

    @staticmethod
    def backward(ctx: Any, grad_LHW: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.rotation.transposed()(grad_LHW), None
