"""A decode model: the backbone's forward pass for sampling, in fewer operations.

A token of a small batch costs more in calls than in arithmetic. Here queries, keys and values are
one product, rotations come from a table, and no module is called. It serves decoders of ``KNOWN``
attention classes, which are then compared with the backbone; all others use the backbone. No
gradient flows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trivium.models import flops
from trivium.models.equivalence import probe_hidden_states, rounding_of, states_match
from trivium.models.group_layout import GroupLayout
from trivium.models.layout import AttentionSpec, Forward, Layout
from trivium.models.rotary import FIXED

logger = logging.getLogger(__name__)

DISABLED = "the decode fast path is disabled, and sampling is slower: %s"
KNOWN = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
"""Attention classes of ``transformers`` whose code was read. Others look like these on a few tokens
and rotate, clip or scale differently at far positions or for large numbers."""
TABLE_MARGIN = 256
"""Positions beyond the last one for which a table is computed in advance."""
BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
HEAD_NORMS = ("q_norm", "k_norm")
GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}

Rotation = tuple[Tensor, Tensor]
"""Cosines, and sines of which the first half is negated, ``[L, 1, width]``."""


class DecodeModel:
    """A backbone's forward pass with its current weights.

    Args:
        backbone: a backbone for which ``decode_specs`` returns rules.
        specs: these rules.
    """

    def __init__(self, backbone: PreTrainedModel, specs: Mapping[int, AttentionSpec]) -> None:
        parts: Any = backbone
        self.embed, self.norm = parts.embed_tokens, Norm(parts.norm)
        self.rotations = RotationTable(parts.rotary_emb)
        self.layers = [DecodeLayer(layer, i, specs[i]) for i, layer in enumerate(parts.layers)]

    @torch.no_grad()
    def __call__(self, tokens_L: Tensor, position_L: Tensor, layout: Layout) -> Tensor:
        """Return final hidden states, ``[L, D]``."""
        x_LD = self.embed(tokens_L)
        rotation = self.rotations(position_L, x_LD)
        for layer in self.layers:
            x_LD = layer(x_LD, rotation, layout)
        return self.norm(x_LD)


class DecodeLayer:
    """One decoder layer."""

    def __init__(self, layer: Any, index: int, spec: AttentionSpec) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.spec, self.width = index, spec, int(attention.head_dim)
        projections = [getattr(attention, name) for name in PROJECTIONS]
        heads, key_heads, _ = (len(p.weight) // self.width for p in projections)
        self.heads, self.key_heads = heads, key_heads
        self.into_heads = _joined(projections)
        self.norms = [Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)]
        self.head_norms = [
            Norm(getattr(attention, name))
            for name in ("q_norm", "k_norm")
            if hasattr(attention, name)
        ]
        self.out_of_heads = _joined([attention.o_proj])
        self.into_mlp = _joined([mlp.gate_proj, mlp.up_proj])
        self.out_of_mlp = _joined([mlp.down_proj])
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn

    def __call__(self, x_LD: Tensor, rotation: Rotation, layout: Layout) -> Tensor:
        before_attention, before_mlp = self.norms
        heads_LHW = self.into_heads(before_attention(x_LD)).view(len(x_LD), -1, self.width)
        heads, value = heads_LHW.split([self.heads + self.key_heads, self.key_heads], 1)
        if self.head_norms:
            query, key = heads.split([self.heads, self.key_heads], 1)
            query_norm, key_norm = self.head_norms
            heads = torch.cat([query_norm(query), key_norm(key)], 1)
        query, key = _rotated(heads, rotation).split([self.heads, self.key_heads], 1)
        attended = layout.attend(self.index, query, key, value, self.spec)
        x_LD = self.out_of_heads(attended.flatten(1)).add_(x_LD)
        gate, up = self.into_mlp(before_mlp(x_LD)).chunk(2, 1)
        return self.out_of_mlp(self.activation(gate).mul_(up)).add_(x_LD)


class Norm:
    """Root-mean-square normalization, ``w x / sqrt(mean(x²) + ε)`` (Zhang and Sennrich 2019)."""

    def __init__(self, module: Any) -> None:
        self.weight_D: Tensor = module.weight
        self.wide = torch.promote_types(self.weight_D.dtype, torch.float32)
        self.epsilon = self.weight_D.new_tensor(module.variance_epsilon, dtype=self.wide)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self.wide)
        length = torch.linalg.vector_norm(wide, 2, -1, keepdim=True)
        scale = torch.addcmul(self.epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight_D)


class RotationTable:
    """A backbone's rotary embeddings, from a table where they depend on the position alone."""

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self.fixed = getattr(rotary, "rope_type", None) in FIXED
        self._table: Rotation | None = None

    def __call__(self, position_L: Tensor, like_LD: Tensor) -> Rotation:
        """Return the rotations of these positions, in the type of ``like_LD``."""
        if not self.fixed:
            return self._computed(position_L, like_LD)
        last = int(position_L.max())
        if self._table is None or last >= len(self._table[0]):
            positions = torch.arange(last + 1 + TABLE_MARGIN, device=position_L.device)
            self._table = self._computed(positions, like_LD)
        cos, sin = (x.index_select(0, position_L) for x in self._table)
        return cos, sin

    def _computed(self, position_L: Tensor, like_LD: Tensor) -> Rotation:
        cos, sin = (x[0][:, None] for x in self.rotary(like_LD[None], position_L[None]))
        half = sin.shape[2] // 2
        return cos, torch.cat([-sin[..., :half], sin[..., half:]], 2)


def _rotated(x_LHW: Tensor, rotation: Rotation) -> Tensor:
    """``(x_1 cos − x_2 sin, x_2 cos + x_1 sin)`` of the halves of each head (Su et al. 2021)."""
    cos, sin = rotation
    return (x_LHW * cos).addcmul_(x_LHW.roll(x_LHW.shape[2] // 2, 2), sin)


def _joined(layers: list[nn.Linear]) -> Callable[[Tensor], Tensor]:
    """Return layers of one input as one product."""
    weights = [layer.weight for layer in layers]
    biases = [
        w.new_zeros(len(w)) if x.bias is None else x.bias
        for x, w in zip(layers, weights, strict=True)
    ]
    weight = torch.cat(weights) if len(layers) > 1 else weights[0]
    biased = any(layer.bias is not None for layer in layers)
    return partial(F.linear, weight=weight, bias=torch.cat(biases) if biased else None)


def find_decoder(backbone: PreTrainedModel) -> Callable[[], Forward] | None:
    """Return a factory of decode models; None if a backbone must compute its own forward pass."""
    specs = decode_specs(backbone)
    return None if specs is None else partial(DecodeModel, backbone, specs)


@torch.no_grad()
def decode_specs(backbone: PreTrainedModel) -> dict[int, AttentionSpec] | None:
    """Return each layer's attention rule if ``DecodeModel`` computes what the backbone does.

    ``backbone`` shares prompts. Costs two forward passes over a dozen tokens. Their FLOPs do not
    count: the comparison happens once per process, not once per run.
    """
    if not _is_known(backbone):
        return None
    with flops.paused():
        batch, expected, specs = probe_hidden_states(backbone)
        try:
            model = DecodeModel(backbone, specs)
            found = model(batch.tokens_L, batch.positions_L, GroupLayout(batch))
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            logger.warning(DISABLED, f"it failed: {error}"[:500])
            return None
    if states_match(found, expected, rounding_of(backbone)):
        return specs
    logger.warning(DISABLED, "its hidden states differ from the model's")
    return None


def _is_known(backbone: Any) -> bool:
    """Return whether the parts are those of a Llama-like decoder with plain projections."""
    return _parts(backbone) == BACKBONE and all(
        _parts(layer) == LAYER
        and _parts(layer.self_attn) - {*HEAD_NORMS} == {*PROJECTIONS, "o_proj"}
        and is_known(layer.self_attn)
        and _parts(layer.mlp) == GATED
        and all(
            type(part) is nn.Linear
            for parent in (layer.self_attn, layer.mlp)
            for name, part in parent.named_children()
            if name.endswith("_proj")
        )
        for layer in backbone.layers
    )


def is_known(layer: nn.Module) -> bool:
    """Return whether an attention layer's class is one of ``KNOWN``."""
    kind = type(layer)
    return kind.__name__ in KNOWN and kind.__module__.startswith("transformers.models.")


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
