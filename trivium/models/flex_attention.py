"""Attention of groups by FlexAttention, for GPUs: one kernel, and no copy of a prompt's keys.

A mask function says whether one token of the packed sequence sees another. ``flex_attention``
compiles it into its kernel and skips blocks in which nothing is visible, so that all responses read
the same keys of their prompt (Dong et al. 2024). FlexAttention has no backward pass on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from trivium.data.batch import Batch
from trivium.maths.ragged import segment_ids
from trivium.models.layout import AttentionSpec

PROMPT = -1


class FlexLayout:
    """Each prompt attends to itself; each response attends to its group's prompt and to itself."""

    def __init__(self, batch: Batch) -> None:
        length = len(batch.tokens_L)
        self.position_L = batch.positions_L
        is_start_L = batch.prompt_starts_G.new_zeros(length)
        is_start_L[batch.prompt_starts_G[1:]] = 1
        self.group_L = is_start_L.cumsum(0)
        self.response_L = torch.full_like(batch.tokens_L, PROMPT)
        self.response_L[batch.token_positions_T] = segment_ids(batch.lengths_N)
        self._masks: dict[int | None, BlockMask] = {}

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query_LHD, key_LHD, value_LHD))
        out = _attention(query.device.type)(
            query,
            key,
            value,
            score_mod=None if spec.softcap is None else _capped(spec.softcap),
            block_mask=self._mask(spec.window),
            scale=spec.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out[0].transpose(0, 1)

    def _mask(self, window: int | None) -> BlockMask:
        if window not in self._masks:
            length = len(self.group_L)
            self._masks[window] = create_block_mask(
                self._visible(window), None, None, length, length, device=self.group_L.device
            )
        return self._masks[window]

    def _visible(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Return whether the token at ``q`` sees the one at ``k``: prompts precede responses."""
        group_L, response_L, position_L = self.group_L, self.response_L, self.position_L

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            shared = (response_L[k] == PROMPT) | (response_L[k] == response_L[q])
            seen = (group_L[q] == group_L[k]) & shared & (k <= q)
            if window is not None:
                seen = seen & (position_L[q] - position_L[k] < window)
            return seen

        return visible


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _attention(device: str) -> Callable[..., Any]:
    """Compile FlexAttention on GPUs, where the uncompiled function would hold all scores."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
