"""The key-value cache of growing rows: one copy of each prompt, one strip per row.

``admit`` reads prompts, ``advance`` feeds every row one token, ``keep`` lets rows go. Each returns
final hidden states, so the caller owns the head and the drawing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.models import flops
from trivium.models.attention import Rule, attention, last_layer
from trivium.models.policy import Policy
from trivium.models.rows import Rows
from trivium.models.shared_attention import Block, SharedAttention, plan_rows

IDLE_SHARE = 1 / 8
STRIP = 32
SHORT = 64
"""Up to this many tokens, a copy of the prompt per row is cheaper than attention in two parts."""


@dataclass
class LayerCache:
    """Keys and values of one layer: of prompts ``[G, heads, P, width]``, of rows' own tokens."""

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor


class PromptLayout:
    """Each prompt attends to itself; its keys and values are kept, and its last state is read."""

    def __init__(self, starts_G: Tensor, lengths_G: Tensor, last: int) -> None:
        self.rows = Rows(starts_G, lengths_G)
        self.read = starts_G + lengths_G - 1
        self.last = last
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._spans = starts_G, lengths_G

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, rule: Rule
    ) -> Tensor:
        keys, values = (
            self.rows.gather(key_LHD).contiguous(),
            self.rows.gather(value_LHD).contiguous(),
        )
        self.kept[layer] = keys, values
        visible = None
        if rule.window is not None and rule.window < self.rows.longest:
            at = torch.arange(self.rows.longest, device=query_LHD.device)
            behind = at[:, None] - at
            visible = (behind >= 0) & (behind < rule.window)
        elif rule.softcap is None and query_LHD.device.type == "cpu":
            blocks = self._last_blocks if layer == self.last else self._blocks
            return SharedAttention.apply(query_LHD, key_LHD, value_LHD, blocks, rule.scaling)
        out = attention(self.rows.gather(query_LHD), keys, values, visible, rule)
        return self.rows.flatten(out).index_select(0, self._to_line)

    @cached_property
    def _blocks(self) -> list[Block]:
        return plan_rows(*self._spans)

    @cached_property
    def _last_blocks(self) -> list[Block]:
        return plan_rows(*self._spans, self.read)

    @cached_property
    def _to_line(self) -> Tensor:
        order = self.rows.line_index
        return torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )


class RowCache:
    """Rows that grow one token at a time over shared prompts.

    A row lives in a *slot* of the strips. Slots of rows that left are fed along until an eighth of
    them is idle; then all strips are moved together. So shapes change seldom: a product's kernel is
    made for a number of rows and then kept, and every step of a new one would make and keep more.

    Args:
        policy: whose rows they are.
        apart: keep prompts apart from the rows that share them; otherwise each row's strip begins
            with its prompt.
    """

    def __init__(self, policy: Policy, *, apart: bool = True) -> None:
        self.apart = apart
        self.forward, self.count = policy.lean_pass(), flops.counter(policy.backbone)
        self.last = last_layer(policy.backbone)
        self.device = policy.device
        self.layers: dict[int, LayerCache] = {}
        self.prompt_lengths_G = torch.zeros(0, dtype=torch.long, device=self.device)
        self.group_of_S = torch.zeros(0, dtype=torch.long, device=self.device)
        self.length_S = torch.zeros(0, dtype=torch.long, device=self.device)
        self.slot_of_R = torch.zeros(0, dtype=torch.long, device=self.device)
        self._lay_out()

    def admit(self, prompts: list[list[int]], samples: int) -> Tensor:
        """Read ``prompts``, open ``samples`` rows for each, return their last states ``[G, D]``."""
        batch = Batch.of([Group(tokens, [[0]]) for tokens in prompts])
        lengths_G = batch.prompt_lengths_G.to(self.device)
        starts_G = torch.cumsum(lengths_G, 0) - lengths_G
        line = torch.tensor([token for tokens in prompts for token in tokens], device=self.device)
        position_L = torch.arange(len(line), device=self.device) - starts_G.repeat_interleave(
            lengths_G
        )
        layout = PromptLayout(starts_G, lengths_G, self.last)
        with flops.apart():
            hidden_LD = self.forward(line, position_L, layout)
        self.count(position_L)
        self._compact()
        self._store(layout, samples)
        groups = len(self.prompt_lengths_G)
        fresh = torch.arange(groups, groups + len(prompts), device=self.device)
        held_G = torch.zeros_like(lengths_G) if self.apart else lengths_G
        self.prompt_lengths_G = torch.cat([self.prompt_lengths_G, lengths_G - held_G])
        self.group_of_S = torch.cat([self.group_of_S, fresh.repeat_interleave(samples)])
        self.length_S = torch.cat([self.length_S, held_G.repeat_interleave(samples)])
        self.slot_of_R = torch.arange(len(self.group_of_S), device=self.device)
        self._lay_out()
        return hidden_LD[layout.read]

    def advance(self, tokens_R: Tensor) -> Tensor:
        """Feed every row its next token; final hidden states ``[R, D]``."""
        self._lengthen()
        slot_R = self.slot_of_R
        tokens_S = torch.zeros_like(self.length_S).index_copy_(0, slot_R, tokens_R.to(self.device))
        position_S = self.prompt_lengths_G[self.group_of_S] + self.length_S
        with flops.apart():
            hidden_SD = self.forward(tokens_S, position_S, AdvanceLayout(self))
        self.count(position_S[slot_R])
        self.length_S[slot_R] += 1
        return hidden_SD.index_select(0, slot_R)

    def keep(self, rows: list[int]) -> None:
        """Let all rows but these (indices, ascending) go."""
        self.slot_of_R = self.slot_of_R[torch.tensor(rows, dtype=torch.long, device=self.device)]
        if len(rows) < (1 - IDLE_SHARE) * len(self.group_of_S):
            self._compact()

    def _store(self, layout: PromptLayout, samples: int) -> None:
        """Add prompts' caches and strips for their rows."""
        for index, (keys, values) in layout.kept.items():
            if self.apart:
                strips = keys.new_zeros(len(keys) * samples, keys.shape[1], STRIP, keys.shape[3])
                fresh = LayerCache(keys, values, strips, strips.clone())
            else:
                strips = (
                    F.pad(x.repeat_interleave(samples, 0), (0, 0, 0, STRIP)) for x in (keys, values)
                )
                fresh = LayerCache(keys[:, :, :0], values[:, :, :0], *strips)
            held = self.layers.get(index)
            self.layers[index] = fresh if held is None else _joined(held, fresh)

    @property
    def room(self) -> int:
        """Tokens that the longest prompt may have, where prompts lie apart."""
        return next((cache.prompt_keys.shape[2] for cache in self.layers.values()), 0)

    def _lay_out(self) -> None:
        self.grid = Grid(self.group_of_S, self.prompt_lengths_G, self.room)

    def _lengthen(self) -> None:
        """Double the strips when the longest row has filled its own."""
        longest = int(self.length_S[self.slot_of_R].max())
        for cache in self.layers.values():
            capacity = cache.own_keys.shape[2]
            if longest >= capacity:
                cache.own_keys = F.pad(cache.own_keys, (0, 0, 0, capacity))
                cache.own_values = F.pad(cache.own_values, (0, 0, 0, capacity))

    def _compact(self) -> None:
        """Move the rows' strips together and forget prompts without rows."""
        if len(self.slot_of_R) == len(self.group_of_S):
            return
        slots = self.slot_of_R
        groups, self.group_of_S = torch.unique(self.group_of_S[slots], return_inverse=True)
        self.length_S = self.length_S[slots]
        gone = len(groups) < len(self.prompt_lengths_G)
        for cache in self.layers.values():
            if gone:
                cache.prompt_keys = cache.prompt_keys[groups]
                cache.prompt_values = cache.prompt_values[groups]
            # What is beyond a strip's rows is stale and never seen: whole strips move fastest.
            cache.own_keys = cache.own_keys.index_select(0, slots)
            cache.own_values = cache.own_values.index_select(0, slots)
        self.prompt_lengths_G = self.prompt_lengths_G[groups]
        self.slot_of_R = torch.arange(len(slots), device=self.device)
        self._lay_out()


class Grid:
    """Slots laid out by groups: one line for each group, as long as the largest.

    Attributes:
        groups, most: the lines, and the slots of the largest group.
        whole: every line is full.
        place_S: where in the grid each slot is.
        full: every prompt is as long as the room for it.
    """

    def __init__(self, group_of_S: Tensor, prompt_lengths_G: Tensor, room: int) -> None:
        sizes_G = torch.bincount(group_of_S, minlength=len(prompt_lengths_G))
        self.groups, self.most = len(sizes_G), int(sizes_G.max()) if len(sizes_G) else 0
        self.whole = self.groups * self.most == len(group_of_S)
        start_S = (torch.cumsum(sizes_G, 0) - sizes_G)[group_of_S]
        at_S = torch.arange(len(group_of_S), device=group_of_S.device)
        self.place_S = group_of_S * self.most + at_S - start_S
        self.full = bool((prompt_lengths_G == room).all())

    def lay_out(self, x_S: Tensor) -> Tensor:
        """``[slots, heads, repeats, w] -> [groups, heads, most·repeats, w]``."""
        if not self.whole:
            padded = x_S.new_zeros(self.groups * self.most, *x_S.shape[1:])
            x_S = padded.index_copy(0, self.place_S, x_S)
        return x_S.unflatten(0, (self.groups, self.most)).transpose(1, 2).flatten(2, 3)

    def take_in(self, x_G: Tensor, repeats: int) -> Tensor:
        """``[groups, heads, most·repeats, w] -> [slots, heads, repeats, w]``."""
        x_S = x_G.unflatten(2, (self.most, repeats)).transpose(1, 2).flatten(0, 1)
        return x_S if self.whole else x_S.index_select(0, self.place_S)


class AdvanceLayout:
    """Each slot's one new token attends to its prompt, where that lies apart, and to its strip."""

    read: Tensor | None = None

    def __init__(self, cache: RowCache) -> None:
        self.cache = cache
        length_R = cache.length_S[cache.slot_of_R]
        shortest, longest = (int(x) for x in length_R.aminmax())
        self.used, self.level = longest + 1, shortest == longest
        # No one reads what an idle slot sees: it must only need no mask where rows do not.
        at_S = torch.full_like(cache.length_S, longest)
        self.at_S = at_S.index_copy_(0, cache.slot_of_R, length_R)
        self.apart, self.grid = cache.apart, cache.grid
        self._hidden: dict[int | None, Tensor | None] = {}

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, rule: Rule
    ) -> Tensor:
        cache = self.cache.layers[layer]
        self._write(cache.own_keys, key_LHD)
        self._write(cache.own_values, value_LHD)
        own_keys = cache.own_keys.narrow(2, 0, self.used)
        own_values = cache.own_values.narrow(2, 0, self.used)
        slots, heads, width = key_LHD.shape
        query_S = (query_LHD * rule.scaling).view(slots, heads, -1, width)
        repeats = query_S.shape[2]
        scores = _product(query_S, own_keys.transpose(2, 3))
        if self.apart:
            # Laid out by groups, so that what is as wide as a prompt is never moved.
            to_prompt = _product(self.grid.lay_out(query_S), cache.prompt_keys.transpose(2, 3))
            scores = torch.cat([to_prompt, self.grid.lay_out(scores)], 3)
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        hidden = self._masks(rule.window, repeats)
        weights = (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(3)
        if self.apart:
            on_prompt, weights = weights.split([cache.prompt_keys.shape[2], self.used], 3)
            read = self.grid.take_in(_product(on_prompt, cache.prompt_values), repeats)
            out = _product(self.grid.take_in(weights, repeats), own_values).add_(read)
        else:
            out = _product(weights, own_values)
        return out.flatten(1, 2)

    def _write(self, strips: Tensor, new_S: Tensor) -> None:
        """Put each slot's key or value behind those that are in its strip."""
        if self.level:
            strips.select(2, self.used - 1).copy_(new_S)
        else:
            strips[torch.arange(len(new_S), device=new_S.device), :, self.at_S] = new_S

    def _masks(self, window: int | None, repeats: int) -> Tensor | None:
        """What each query must not see, as scores are laid out; None: it sees everything."""
        if window is None and self.level and self.grid.full:
            return None
        if window not in self._hidden:
            cache = self.cache
            prompt_S = cache.prompt_lengths_G[cache.group_of_S][:, None]
            own_S = self.at_S[:, None]
            prompt = torch.arange(cache.room, device=cache.device)
            own = torch.arange(self.used, device=cache.device)
            hidden = torch.cat([prompt >= prompt_S, own > own_S], 1)
            if window is not None:
                distance = torch.cat([prompt_S + own_S - prompt, own_S - own], 1)
                hidden = hidden | (distance >= window)
            hidden = hidden[:, None, None] if bool(hidden.any()) else None
            if self.apart and hidden is not None:
                hidden = self.grid.lay_out(hidden.expand(-1, -1, repeats, -1))
            self._hidden[window] = hidden
        return self._hidden[window]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of four dimensions, the first two of them the same: ``matmul`` with less ado."""
    out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1))
    return out.view(a.shape[0], a.shape[1], out.shape[1], out.shape[2])


def _joined(held: LayerCache, fresh: LayerCache) -> LayerCache:
    """Both caches in one, padded to the longer prompt and the longer strip."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        longest = max(a.shape[2], b.shape[2])
        return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in (a, b)])

    return LayerCache(
        join(held.prompt_keys, fresh.prompt_keys),
        join(held.prompt_values, fresh.prompt_values),
        join(held.own_keys, fresh.own_keys),
        join(held.own_values, fresh.own_values),
    )
