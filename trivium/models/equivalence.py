"""Comparisons that decide whether a model family may use shared prompts.

A model is switched to the shared-prompt layout only if both computations agree on a few tokens. A
family that applies part of its attention pattern elsewhere keeps its own attention.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.models.attention import (
    RAGGED,
    UnsupportedAttentionError,
    packed_forward,
    separate_rows,
    states_at,
)
from trivium.models.fast_path import kernels_of
from trivium.models.layout import AttentionSpec, Layout

logger = logging.getLogger(__name__)

HALF_PRECISION_TOL = 0.2
"""How far hidden states may differ in half precision; a wrong attention pattern differs by more."""


def uses_ragged_attention(model: PreTrainedModel) -> bool:
    """Return whether ``use_ragged_attention`` switched this model."""
    return model.config._attn_implementation == RAGGED


@torch.no_grad()
def use_ragged_attention(model: PreTrainedModel) -> bool:
    """Switch ``model`` to shared prompts if that is exact for it; return whether it is.

    Costs three forward passes over a dozen tokens, and in half precision a fourth that measures
    the size of rounding errors.
    """
    if uses_ragged_attention(model):
        return True
    before = model.config._attn_implementation
    backbone: PreTrainedModel = model.base_model  # type: ignore[assignment]
    batch = _probe_batch(backbone)
    try:
        expected = separate_rows(backbone, batch)
        tolerance = 1e-3
        if not is_precise(expected):
            model.set_attn_implementation("eager" if before == "sdpa" else "sdpa")
            other = separate_rows(backbone, batch)
            rounding = float((other - expected).abs().max() / _mean_size(expected))
            tolerance = max(0.05, 2 * rounding)
        model.set_attn_implementation(RAGGED)
        _, found, specs = probe_hidden_states(backbone)
        at = batch.logit_positions_T
        exact = (
            states_match(found, expected, tolerance)
            and states_match(states_at(backbone, batch, at), found[at], tolerance)
            and _windows_reach_attention(model, specs)
        )
    except (UnsupportedAttentionError, TypeError, ValueError, RuntimeError, KeyError):
        exact = False
    if not exact:
        model.set_attn_implementation(before or "eager")
        _warn_once(type(model).__name__)
    return exact


@torch.no_grad()
def probe_hidden_states(
    backbone: PreTrainedModel,
) -> tuple[Batch, Tensor, dict[int, AttentionSpec]]:
    """Return a few groups, their final hidden states, and the ``AttentionSpec`` of each layer."""
    batch = _probe_batch(backbone)
    layout = _Recorder(kernels_of(backbone).layout(batch, None))
    states_LD = packed_forward(backbone, batch.tokens_L, batch.positions_L, layout)
    return batch, states_LD, layout.specs


def is_precise(states_LD: Tensor) -> bool:
    """Return whether rounding errors of hidden states are negligible."""
    return states_LD.dtype in (torch.float32, torch.float64)


def states_match(found_LD: Tensor, expected_LD: Tensor, tolerance: float) -> bool:
    """Return whether hidden states differ by at most this share of their mean size."""
    scale = _mean_size(expected_LD)
    return torch.allclose(found_LD / scale, expected_LD / scale, rtol=0, atol=tolerance)


def _mean_size(states_LD: Tensor) -> Tensor:
    return states_LD.abs().mean().clamp(min=1e-12)


@cache
def _warn_once(family: str) -> None:
    logger.warning("%s cannot share a prompt between responses: computing separate rows", family)


class _Recorder:
    """A layout that records the ``AttentionSpec`` of each layer."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.specs: dict[int, AttentionSpec] = {}

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        self.specs[layer] = spec
        return self.layout.attend(layer, query_LHD, key_LHD, value_LHD, spec)


def _windows_reach_attention(model: PreTrainedModel, specs: dict[int, AttentionSpec]) -> bool:
    """Return whether every sliding window of the configuration reached the attention function.

    A family that applies the window in its own mask would agree on a few tokens, but be wrong on
    sequences longer than the window.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or None
    types = getattr(config, "layer_types", None)
    if types is None:
        used = getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if window and used else "full_attention"] * len(specs)
    if not set(types) <= {"full_attention", "sliding_attention"}:
        return False
    sliding = [layer for layer, kind in enumerate(types) if kind == "sliding_attention"]
    return all(layer in specs and specs[layer].window == window for layer in sliding)


def _probe_batch(model: PreTrainedModel) -> Batch:
    top = model.config.get_text_config().vocab_size - 1
    groups = [
        Group([1, min(3, top)], [[2, min(5, top)], [min(4, top), 1, 2]]),
        Group([min(6, top), 1, min(3, top)], [[min(7, top), 2, 1], [1]]),
    ]
    return Batch.of(groups).to(model.device)
