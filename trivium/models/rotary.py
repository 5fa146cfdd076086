"""Rotary embeddings whose frequencies depend on the longest sequence of a forward pass.

LongRoPE has one set of frequencies up to the original context and one beyond it (Ding et al. 2024);
dynamic NTK has a set for each length beyond it. A sequence is computed with the frequencies of its
own length, so only sequences of equal ``frequency_key`` share a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FIXED = {"default", "linear", "llama3", "yarn", "proportional"}
"""Kinds that rotate a position by the same angle in every forward pass."""

FrequencyKey = Callable[[int], tuple[int, ...]]
"""Map the length of a sequence to what its frequencies depend on."""


def frequency_key(backbone: PreTrainedModel) -> FrequencyKey | None:
    """Return the map of a backbone; None if its frequencies do not depend on lengths.

    A backbone with dynamic NTK is also made to forget the longest sequence that it has seen.
    """
    rules: list[Callable[[int], int]] = []
    for module in backbone.modules():
        for layer_type, kind in _kinds(module).items():
            if kind not in FIXED:
                rules.append(_rule(module, layer_type, kind))
                if "dynamic" in kind and forget_lengths not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(forget_lengths)
    return (lambda length: tuple(rule(length) for rule in rules)) if rules else None


def _kinds(module: nn.Module) -> dict[str, str]:
    """Return the kinds of a module's rotary embeddings by layer type ("": one for all layers)."""
    kind = getattr(module, "rope_type", None)
    return {"": kind} if isinstance(kind, str) else dict(kind or {})  # type: ignore[call-overload]


def _rule(module: Any, layer_type: str, kind: str) -> Callable[[int], int]:
    if kind == "longrope":
        parameters = module.config.rope_parameters
        parameters = parameters[layer_type] if layer_type else parameters
        border = int(parameters["original_max_position_embeddings"])
        return lambda length: int(length > border)
    # An unknown kind may choose other frequencies for every length.
    border = int(module.original_max_seq_len) if "dynamic" in kind else 0
    return lambda length: max(length, border)


def forget_lengths(module: Any, *_: Any) -> None:
    """Restore the first frequencies, which ``transformers`` replaces when a sequence is longer."""
    for layer_type, kind in _kinds(module).items():
        prefix = f"{layer_type}_" if layer_type else ""
        if "dynamic" in kind:
            first: torch.Tensor = getattr(module, f"{prefix}original_inv_freq")
            current: torch.Tensor = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", first.to(current.device), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
