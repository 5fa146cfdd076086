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

PRECISE_TOL = 1e-3
"""How far hidden states may differ in full precision, as a share of their mean size."""
HALF_PRECISION_FACTOR = 3.0
"""How many times as far as two of PyTorch's own computations they may differ in half precision."""


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
        expected, rounding = separate_rows(backbone, batch), 0.0
        if not is_precise(expected):
            model.set_attn_implementation("eager" if before == "sdpa" else "sdpa")
            rounding = _mean_difference(separate_rows(backbone, batch), expected)
        vars(backbone)["trivium_rounding"] = rounding
        model.set_attn_implementation(RAGGED)
        _, found, specs = probe_hidden_states(backbone)
        at = batch.logit_positions_T
        exact = (
            states_match(found, expected, rounding)
            and states_match(states_at(backbone, batch, at), found[at], rounding)
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


def rounding_of(backbone: PreTrainedModel) -> float:
    """Return the mean difference between two of PyTorch's own ways to compute hidden states.

    It is measured by ``use_ragged_attention`` in half precision, and 0 otherwise.
    """
    return vars(backbone).get("trivium_rounding", 0.0)


def states_match(found_LD: Tensor, expected_LD: Tensor, rounding: float) -> bool:
    """Return whether hidden states are equal up to rounding.

    In half precision rounding moves single tokens far (those that take part in massive
    activations), but the mean difference stays near that of ``rounding_of``.
    """
    if not is_precise(expected_LD):
        return _mean_difference(found_LD, expected_LD) <= HALF_PRECISION_FACTOR * rounding
    scale = expected_LD.abs().mean().clamp(min=1e-12)
    return torch.allclose(found_LD / scale, expected_LD / scale, rtol=0, atol=PRECISE_TOL)


def _mean_difference(found_LD: Tensor, expected_LD: Tensor) -> float:
    return float((found_LD.float() - expected_LD.float()).abs().mean())


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
