"""Layouts for training and scoring: responses share their prompt, and nothing is padded.

``GroupLayout`` picks the implementation: FlexAttention on a GPU, or dense attention with masks.
"""

from __future__ import annotations

import logging
from functools import cache, cached_property, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.maths.ragged import segment_ids
from trivium.models.flex_attention import FlexLayout
from trivium.models.layout import AttentionSpec
from trivium.models.segments import PaddedSegments

logger = logging.getLogger(__name__)


class GroupLayout:
    """Each prompt attends to itself; each response attends to its group's prompt and to itself.

    Args:
        batch: the groups.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        if query_LHD.device.type == "cuda" and flex_works():
            return self._flex.attend(layer, query_LHD, key_LHD, value_LHD, spec)
        return self._masked.attend(layer, query_LHD, key_LHD, value_LHD, spec)

    @cached_property
    def _flex(self) -> FlexLayout:
        return FlexLayout(self.batch)

    @cached_property
    def _masked(self) -> MaskedLayout:
        return MaskedLayout(self.batch)


class MaskedLayout:
    """The reference: a copy of the prompt's keys before each response's keys, and masks."""

    def __init__(self, batch: Batch) -> None:
        self.prompts = PaddedSegments(batch.prompt_starts_G, batch.prompt_lengths_G)
        self.responses = PaddedSegments(batch.starts_N, batch.lengths_N)
        self.group_of_N = segment_ids(batch.sizes_G)
        self.prompt_lengths_G = batch.prompt_lengths_G
        order = torch.cat([self.prompts.token_index, self.responses.token_index])
        self.packed_order = order.argsort()
        self._visible: dict[int | None, tuple[Tensor | None, Tensor]] = {}

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        prompt_mask, response_mask = self._masks(spec.window)
        prompt_keys, prompt_values = self.prompts.gather(key_LHD), self.prompts.gather(value_LHD)
        prompt_queries = self.prompts.gather(query_LHD)
        prompt_out = dense_attention(prompt_queries, prompt_keys, prompt_values, prompt_mask, spec)
        keys, values = (
            torch.cat([shared.index_select(0, self.group_of_N), self.responses.gather(own)], 2)
            for shared, own in ((prompt_keys, key_LHD), (prompt_values, value_LHD))
        )
        queries = self.responses.gather(query_LHD)
        response_out = dense_attention(queries, keys, values, response_mask, spec)
        out = torch.cat([self.prompts.flatten(prompt_out), self.responses.flatten(response_out)])
        return out.index_select(0, self.packed_order)

    def _masks(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """Return the masks of prompts (None: causal) and of responses for one window size."""
        if window is not None and window >= self.prompts.longest + self.responses.longest:
            window = None
        if window not in self._visible:
            self._visible[window] = self._build_masks(window)
        return self._visible[window]

    def _build_masks(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        device = self.prompt_lengths_G.device
        prompt = torch.arange(self.prompts.longest, device=device)
        own = torch.arange(self.responses.longest, device=device)
        length_N = self.prompt_lengths_G[self.group_of_N]
        sees_prompt = (prompt < length_N[:, None])[:, None].expand(-1, len(own), -1)
        sees_own = (own[:, None] >= own).expand(len(length_N), -1, -1)
        if window is None:
            return None, torch.cat([sees_prompt, sees_own], 2)[:, None]
        distance = length_N[:, None, None] + own[:, None] - prompt
        sees_prompt = sees_prompt & (distance < window)
        sees_own = sees_own & (own[:, None] - own < window)
        return window_mask(prompt, window), torch.cat([sees_prompt, sees_own], 2)[:, None]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """Return the attention of rows ``[rows, heads, tokens, width]``, causal if no mask is given.

    Key and value may have fewer heads than the query (grouped-query attention).
    """
    repeats = query.shape[1] // key.shape[1]
    # On a CPU the kernel reads each key for all its queries; with a mask, a GPU's needs copies.
    grouped = spec.softcap is None and query.device.type == "cpu"
    if repeats > 1 and not grouped:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    if spec.softcap is None:
        attend = partial(F.scaled_dot_product_attention, scale=spec.scaling, enable_gqa=grouped)
        return attend(query, key, value, visible, is_causal=visible is None)
    scores = query @ key.transpose(-1, -2) * spec.scaling
    scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if visible is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def window_mask(positions: Tensor, window: int) -> Tensor:
    """Return which of consecutive positions sees which within a causal sliding window."""
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < window)


@cache
def flex_works() -> bool:
    """Return whether FlexAttention agrees with masks on this GPU, forward and backward."""
    batch = Batch.of([Group([1] * 5, [[2] * 3, [3] * 9]), Group([4] * 7, [[5] * 2])]).to("cuda")
    shape, spec = (len(batch.tokens_L), 2, 32), AttentionSpec(0.2, None, None)
    results = []
    try:
        for layout in (MaskedLayout(batch), FlexLayout(batch)):
            generator = torch.Generator("cuda").manual_seed(0)
            query, key, value = (
                torch.randn(shape, generator=generator, device="cuda", requires_grad=True)
                for _ in range(3)
            )
            out = layout.attend(0, query, key, value, spec=spec)
            out.square().sum().backward()
            results.append([out.detach(), query.grad, key.grad, value.grad])
        pairs = zip(*results, strict=True)
        works = all(torch.allclose(a, b, atol=1e-2, rtol=1e-2) for a, b in pairs)
    except Exception as error:  # Compilers fail in many ways, and none may end a run.
        logger.info("FlexAttention failed: %.500s", error)
        works = False
    if not works:
        logger.warning("FlexAttention does not work here: the keys of prompts are copied instead")
    return works
