"""A decode model: the backbone's forward pass for sampling, in fewer and larger operations.

A token of a small batch costs more in calls than in arithmetic. Here projections of the same input
are one product, weights are in the layout that the product wants, and rotations come from a table.
It serves decoders that are built like Llama (Qwen, Mistral and others), recognized by their parts
and then compared with the backbone; all others use the backbone. No gradient flows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trivium.models import flops
from trivium.models.cpu.fused_qkv import HEAD_NORMS, PROJECTIONS, is_known
from trivium.models.cpu.gated_mlp import GATED
from trivium.models.cpu.linear import Layer, reordered
from trivium.models.cpu.norms import inverse_rms
from trivium.models.cpu.packed import Packed
from trivium.models.cpu.rotary import RotaryEmbedding, RotaryTable, interleave_pairs
from trivium.models.equivalence import (
    HALF_PRECISION_TOL,
    is_precise,
    probe_hidden_states,
    states_match,
)
from trivium.models.group_layout import GroupLayout
from trivium.models.layout import AttentionSpec, Layout

logger = logging.getLogger(__name__)

DISABLED = "the decode fast path is disabled, and sampling is slower: %s"
BACKBONE = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {*PROJECTIONS, "o_proj"}


class Norm:
    """Root-mean-square normalization (Zhang and Sennrich 2019)."""

    def __init__(self, module: Any, order_D: Tensor | None = None) -> None:
        weight_D: Tensor = module.weight
        self.weight_D = weight_D if order_D is None else weight_D.index_select(0, order_D)
        self.wide = torch.promote_types(self.weight_D.dtype, torch.float32)
        self.epsilon = self.weight_D.new_tensor(module.variance_epsilon, dtype=self.wide)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.to(self.wide)
        normed = wide * inverse_rms(wide, self.epsilon)
        return normed.mul_(self.weight_D) if wide is x else normed.to(x.dtype) * self.weight_D


class DecodeLayer:
    """One decoder layer with fused projections."""

    def __init__(self, layer: Any, index: int, spec: AttentionSpec, pack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.spec = index, spec
        self.width: int = attention.head_dim
        self.heads = attention.q_proj.weight.shape[0] // self.width
        self.key_heads = attention.k_proj.weight.shape[0] // self.width
        self.before, self.between = (
            Norm(x) for x in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.head_norms = None
        if hasattr(attention, "q_norm"):
            order = interleave_pairs(self.width).to(attention.q_norm.weight.device)
            self.head_norms = Norm(attention.q_norm, order), Norm(attention.k_norm, order)
        self.into_heads = Packed(
            *(self._interleave_pairs(x) for x in (attention.q_proj, attention.k_proj)),
            (attention.v_proj.weight, attention.v_proj.bias),
            pack=pack,
        )
        self.out_of_heads = Packed.of(attention.o_proj, pack=pack)
        self.into_mlp = Packed.of(mlp.gate_proj, mlp.up_proj, pack=pack)
        self.out_of_mlp = Packed.of(mlp.down_proj, pack=pack)
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn

    def __call__(
        self,
        x_LD: Tensor,
        rotation: RotaryEmbedding,
        layout: Layout,
        output_positions: Tensor | None,
    ) -> Tensor:
        """Return the layer's output at ``output_positions`` (None: at all positions)."""
        heads_LHW = self.into_heads(self.before(x_LD)).view(len(x_LD), -1, self.width)
        rotated = self.heads + self.key_heads
        queries_and_keys = heads_LHW.narrow(1, 0, rotated)
        if self.head_norms is not None:
            parts = queries_and_keys.split([self.heads, self.key_heads], 1)
            normed = [norm(part) for norm, part in zip(self.head_norms, parts, strict=True)]
            queries_and_keys = torch.cat(normed, 1)
        rotation.rotate_(queries_and_keys)
        query = queries_and_keys.narrow(1, 0, self.heads)
        key = queries_and_keys.narrow(1, self.heads, self.key_heads)
        value = heads_LHW.narrow(1, rotated, self.key_heads)
        attended = layout.attend(self.index, query, key, value, self.spec)
        if output_positions is not None:
            attended, x_LD = attended[output_positions], x_LD[output_positions]
        x_LD = self.out_of_heads(attended.flatten(1)).add_(x_LD)
        gate, up = self.into_mlp(self.between(x_LD)).chunk(2, 1)
        return self.out_of_mlp(self.activation(gate).mul_(up)).add_(x_LD)

    def _interleave_pairs(self, projection: nn.Linear) -> Layer:
        order = interleave_pairs(self.width, len(projection.weight) // self.width)
        return reordered((projection.weight, projection.bias), order.to(projection.weight.device))


class DecodeModel:
    """A backbone's forward pass with its current weights.

    Args:
        backbone: a backbone for which ``decode_specs`` returns rules.
        specs: these rules.
        pack: whether to change the layout of the weights.
    """

    def __init__(
        self, backbone: PreTrainedModel, specs: Mapping[int, AttentionSpec], *, pack: bool = True
    ) -> None:
        parts: Any = backbone
        self.embed, self.norm = parts.embed_tokens, Norm(parts.norm)
        self.rotations = RotaryTable(parts.rotary_emb)
        self.layers = [
            DecodeLayer(layer, i, specs[i], pack) for i, layer in enumerate(parts.layers)
        ]

    @torch.no_grad()
    def __call__(self, tokens_L: Tensor, position_L: Tensor, layout: Layout) -> Tensor:
        """Return final hidden states, ``[L, D]``; zeros except at the output positions."""
        x_LD = self.embed(tokens_L)
        rotation = self.rotations(position_L, layout.longest, x_LD)
        for layer in self.layers[:-1]:
            x_LD = layer(x_LD, rotation, layout, None)
        last = self.norm(self.layers[-1](x_LD, rotation, layout, layout.output_positions))
        if layout.output_positions is None:
            return last
        return torch.zeros_like(x_LD).index_copy_(0, layout.output_positions, last)


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
    if states_match(found, expected, 1e-3 if is_precise(found) else HALF_PRECISION_TOL):
        return specs
    logger.warning(DISABLED, "its hidden states differ from the model's")
    return None


def _is_known(backbone: Any) -> bool:
    """Return whether the parts are those of a Llama-like decoder with plain projections."""
    return _parts(backbone) == BACKBONE and all(
        _parts(layer) == LAYER
        and _parts(layer.self_attn) - {*HEAD_NORMS} == ATTENTION
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


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}
