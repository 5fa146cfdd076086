"""Queries, keys and values of an attention layer as one product, turned where they lie.

``transformers`` computes three products of one input, and turns queries and keys in a dozen small
operations of which each has its own in the backward pass. Here it is one function, in which their
coordinates are ``rotary.interleave_pairs``. A layer of a
class that is ``KNOWN`` gets it, and all of a backbone lose it if hidden states then differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trivium.models.attention import AttentionSpec, Layout
from trivium.models.cpu.layers import RMSNorm
from trivium.models.cpu.linear import (
    Layer,
    Linear,
    joined,
    layer_gradients,
    linear,
    multiply,
    pairs,
    reordered,
)
from trivium.models.cpu.rotary import RotaryEmbedding, interleave_pairs
from trivium.models.equivalence import (
    HALF_PRECISION_TOL,
    is_precise,
    probe_hidden_states,
    states_match,
)

KNOWN = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
"""Classes of ``transformers`` that were read: others look like these on a few tokens, and turn,
clip or scale differently far from the start or for large numbers."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
HEAD_NORMS = ("q_norm", "k_norm")


def is_known(layer: nn.Module) -> bool:
    """Whether this attention layer is of a class that was read."""
    kind = _kind(layer)
    return kind.__name__ in KNOWN and kind.__module__.startswith("transformers.models.")


def use_joined_heads(backbone: PreTrainedModel) -> None:
    """Let attention layers of ``backbone``, whose attention is ragged, compute heads together."""
    layers = [layer for layer in backbone.modules() if is_known(layer)]
    if not layers or isinstance(layers[0], JoinedHeads):
        return
    kinds = [type(layer) for layer in layers]
    with torch.no_grad():
        _, expected, specs = probe_hidden_states(backbone)
        for layer, kind in zip(layers, kinds, strict=True):
            layer.spec = specs[int(layer.layer_idx)]  # type: ignore[assignment,arg-type]
            layer.__class__ = type(kind.__name__, (JoinedHeads, kind), {})
        _, found, _ = probe_hidden_states(backbone)
    if not states_match(found, expected, 1e-3 if is_precise(found) else HALF_PRECISION_TOL):
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind


def _kind(layer: nn.Module) -> type[nn.Module]:
    """The class of ``transformers`` that a layer is of."""
    return type(layer).__mro__[2] if isinstance(layer, JoinedHeads) else type(layer)


class JoinedHeads(nn.Module):
    """Goes before an attention class of ``transformers``, to which it leaves all other cases."""

    spec: AttentionSpec
    head_dim: int
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *args: Any,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> Any:
        if layout is None or position_embeddings is None or not self._is_plain(hidden_states):
            return super().forward(
                hidden_states, position_embeddings, *args, layout=layout, **kwargs
            )
        rotation = RotaryEmbedding.of(*(x[0] for x in position_embeddings))
        norms: list[RMSNorm] = [getattr(self, n) for n in HEAD_NORMS if hasattr(self, n)]
        parts = [getattr(self, name) for name in PROJECTIONS]
        query, key, value = _Heads.apply(
            hidden_states[0],
            None if norms else rotation,
            self.head_dim,
            *(tensor for part in parts for tensor in (part.weight, part.bias)),
        )
        if norms:
            query, key = (
                _Turned.apply(norm(heads, interleave_pairs(self.head_dim)), rotation)
                for norm, heads in zip(norms, (query, key), strict=True)
            )
        attended = layout.attend(self.layer_idx, query, key, value, spec=self.spec)
        return self.o_proj(attended.flatten(1))[None], None  # type: ignore[operator]

    def _is_plain(self, hidden_states: Tensor) -> bool:
        """Whether one function computes what the projections do: adapters go around them."""
        return (
            all(type(getattr(self, name)) is Linear for name in PROJECTIONS)
            and all(isinstance(getattr(self, name, None), RMSNorm | None) for name in HEAD_NORMS)
            and hidden_states.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
        )


class _Heads(torch.autograd.Function):
    """``[L, D]`` to queries, keys and values ``[L, heads, width]``, the first two turned."""

    @staticmethod
    def forward(
        ctx: Any, x_LD: Tensor, rotation: RotaryEmbedding | None, width: int, *layers: Tensor | None
    ) -> Any:
        ctx.save_for_backward(x_LD, *layers)
        heads = [len(weight) // width for weight, _ in pairs(layers)]
        ctx.rotation, ctx.order = rotation, interleave_pairs(width, heads[0] + heads[1], heads[2])
        heads_LHW = linear(x_LD, *_interleave_pairs(layers, ctx.order)).view(len(x_LD), -1, width)
        if rotation is not None:
            rotation.rotate_(heads_LHW.narrow(1, 0, heads[0] + heads[1]))
        return heads_LHW.split(heads, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_LD, *layers = ctx.saved_tensors
        of_x, _, _, *of_layers = ctx.needs_input_grad
        grad_LHW = torch.cat(grads, 1)
        if ctx.rotation is not None:
            rotated = grads[0].shape[1] + grads[1].shape[1]
            ctx.rotation.transposed().rotate_(grad_LHW.narrow(1, 0, rotated))
        grad_LE = grad_LHW.flatten(1)
        grad_x = multiply(grad_LE, _interleave_pairs(layers, ctx.order)[0].t()) if of_x else None
        found = layer_gradients(grad_LE, x_LD, layers, of_layers, ctx.order)
        return grad_x, None, None, *found


def _interleave_pairs(layers: Sequence[Tensor | None], order: Tensor) -> Layer:
    return reordered(joined(*pairs(layers)), order)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LHW: Tensor, rotation: RotaryEmbedding) -> Tensor:
        ctx.rotation = rotation
        return rotation(x_LHW)

    @staticmethod
    def backward(ctx: Any, grad_LHW: Tensor) -> Any:
        return ctx.rotation.transposed()(grad_LHW), None
