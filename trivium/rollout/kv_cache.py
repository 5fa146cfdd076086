"""Key-value cache of responses that grow together, with one copy of each shared prompt.

``admit`` processes prompts, ``advance`` feeds each row its next token, ``keep`` drops rows. The
first two return final hidden states: the caller applies the head and samples. A row continues its
group's prompt, or a prefix of it: the steps of one solution share the keys and values of their
common prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.maths.ragged import repeat_per_segment
from trivium.models import flops
from trivium.models.group_layout import dense_attention, window_mask
from trivium.models.layout import AttentionSpec
from trivium.models.policy import Policy
from trivium.models.segments import PaddedSegments

BLOCK_TOKENS = 32


@dataclass
class LayerCache:
    """Keys and values of one layer, of prompts and of responses.

    Values are ``[G, heads, P, width]``. Keys are ``[G, heads, width, P]``: a product with few
    queries then takes half the time.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    response_keys: Tensor
    response_values: Tensor


class PromptLayout:
    """Each prompt attends to itself; its keys and values are kept.

    Args:
        starts_G, lengths_G: where each prompt begins in the packed sequence, and how long it is.
    """

    def __init__(self, starts_G: Tensor, lengths_G: Tensor) -> None:
        self.rows = PaddedSegments(starts_G, lengths_G)
        self.longest = self.rows.longest
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, query_LHD: Tensor, key_LHD: Tensor, value_LHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        keys, values = self.rows.gather(key_LHD), self.rows.gather(value_LHD).contiguous()
        self.cached[layer] = keys.transpose(2, 3).contiguous(), values
        visible = None
        if spec.window is not None and spec.window < self.longest:
            visible = window_mask(torch.arange(self.longest, device=query_LHD.device), spec.window)
        out = dense_attention(self.rows.gather(query_LHD), keys, values, visible, spec)
        return self.rows.flatten(out).index_select(0, self._packed_order)

    @cached_property
    def _packed_order(self) -> Tensor:
        return self.rows.token_index.argsort()


class KVCache:
    """Rows that grow one token at a time over shared prompts.

    A row occupies a *slot* of the response cache. Slots of finished rows stay and are computed
    until an eighth of all slots is idle; then the cache is compacted. So tensor shapes change
    seldom: a matrix product compiles and keeps a kernel for each number of rows.

    All lengths are known on the host, so nothing here waits for a GPU.

    Args:
        policy: the policy that computes the rows.
    """

    idle_share = 1 / 8

    def __init__(self, policy: Policy) -> None:
        self.forward, self.count = policy.decode_model(), flops.counter(policy.backbone)
        self.device = policy.device
        self.layers: dict[int, LayerCache] = {}
        self.num_groups = 0
        self.group_of_S = torch.zeros(0, dtype=torch.long)
        self.prompt_length_S = torch.zeros(0, dtype=torch.long)
        self.length_S = torch.zeros(0, dtype=torch.long)
        self.slot_of_R = torch.zeros(0, dtype=torch.long)
        self._update_grid()

    def admit(
        self,
        prompts: list[list[int]],
        samples: int,
        branches: Sequence[Sequence[int]] | None = None,
    ) -> Tensor:
        """Process ``prompts`` and open ``samples`` rows for each branch; return ``[B, D]``.

        ``branches`` has, for each prompt, the lengths of the prefixes that rows continue; by
        default rows continue whole prompts. Returns the state at the end of each branch's prefix.
        """
        branches = [[len(tokens)] for tokens in prompts] if branches is None else branches
        lengths_G = torch.tensor([len(tokens) for tokens in prompts])
        starts_G = torch.cumsum(lengths_G, 0) - lengths_G
        tokens_L = torch.tensor([token for tokens in prompts for token in tokens])
        position_L = torch.arange(len(tokens_L)) - repeat_per_segment(starts_G, lengths_G)
        layout = PromptLayout(starts_G.to(self.device), lengths_G.to(self.device))
        with flops.paused():
            hidden_LD = self.forward(tokens_L.to(self.device), position_L.to(self.device), layout)
        self.count(position_L)
        self._compact()
        counts_G = torch.tensor([len(lengths) for lengths in branches])
        length_B = torch.tensor([length for lengths in branches for length in lengths])
        self._store(layout, len(length_B) * samples)
        new_groups_B = repeat_per_segment(self.num_groups + torch.arange(len(prompts)), counts_G)
        self.num_groups += len(prompts)
        self.group_of_S = torch.cat([self.group_of_S, new_groups_B.repeat_interleave(samples)])
        new_lengths_S = length_B.repeat_interleave(samples)
        self.prompt_length_S = torch.cat([self.prompt_length_S, new_lengths_S])
        self.length_S = torch.cat([self.length_S, torch.zeros_like(new_lengths_S)])
        self.slot_of_R = torch.arange(len(self.group_of_S))
        self._update_grid()
        last_B = repeat_per_segment(starts_G, counts_G) + length_B - 1
        return hidden_LD[last_B.to(self.device)]

    def advance(self, tokens_R: Tensor) -> Tensor:
        """Feed every row its next token; return final hidden states ``[R, D]``."""
        slot_R, length_R = self.slot_of_R, self.length_S[self.slot_of_R]
        shortest, longest = (int(length) for length in length_R.aminmax())
        self._lengthen(longest)
        tokens_S = torch.zeros_like(self.length_S).index_copy_(0, slot_R, tokens_R.cpu())
        # Idle slots get the longest length, so that they need no mask where rows need none.
        place_S = torch.full_like(self.length_S, longest).index_copy_(0, slot_R, length_R)
        with flops.paused():
            hidden_SD = self._step(tokens_S, place_S, longest + 1, shortest == longest)
        self.count(self.prompt_length_S[slot_R] + length_R)
        self.length_S[slot_R] += 1
        return hidden_SD.index_select(0, slot_R.to(self.device))

    def _step(self, tokens_S: Tensor, place_S: Tensor, used: int, aligned: bool) -> Tensor:
        """Return final hidden states of a new token in every slot (see ``AdvanceLayout``)."""
        layout = AdvanceLayout(self, place_S.to(self.device), used, aligned)
        return self.forward(tokens_S.to(self.device), layout.position_S, layout)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows except these (ascending indices)."""
        self.slot_of_R = self.slot_of_R[torch.tensor(rows, dtype=torch.long)]
        if len(rows) < (1 - self.idle_share) * len(self.group_of_S):
            self._compact()

    def _store(self, layout: PromptLayout, rows: int) -> None:
        """Add the prompts' keys and values, and slots for their rows."""
        for index, (keys, values) in layout.cached.items():
            _, heads, width, _ = keys.shape
            response_keys = keys.new_zeros(rows, heads, width, BLOCK_TOKENS)
            response_values = keys.new_zeros(rows, heads, BLOCK_TOKENS, width)
            new = LayerCache(keys, values, response_keys, response_values)
            old = self.layers.get(index)
            self.layers[index] = new if old is None else _joined(old, new)

    @property
    def prompt_capacity(self) -> int:
        """Tokens per prompt in the shared prompts' cache."""
        return next((cache.prompt_values.shape[2] for cache in self.layers.values()), 0)

    @property
    def response_capacity(self) -> int:
        """Tokens per slot in the response cache."""
        return next((cache.response_values.shape[2] for cache in self.layers.values()), 0)

    def _update_grid(self) -> None:
        self.grid = SlotGrid(
            self.group_of_S,
            self.num_groups,
            self.prompt_length_S,
            self.prompt_capacity,
            self.device,
        )

    def _lengthen(self, longest: int) -> None:
        """Double the space for responses when the longest row has filled its slot."""
        more = self.response_capacity
        if longest >= self.response_capacity:
            for cache in self.layers.values():
                extended = _extended(cache.response_keys, cache.response_values, more)
                cache.response_keys, cache.response_values = extended

    def _compact(self) -> None:
        """Remove idle slots, and prompts without rows."""
        if len(self.slot_of_R) == len(self.group_of_S):
            return
        slots, device_slots = self.slot_of_R, self.slot_of_R.to(self.device)
        groups, self.group_of_S = torch.unique(self.group_of_S[slots], return_inverse=True)
        self.prompt_length_S, self.length_S = self.prompt_length_S[slots], self.length_S[slots]
        fewer_groups = len(groups) < self.num_groups
        device_groups = groups.to(self.device)
        for cache in self.layers.values():
            if fewer_groups:
                cache.prompt_keys = cache.prompt_keys[device_groups]
                cache.prompt_values = cache.prompt_values[device_groups]
            # Copying whole slots is fastest; what follows a row's tokens is never visible.
            cache.response_keys = cache.response_keys.index_select(0, device_slots)
            cache.response_values = cache.response_values.index_select(0, device_slots)
        self.num_groups = len(groups)
        self.slot_of_R = torch.arange(len(slots))
        self._update_grid()


class SlotGrid:
    """Slots arranged by group: one grid row per group, as wide as the largest group.

    Attributes:
        groups, width: the number of groups, and of slots in the largest one.
        full: every group has ``width`` slots.
        cell_S: the grid cell of each slot.
        prompt_length_S: how many tokens of its group's prompt each slot continues.
        equal_prompts: every slot continues a prompt that fills the prompt cache's capacity.
    """

    def __init__(
        self,
        group_of_S: Tensor,
        groups: int,
        prompt_length_S: Tensor,
        prompt_capacity: int,
        device: torch.device,
    ) -> None:
        sizes_G = torch.bincount(group_of_S, minlength=groups)
        self.groups, self.width = len(sizes_G), int(sizes_G.max()) if len(sizes_G) else 0
        self.full = self.groups * self.width == len(group_of_S)
        start_S = (torch.cumsum(sizes_G, 0) - sizes_G)[group_of_S]
        column_S = torch.arange(len(group_of_S)) - start_S
        self.cell_S = (group_of_S * self.width + column_S).to(device)
        self.prompt_length_S = prompt_length_S.to(device)
        self.equal_prompts = bool((prompt_length_S == prompt_capacity).all())

    def to_grid(self, x_S: Tensor) -> Tensor:
        """``[slots, heads, repeats, w] -> [groups, heads, width·repeats, w]``."""
        if not self.full:
            padded = x_S.new_zeros(self.groups * self.width, *x_S.shape[1:])
            x_S = padded.index_copy(0, self.cell_S, x_S)
        return x_S.unflatten(0, (self.groups, self.width)).transpose(1, 2).flatten(2, 3)

    def from_grid(self, x_G: Tensor, repeats: int) -> Tensor:
        """``[groups, heads, width·repeats, w] -> [slots, heads, repeats, w]``."""
        x_S = x_G.unflatten(2, (self.width, repeats)).transpose(1, 2).flatten(0, 1)
        return x_S if self.full else x_S.index_select(0, self.cell_S)


class AdvanceLayout:
    """Each slot's new token attends to its group's prompt and to its slot.

    Args:
        cache: the cache whose slots advance.
        place_S: the place of the new token in each slot.
        used: the number of places that are read, the new token's included.
        aligned: every slot's place is ``used - 1``.
    """

    def __init__(self, cache: KVCache, place_S: Tensor, used: int, aligned: bool) -> None:
        self.cache, self.grid = cache, cache.grid
        self.place_S, self.used, self.aligned = place_S, used, aligned
        self.position_S = self.grid.prompt_length_S + place_S
        self.longest = cache.prompt_capacity + used
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
        # Arrange queries and scores by group, so that keys of prompts are never copied.
        prompt_scores = _product(self.grid.to_grid(query_S), cache.prompt_keys)
        scores = self.grid.to_grid(_product(query_S, response_keys))
        scores = torch.cat([prompt_scores, scores], 3)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        hidden = self._masks(spec.window, repeats)
        weights = (scores if hidden is None else scores.masked_fill(hidden, -torch.inf)).softmax(3)
        prompt_weights, weights = weights.split([cache.prompt_keys.shape[3], self.used], 3)
        prompt_out = _product(prompt_weights, cache.prompt_values)
        out = _product(self.grid.from_grid(weights, repeats), response_values)
        return out.add_(self.grid.from_grid(prompt_out, repeats)).flatten(1, 2)

    def _write(self, cache: LayerCache, key_S: Tensor, value_S: Tensor) -> None:
        """Store each slot's new key and value behind the existing ones."""
        if self.aligned:
            cache.response_keys.select(3, self.used - 1).copy_(key_S)
            cache.response_values.select(2, self.used - 1).copy_(value_S)
        else:
            slot_S = torch.arange(len(key_S), device=key_S.device)
            cache.response_keys[slot_S, :, :, self.place_S] = key_S
            cache.response_values[slot_S, :, self.place_S] = value_S

    def _masks(self, window: int | None, repeats: int) -> Tensor | None:
        """Return the hidden keys of each query in the layout of scores; None: all are visible."""
        if window is not None and window >= self.longest:
            window = None
        if window is None and self.aligned and self.grid.equal_prompts:
            return None
        if window not in self._hidden:
            length_S, place_S = self.grid.prompt_length_S[:, None], self.place_S[:, None]
            prompt = torch.arange(self.cache.prompt_capacity, device=place_S.device)
            own = torch.arange(self.used, device=place_S.device)
            hidden = torch.cat([prompt >= length_S, own > place_S], 1)
            if window is not None:
                distance = torch.cat([length_S + place_S - prompt, place_S - own], 1)
                hidden = hidden | (distance >= window)
            rows = hidden[:, None, None].expand(-1, -1, repeats, -1)
            self._hidden[window] = self.grid.to_grid(rows)
        return self._hidden[window]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of four dimensions, of which the first two are equal; faster than ``matmul``."""
    out = torch.bmm(a.flatten(0, 1), b.flatten(0, 1))
    return out.view(a.shape[0], a.shape[1], out.shape[1], out.shape[2])


def _extended(keys: Tensor, values: Tensor, more: int) -> tuple[Tensor, Tensor]:
    """Return keys and values with space for ``more`` tokens.

    The space is masked, but it must hold zeros: a weight of zero times NaN is NaN.
    """
    return F.pad(keys, (0, more)), F.pad(values, (0, 0, 0, more))


def _joined(old: LayerCache, new: LayerCache) -> LayerCache:
    """Concatenate two caches, extended to the longer prompt and the longer slot."""

    def join(name: str) -> tuple[Tensor, Tensor]:
        pairs = [(getattr(x, f"{name}_keys"), getattr(x, f"{name}_values")) for x in (old, new)]
        longest = max(values.shape[2] for _, values in pairs)
        extended = [_extended(*pair, longest - pair[1].shape[2]) for pair in pairs]
        keys, values = zip(*extended, strict=True)
        return torch.cat(keys), torch.cat(values)

    return LayerCache(*join("prompt"), *join("response"))
