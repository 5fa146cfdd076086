"""The key-value cache of growing rows: one copy of each prompt, one strip per row.

``admit`` reads prompts, ``advance`` feeds every row one token, ``keep`` lets rows go. Each returns
final hidden states, so the caller owns the head and the drawing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trivium.maths.ragged import repeat_per_segment
from trivium.models import flops
from trivium.models.attention import AttentionSpec, attention, last_layer
from trivium.models.cpu.prefix_attention import Block, SharedAttention, plan_rows
from trivium.models.policy import Policy
from trivium.models.segments import PaddedSegments

BLOCK_TOKENS = 32
MAX_COPIED_PREFIX = 64
"""Up to this many tokens, a copy of the prompt per row is cheaper than attention in two parts."""


@dataclass
class LayerCache:
    """Keys and values of one layer, of prompts and of rows' own tokens.

    Values are ``[G, heads, P, width]``; keys are ``[G, heads, width, P]``, as a product with small
    queries takes half as long then.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    response_keys: Tensor
    response_values: Tensor


class PromptLayout:
    """Each prompt attends to itself; its keys and values are kept, and its last state is read."""

    def __init__(self, starts_G: Tensor, lengths_G: Tensor, last: int) -> None:
        self.rows = PaddedSegments(starts_G, lengths_G)
        self.output_positions = starts_G + lengths_G - 1
        self.last, self.longest = last, self.rows.longest
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._spans = starts_G, lengths_G

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        keys, values = self.rows.gather(key_LHD), self.rows.gather(value_LHD).contiguous()
        self.kept[layer] = keys.transpose(2, 3).contiguous(), values
        visible = None
        if spec.window is not None and spec.window < self.rows.longest:
            at = torch.arange(self.rows.longest, device=query_LHD.device)
            behind = at[:, None] - at
            visible = (behind >= 0) & (behind < spec.window)
        elif spec.softcap is None and query_LHD.device.type == "cpu":
            blocks = self._last_blocks if layer == self.last else self._blocks
            return SharedAttention.apply(query_LHD, key_LHD, value_LHD, blocks, spec.scaling)
        out = attention(self.rows.gather(query_LHD), keys, values, visible, spec)
        return self.rows.flatten(out).index_select(0, self._to_packed)

    @cached_property
    def _blocks(self) -> list[Block]:
        return plan_rows(*self._spans)

    @cached_property
    def _last_blocks(self) -> list[Block]:
        return plan_rows(*self._spans, self.output_positions)

    @cached_property
    def _to_packed(self) -> Tensor:
        order = self.rows.packed_index
        return torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )


class KVCache:
    """Rows that grow one token at a time over shared prompts.

    A row lives in a *slot* of the strips. Slots of rows that left are fed along until an eighth of
    them is idle; then all strips are moved together. So shapes change seldom: a product's kernel is
    made for a number of rows and then kept, and every step of a new one would make and keep more.

    How long rows and prompts are is known on the host, and so a GPU is never waited for here.

    Args:
        policy: whose rows they are.
        apart: keep prompts apart from the rows that share them; otherwise each row's strip begins
            with its prompt.
    """

    idle_share = 1 / 8

    def __init__(self, policy: Policy, *, shared_prefix: bool = True) -> None:
        self.shared_prefix = shared_prefix
        self.forward, self.count = policy.decode_model(), flops.counter(policy.backbone)
        self.last = last_layer(policy.backbone)
        self.device = policy.device
        self.layers: dict[int, LayerCache] = {}
        self.prompt_lengths_G = torch.zeros(0, dtype=torch.long)
        self.group_of_S = torch.zeros(0, dtype=torch.long)
        self.length_S = torch.zeros(0, dtype=torch.long)
        self.slot_of_R = torch.zeros(0, dtype=torch.long)
        self.prefix_len = 0
        self._update_grid()

    def admit(self, prompts: list[list[int]], samples: int) -> Tensor:
        """Read ``prompts``, open ``samples`` rows for each, return their last states ``[G, D]``."""
        lengths_G = torch.tensor([len(tokens) for tokens in prompts])
        starts_G = torch.cumsum(lengths_G, 0) - lengths_G
        line = torch.tensor([token for tokens in prompts for token in tokens])
        position_L = torch.arange(len(line)) - repeat_per_segment(starts_G, lengths_G)
        layout = PromptLayout(starts_G.to(self.device), lengths_G.to(self.device), self.last)
        with flops.apart():
            hidden_LD = self.forward(line.to(self.device), position_L.to(self.device), layout)
        self.count(position_L)
        self._compact()
        self._store(layout, samples)
        groups = len(self.prompt_lengths_G)
        fresh = torch.arange(groups, groups + len(prompts))
        held_G = torch.zeros_like(lengths_G) if self.shared_prefix else lengths_G
        self.prefix_len = max(self.prefix_len, int(held_G.max()))
        self.prompt_lengths_G = torch.cat([self.prompt_lengths_G, lengths_G - held_G])
        self.group_of_S = torch.cat([self.group_of_S, fresh.repeat_interleave(samples)])
        self.length_S = torch.cat([self.length_S, held_G.repeat_interleave(samples)])
        self.slot_of_R = torch.arange(len(self.group_of_S))
        self._update_grid()
        return hidden_LD[layout.output_positions]

    def advance(self, tokens_R: Tensor) -> Tensor:
        """Feed every row its next token; final hidden states ``[R, D]``."""
        slot_R, length_R = self.slot_of_R, self.length_S[self.slot_of_R]
        shortest, longest = (int(length) for length in length_R.aminmax())
        self._lengthen(longest)
        tokens_S = torch.zeros_like(self.length_S).index_copy_(0, slot_R, tokens_R.cpu())
        # No one reads what an idle slot sees: it must only need no mask where rows do not.
        at_S = torch.full_like(self.length_S, longest).index_copy_(0, slot_R, length_R)
        with flops.apart():
            hidden_SD = self._step(tokens_S, at_S, longest + 1, shortest == longest)
        self.count(self.prompt_lengths_G[self.group_of_S[slot_R]] + length_R)
        self.length_S[slot_R] += 1
        return hidden_SD.index_select(0, slot_R.to(self.device))

    def _step(self, tokens_S: Tensor, at_S: Tensor, used: int, aligned: bool) -> Tensor:
        """Final hidden states of a new token in every slot (see ``AdvanceLayout``)."""
        layout = AdvanceLayout(self, at_S.to(self.device), used, aligned)
        return self.forward(tokens_S.to(self.device), layout.position_S, layout)

    def keep(self, rows: list[int]) -> None:
        """Let all rows but these (indices, ascending) go."""
        self.slot_of_R = self.slot_of_R[torch.tensor(rows, dtype=torch.long)]
        if len(rows) < (1 - self.idle_share) * len(self.group_of_S):
            self._compact()

    def _store(self, layout: PromptLayout, samples: int) -> None:
        """Add prompts' caches and strips for their rows."""
        for index, (keys, values) in layout.kept.items():
            if self.shared_prefix:
                _, heads, width, _ = keys.shape
                response_keys = keys.new_zeros(len(keys) * samples, heads, width, BLOCK_TOKENS)
                response_values = keys.new_zeros(len(keys) * samples, heads, BLOCK_TOKENS, width)
                fresh = LayerCache(keys, values, response_keys, response_values)
            else:
                own = _padded(keys, values, BLOCK_TOKENS, samples)
                fresh = LayerCache(keys[..., :0], values[:, :, :0], *own)
            held = self.layers.get(index)
            self.layers[index] = fresh if held is None else _joined(held, fresh)

    @property
    def prompt_capacity(self) -> int:
        """Tokens that the longest prompt may have, where prompts lie apart."""
        return next((cache.prompt_values.shape[2] for cache in self.layers.values()), 0)

    @property
    def response_capacity(self) -> int:
        """Tokens that a strip has room for."""
        return next((cache.response_values.shape[2] for cache in self.layers.values()), 0)

    def _update_grid(self) -> None:
        self.grid = Grid(self.group_of_S, self.prompt_lengths_G, self.prompt_capacity, self.device)

    def _lengthen(self, longest: int) -> None:
        """Double the strips' room for responses when the longest row has filled its own."""
        more = self.response_capacity - self.prefix_len
        if longest >= self.response_capacity:
            for cache in self.layers.values():
                grown = _padded(cache.response_keys, cache.response_values, more)
                cache.response_keys, cache.response_values = grown

    def _compact(self) -> None:
        """Move the rows' strips together and forget prompts without rows."""
        if len(self.slot_of_R) == len(self.group_of_S):
            return
        slots, here = self.slot_of_R, self.slot_of_R.to(self.device)
        groups, self.group_of_S = torch.unique(self.group_of_S[slots], return_inverse=True)
        self.length_S = self.length_S[slots]
        gone, groups_here = len(groups) < len(self.prompt_lengths_G), groups.to(self.device)
        for cache in self.layers.values():
            if gone:
                cache.prompt_keys = cache.prompt_keys[groups_here]
                cache.prompt_values = cache.prompt_values[groups_here]
            # What is beyond a strip's rows is stale and never seen: whole strips move fastest.
            cache.response_keys = cache.response_keys.index_select(0, here)
            cache.response_values = cache.response_values.index_select(0, here)
        self.prompt_lengths_G = self.prompt_lengths_G[groups]
        self.slot_of_R = torch.arange(len(slots))
        self._update_grid()


class Grid:
    """Slots laid out by groups: one line for each group, as long as the largest.

    Attributes:
        groups, most: the lines, and the slots of the largest group.
        whole: every line is full.
        place_S: where in the grid each slot is.
        prompt_S: how long each slot's prompt is.
        full: every prompt is as long as the room for it.
    """

    def __init__(
        self,
        group_of_S: Tensor,
        prompt_lengths_G: Tensor,
        prompt_capacity: int,
        device: torch.device,
    ) -> None:
        sizes_G = torch.bincount(group_of_S, minlength=len(prompt_lengths_G))
        self.groups, self.most = len(sizes_G), int(sizes_G.max()) if len(sizes_G) else 0
        self.whole = self.groups * self.most == len(group_of_S)
        start_S = (torch.cumsum(sizes_G, 0) - sizes_G)[group_of_S]
        at_S = torch.arange(len(group_of_S))
        self.place_S = (group_of_S * self.most + at_S - start_S).to(device)
        self.prompt_S = prompt_lengths_G[group_of_S].to(device)
        self.full = bool((prompt_lengths_G == prompt_capacity).all())

    def to_grid(self, x_S: Tensor) -> Tensor:
        """``[slots, heads, repeats, w] -> [groups, heads, most·repeats, w]``."""
        if not self.whole:
            padded = x_S.new_zeros(self.groups * self.most, *x_S.shape[1:])
            x_S = padded.index_copy(0, self.place_S, x_S)
        return x_S.unflatten(0, (self.groups, self.most)).transpose(1, 2).flatten(2, 3)

    def from_grid(self, x_G: Tensor, repeats: int) -> Tensor:
        """``[groups, heads, most·repeats, w] -> [slots, heads, repeats, w]``."""
        x_S = x_G.unflatten(2, (self.most, repeats)).transpose(1, 2).flatten(0, 1)
        return x_S if self.whole else x_S.index_select(0, self.place_S)


class AdvanceLayout:
    """Each slot's one new token attends to its prompt, where that lies apart, and to its strip.

    Args:
        cache: whose slots they are.
        at_S: the place of the new token in each strip.
        used: how much of the strips is looked at, the new token included.
        level: ``used - 1`` is every slot's place.
    """

    output_positions: Tensor | None = None

    def __init__(self, cache: KVCache, at_S: Tensor, used: int, aligned: bool) -> None:
        self.cache, self.shared_prefix, self.grid = cache, cache.shared_prefix, cache.grid
        self.at_S, self.used, self.aligned = at_S, used, aligned
        self.position_S, self.longest = self.grid.prompt_S + at_S, cache.prompt_capacity + used
        self._hidden: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        cache = self.cache.layers[layer]
        self._write(cache, key_LHD, value_LHD)
        response_keys = cache.response_keys.narrow(3, 0, self.used)
        response_values = cache.response_values.narrow(2, 0, self.used)
        slots, heads, width = key_LHD.shape
        query_S = (query_LHD * spec.scaling).view(slots, heads, -1, width)
        repeats = query_S.shape[2]
        scores = _product(query_S, response_keys)
        if self.shared_prefix:
            # Laid out by groups, so that what is as wide as a prompt is never moved.
            to_prompt = _product(self.grid.to_grid(query_S), cache.prompt_keys)
            scores = torch.cat([to_prompt, self.grid.to_grid(scores)], 3)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        hidden = self._masks(spec.window, repeats)
        weights = (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(3)
        if self.shared_prefix:
            on_prompt, weights = weights.split([cache.prompt_keys.shape[3], self.used], 3)
            read = self.grid.from_grid(_product(on_prompt, cache.prompt_values), repeats)
            out = _product(self.grid.from_grid(weights, repeats), response_values).add_(read)
        else:
            out = _product(weights, response_values)
        return out.flatten(1, 2)

    def _write(self, cache: LayerCache, key_S: Tensor, value_S: Tensor) -> None:
        """Put each slot's key and value behind those that are in its strips."""
        if self.aligned:
            cache.response_keys.select(3, self.used - 1).copy_(key_S)
            cache.response_values.select(2, self.used - 1).copy_(value_S)
        else:
            slot_S = torch.arange(len(key_S), device=key_S.device)
            cache.response_keys[slot_S, :, :, self.at_S] = key_S
            cache.response_values[slot_S, :, self.at_S] = value_S

    def _masks(self, window: int | None, repeats: int) -> Tensor | None:
        """What each query must not see, as scores are laid out; None: it sees everything."""
        if window is not None and window >= self.longest:
            window = None
        if window is None and self.aligned and self.grid.full:
            return None
        if window not in self._hidden:
            prompt_S, own_S = self.grid.prompt_S[:, None], self.at_S[:, None]
            prompt = torch.arange(self.cache.prompt_capacity, device=own_S.device)
            own = torch.arange(self.used, device=own_S.device)
            hidden = torch.cat([prompt >= prompt_S, own > own_S], 1)
            if window is not None:
                distance = torch.cat([prompt_S + own_S - prompt, own_S - own], 1)
                hidden = hidden | (distance >= window)
            hidden = hidden[:, None, None]
            if self.shared_prefix:
                hidden = self.grid.to_grid(hidden.expand(-1, -1, repeats, -1))
            self._hidden[window] = hidden
        return self._hidden[window]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of four dimensions, the first two of them the same: ``matmul`` with less ado."""
    out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1))
    return out.view(a.shape[0], a.shape[1], out.shape[1], out.shape[2])


def _padded(keys: Tensor, values: Tensor, more: int, copies: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values with room for ``more`` tokens, each row so many times."""
    return _with_room(keys, 3, more, copies), _with_room(values, 2, more, copies)


def _with_room(x: Tensor, dim: int, more: int, copies: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] += more
    out = x.new_empty(len(x), copies, *shape[1:])
    held, prompt_capacity = out.split([x.shape[dim], more], dim + 1)
    held.copy_(x[:, None])
    # Never seen, but a weight of zero times what is no number is no number.
    prompt_capacity.zero_()
    return out.flatten(0, 1)


def _joined(held: LayerCache, fresh: LayerCache) -> LayerCache:
    """Both caches in one, padded to the longer prompt and the longer strip."""

    def join(name: str) -> tuple[Tensor, Tensor]:
        pairs = [(getattr(x, f"{name}_keys"), getattr(x, f"{name}_values")) for x in (held, fresh)]
        longest = max(values.shape[2] for _, values in pairs)
        grown = [_padded(*pair, longest - pair[1].shape[2]) for pair in pairs]
        keys, values = zip(*grown, strict=True)
        return torch.cat(keys), torch.cat(values)

    return LayerCache(*join("prompt"), *join("response"))
