"""Forward passes over groups, in which responses share their prompt.

A batch is one packed sequence of tokens (``data.batch.Batch``). This module registers one attention
function with ``transformers``; the layout that each forward pass carries does the work. The rollout
engine brings layouts of its own, with a key-value cache.

A model uses shared prompts only after a comparison (``models.equivalence``). A family that fails it
computes separate rows (``separate_rows``), which is also the reference in tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from trivium.data.batch import Batch
from trivium.maths.ragged import repeat_per_segment
from trivium.models.fast_path import kernels_of
from trivium.models.layout import AttentionSpec, Layout
from trivium.models.rotary import FrequencyKey

RAGGED = "trivium_ragged"
UNSUPPORTED = ("s_aux", "position_bias", "sinks")


class UnsupportedAttentionError(Exception):
    """The model needs a kind of attention that no layout computes."""


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention by ``layout``: the attention function of every shared-prompt model."""
    if layout is None:
        raise UnsupportedAttentionError("no layout reached the attention function")
    unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported or query.shape[0] != 1 or not getattr(module, "is_causal", True) or dropout:
        raise UnsupportedAttentionError(f"not plain causal attention: {unsupported}")
    default = query.shape[-1] ** -0.5
    spec = AttentionSpec(default if scaling is None else scaling, sliding_window, softcap)
    packed = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.attend(int(module.layer_idx), *packed, spec=spec)[None], None  # type: ignore[arg-type]


AttentionInterface.register(RAGGED, ragged_attention)


def states_at(
    backbone: PreTrainedModel, batch: Batch, index: Tensor, *, shared: bool = True
) -> Tensor:
    """Return the final hidden states at positions of the packed sequence, one per index."""
    if not shared:
        return separate_rows(backbone, batch).index_select(0, index)
    layout = kernels_of(backbone).layout(batch, torch.unique(index))
    states_LD = packed_forward(backbone, batch.tokens_L, batch.positions_L, layout)
    return states_LD.index_select(0, index)


def states_by_frequency(
    backbone: PreTrainedModel, batch: Batch, index: Tensor, key: FrequencyKey, *, shared: bool
) -> Tensor:
    """Return ``states_at`` with every response computed by the frequencies of its own length.

    The states of a prompt that several responses share are those of the first.
    """
    keys_N = [key(length) for length in batch.row_lengths_N.tolist()]
    if len(set(keys_N)) == 1:
        return states_at(backbone, batch, index, shared=shared)
    begins_N, rows = batch.starts_N.clone(), batch.rows()
    begins_N[torch.cumsum(batch.sizes_G, 0) - batch.sizes_G] = batch.prompt_starts_G
    row_of_index = torch.searchsorted(begins_N, index, right=True) - 1
    parts, order = [], []
    for value in dict.fromkeys(keys_N):
        members = [n for n, found in enumerate(keys_N) if found == value]
        part = Batch.of([rows[n] for n in members]).to(index.device)
        start_N = torch.full_like(batch.starts_N, -1)
        start_N[members] = part.prompt_starts_G
        mine = (start_N[row_of_index] >= 0).nonzero()[:, 0]
        if len(mine):
            position = start_N[row_of_index[mine]] + batch.positions_L[index[mine]]
            parts.append(states_at(backbone, part, position, shared=shared))
            order.append(mine)
    return torch.cat(parts).index_select(0, torch.cat(order).argsort())


def packed_forward(
    backbone: PreTrainedModel, tokens_L: Tensor, position_L: Tensor, layout: Layout
) -> Tensor:
    """Return the final hidden states of a packed sequence, ``[L, D]``."""
    output = backbone(
        input_ids=tokens_L[None], position_ids=position_L[None], use_cache=False, layout=layout
    )
    return output.last_hidden_state[0]


def separate_rows(backbone: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the same hidden states from one padded row per response, by the model's attention.

    The prompt's states are those of its first response's row.
    """
    prompt_start_N = repeat_per_segment(batch.prompt_starts_G, batch.sizes_G)
    prompt_lengths_N = repeat_per_segment(batch.prompt_lengths_G, batch.sizes_G)
    total_N = prompt_lengths_N + batch.lengths_N
    column = torch.arange(int(total_N.max()), device=total_N.device)
    in_prompt = column < prompt_lengths_N[:, None]
    is_token = column < total_N[:, None]
    own = batch.starts_N[:, None] + column - prompt_lengths_N[:, None]
    index = torch.where(in_prompt, prompt_start_N[:, None] + column, own)
    index = torch.where(is_token, index, 0)
    rows = backbone(
        input_ids=batch.tokens_L[index],
        attention_mask=is_token.long(),
        position_ids=torch.where(is_token, column, 0),
        use_cache=False,
    ).last_hidden_state
    first_N = torch.zeros_like(is_token[:, 0])
    first_N[torch.cumsum(batch.sizes_G, 0) - batch.sizes_G] = True
    taken = is_token & (~in_prompt | first_N[:, None])
    return rows[taken].index_select(0, index[taken].argsort())
