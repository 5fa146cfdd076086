"""Attention over groups: responses share their prompt, and nothing is padded outside it.

A model is fed one line of tokens (``data.batch.Batch``) through the attention interface of
``transformers``: this module registers one attention function, and a *layout* handed along with
each forward says who may look at whom. ``GroupLayout`` serves training and scoring; the rollout
engine brings layouts of its own with a key-value cache.

A model family is trusted with it only after comparison (``models.equivalence``); one that fails computes
separate rows (``separate_rows``), which is also the reference that the tests hold the shared layout
to.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.maths.ragged import repeat_per_segment, segment_ids
from trivium.models.cpu.linear import pad_rows
from trivium.models.cpu.prefix_attention import Block, SharedAttention, plan
from trivium.models.flex_attention import FlexLayout
from trivium.models.segments import PaddedSegments

logger = logging.getLogger(__name__)

RAGGED = "trivium_ragged"
NOT_UNDERSTOOD = ("s_aux", "position_bias", "sinks")


class UnsupportedAttentionError(Exception):
    """The model asks attention for something the ragged layouts do not compute."""


class Layout(Protocol):
    """Who attends to whom on the line of one forward pass."""

    @property
    def output_positions(self) -> Tensor | None:
        """Positions whose final states are read, ascending: others may be undefined. None: all."""
        ...

    @property
    def longest(self) -> int:
        """What every token's position is below."""
        ...

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attention output ``[L, heads, width]`` of one layer."""
        ...


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer turns scores into weights."""

    scaling: float
    window: int | None
    softcap: float | None


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
    """The attention function of every model that Trivium drives; ``layout`` does the work."""
    if layout is None:
        raise UnsupportedAttentionError("no layout reached the attention function")
    asked = [name for name in NOT_UNDERSTOOD if kwargs.get(name) is not None]
    if asked or query.shape[0] != 1 or not getattr(module, "is_causal", True) or dropout:
        raise UnsupportedAttentionError(f"this attention is not plain causal attention {asked}")
    spec = AttentionSpec(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap
    )
    lines = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.attend(int(module.layer_idx), *lines, spec=spec)[None], None  # type: ignore[arg-type]


AttentionInterface.register(RAGGED, ragged_attention)


def attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """Dense attention of rows ``[rows, heads, tokens, width]``; causal where ``visible`` is None.

    Key and value may have fewer heads than the query (grouped-query attention).
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    if spec.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, visible, is_causal=visible is None, scale=spec.scaling
        )
    scores = query @ key.transpose(-1, -2) * spec.scaling
    scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if visible is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


class GroupLayout:
    """Each prompt attends to itself; each response to its group's prompt and to itself.

    In layer ``last`` only what is ``output_positions`` must attend. The line's last ``pad_rows`` tokens are no
    one's (``linear.pad_rows``).
    """

    def __init__(
        self,
        batch: Batch,
        output_positions: Tensor | None = None,
        last: int | None = None,
        pad_rows: int = 0,
    ) -> None:
        self.batch, self.output_positions, self.last, self.pad_rows = (
            batch,
            output_positions,
            last,
            pad_rows,
        )
        self.longest = int(
            (repeat_per_segment(batch.prompt_lengths_G, batch.sizes_G) + batch.lengths_N).max()
        )

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        everything = spec.window is None or spec.window >= self.longest
        if everything and spec.softcap is None and query_LHD.device.type == "cpu":
            blocks = self._last_blocks if layer == self.last else self._blocks
            return SharedAttention.apply(query_LHD, key_LHD, value_LHD, blocks, spec.scaling)
        if query_LHD.device.type == "cuda" and flex_works():
            return self._flex.attend(layer, query_LHD, key_LHD, value_LHD, spec)
        return self.attend_by_masks(layer, query_LHD, key_LHD, value_LHD, spec)

    def attend_by_masks(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """The plain way: with copies of the prompts' keys, and masks."""
        out_LHD = self._masked.attend(layer, query_LHD, key_LHD, value_LHD, spec)
        return F.pad(out_LHD, (0, 0, 0, 0, 0, self.pad_rows)) if self.pad_rows else out_LHD

    @cached_property
    def _blocks(self) -> list[Block]:
        return plan(self.batch)

    @cached_property
    def _last_blocks(self) -> list[Block]:
        return plan(self.batch, self.output_positions)

    @cached_property
    def _flex(self) -> FlexLayout:
        return FlexLayout(self.batch)

    @cached_property
    def _masked(self) -> MaskedLayout:
        return MaskedLayout(self.batch)


class MaskedLayout:
    """The same with a copy of the prompt's keys before each response's, and masks.

    It is what sliding windows and soft caps use on the CPU, what other devices use, and the plain
    way that the others are held to.
    """

    def __init__(self, batch: Batch) -> None:
        self.prompts = PaddedSegments(batch.prompt_starts_G, batch.prompt_lengths_G)
        self.responses = PaddedSegments(batch.starts_N, batch.lengths_N)
        self.group_of_N = segment_ids(batch.sizes_G)
        self.prompt_lengths_G = batch.prompt_lengths_G
        line = torch.cat([self.prompts.packed_index, self.responses.packed_index])
        self.to_packed = torch.empty_like(line).scatter_(
            0, line, torch.arange(len(line), device=line.device)
        )
        self._visible: dict[int | None, tuple[Tensor | None, Tensor]] = {}

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        prompt_sees, response_sees = self._masks(spec.window)
        prompt_keys, prompt_values = self.prompts.gather(key_LHD), self.prompts.gather(value_LHD)
        prompt_out = attention(
            self.prompts.gather(query_LHD), prompt_keys, prompt_values, prompt_sees, spec
        )
        keys, values = (
            torch.cat([shared.index_select(0, self.group_of_N), self.responses.gather(own)], 2)
            for shared, own in ((prompt_keys, key_LHD), (prompt_values, value_LHD))
        )
        response_out = attention(
            self.responses.gather(query_LHD), keys, values, response_sees, spec
        )
        out = torch.cat([self.prompts.flatten(prompt_out), self.responses.flatten(response_out)])
        return out.index_select(0, self.to_packed)

    def _masks(self, window: int | None) -> tuple[Tensor | None, Tensor]:
        """What prompts see (None: plainly causal) and what responses see, for one window size."""
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
        behind = length_N[:, None, None] + own[:, None] - prompt
        sees_prompt = sees_prompt & (behind < window)
        sees_own = sees_own & (own[:, None] - own < window)
        distance = prompt[:, None] - prompt
        prompt_sees = (distance >= 0) & (distance < window)
        return prompt_sees, torch.cat([sees_prompt, sees_own], 2)[:, None]


@cache
def flex_works() -> bool:
    """Whether FlexAttention computes on this GPU, forward and backward, what masks do."""
    batch = Batch.of([Group([1] * 5, [[2] * 3, [3] * 9]), Group([4] * 7, [[5] * 2])]).to("cuda")
    shape, spec = (len(batch.tokens_L), 2, 32), AttentionSpec(0.2, None, None)
    found = []
    try:
        for layout in (MaskedLayout(batch), FlexLayout(batch)):
            generator = torch.Generator("cuda").manual_seed(0)
            query, key, value = (
                torch.randn(shape, generator=generator, device="cuda", requires_grad=True)
                for _ in range(3)
            )
            out = layout.attend(0, query, key, value, spec=spec)
            out.square().sum().backward()
            found.append([out.detach(), query.grad, key.grad, value.grad])
        works = all(torch.allclose(a, b, atol=1e-2, rtol=1e-2) for a, b in zip(*found, strict=True))
    except Exception as error:  # Compilers fail in many ways, and none may end a run.
        logger.info("FlexAttention failed: %.500s", error)
        works = False
    if not works:
        logger.warning("FlexAttention does not work here: prompts' keys are copied instead")
    return works


def hidden_states(
    backbone: PreTrainedModel,
    batch: Batch,
    *,
    shared: bool = True,
    output_positions: Tensor | None = None,
) -> Tensor:
    """Final hidden states of every token on the batch's line, ``[L, D]``.

    Where it is known that only some positions are ``output_positions``, others may be undefined.
    """
    if not shared:
        return separate_rows(backbone, batch)
    length, weight = len(batch.tokens_L), next(backbone.parameters())
    more = pad_rows(length, weight)
    layout = GroupLayout(batch, output_positions, last_layer(backbone), more)
    tokens_L, positions_L = (F.pad(x, (0, more)) for x in (batch.tokens_L, batch.positions_L))
    return on_line(backbone, tokens_L, positions_L, layout)[:length]


def states_at(
    backbone: PreTrainedModel, batch: Batch, packed_index: Tensor, *, shared: bool = True
) -> Tensor:
    """Final hidden states at positions of the batch's line, one per index."""
    output_positions = torch.unique(packed_index)
    return hidden_states(
        backbone, batch, shared=shared, output_positions=output_positions
    ).index_select(0, packed_index)


def last_layer(backbone: PreTrainedModel) -> int:
    """The index by which the last layer tells its attention where it is."""
    return backbone.config.get_text_config().num_hidden_layers - 1


def on_line(
    backbone: PreTrainedModel, tokens_L: Tensor, position_L: Tensor, layout: Layout
) -> Tensor:
    """Final hidden states of a line of tokens, ``[L, D]``."""
    output = backbone(
        input_ids=tokens_L[None], position_ids=position_L[None], use_cache=False, layout=layout
    )
    return output.last_hidden_state[0]


def separate_rows(backbone: PreTrainedModel, batch: Batch) -> Tensor:
    """The same hidden states from one padded row per response: the plain way, and the reference.

    The prompt's states are read from its first response's row.
    """
    prompt_of_N = repeat_per_segment(batch.prompt_starts_G, batch.sizes_G)
    prompt_lengths_N = repeat_per_segment(batch.prompt_lengths_G, batch.sizes_G)
    total_N = prompt_lengths_N + batch.lengths_N
    column = torch.arange(int(total_N.max()), device=total_N.device)
    in_prompt = column < prompt_lengths_N[:, None]
    held = column < total_N[:, None]
    own = batch.starts_N[:, None] + column - prompt_lengths_N[:, None]
    index = torch.where(held, torch.where(in_prompt, prompt_of_N[:, None] + column, own), 0)
    rows = backbone(
        input_ids=batch.tokens_L[index],
        attention_mask=held.long(),
        position_ids=torch.where(held, column, 0),
        use_cache=False,
    ).last_hidden_state
    first_N = torch.zeros_like(held[:, 0])
    first_N[torch.cumsum(batch.sizes_G, 0) - batch.sizes_G] = True
    taken = held & (~in_prompt | first_N[:, None])
    line = index[taken]
    order = torch.empty_like(line).scatter_(0, line, torch.arange(len(line), device=line.device))
    return rows[taken].index_select(0, order)
