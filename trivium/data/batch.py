"""Packed batches of groups: each prompt once, its responses after it, no padding.

A group is one prompt and its n ≥ 1 responses. A batch packs the tokens of several groups into one
sequence, each prompt followed by its responses, and stores the index of every part. How a model
reads the packed sequence, and how attention separates the responses, is in ``models.attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain, groupby
from typing import Self

import torch
from torch import Tensor

from trivium.data.group import Group
from trivium.data.micro_batching import pack
from trivium.maths.ragged import repeat_per_segment, segment_ids, segment_starts


@dataclass(frozen=True)
class Batch:
    """Groups in one packed sequence of L tokens, and the maps to the flat response tokens.

    Attributes:
        tokens_L, positions_L: token ids and position ids; the position ids of each response
            continue those of its prompt.
        prompt_lengths_G, sizes_G: number of tokens of each prompt, of responses of each group.
        lengths_N: number of tokens of each response.
        prompt_starts_G, starts_N: index of each prompt's and each response's first token in the
            packed sequence.
        targets_T: the response tokens, flat.
        token_positions_T: index of each response token in the packed sequence.
        logit_positions_T: index of the token whose logits predict each response token: the
            prompt's last token for the first one, the previous response token for the others.
    """

    tokens_L: Tensor
    positions_L: Tensor
    prompt_lengths_G: Tensor
    sizes_G: Tensor
    lengths_N: Tensor
    prompt_starts_G: Tensor
    starts_N: Tensor
    targets_T: Tensor
    token_positions_T: Tensor
    logit_positions_T: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Batch:
        """Pack ``groups`` into one sequence (CPU tensors)."""
        if not groups:
            raise ValueError("a batch needs at least one group")
        prompt_lengths_G = torch.tensor([len(g.prompt) for g in groups])
        sizes_G = torch.tensor([len(g.responses) for g in groups])
        lengths_N = torch.tensor([len(r) for g in groups for r in g.responses])
        segments = [s for g in groups for s in (g.prompt, *g.responses)]
        segment_lengths = torch.tensor([len(s) for s in segments])
        starts = segment_starts(segment_lengths)
        prompt_segments_G = segment_starts(sizes_G + 1)
        is_response = torch.ones(len(segments), dtype=torch.bool)
        is_response[prompt_segments_G] = False
        prompt_starts_G, starts_N = starts[prompt_segments_G], starts[is_response]

        tokens_L = torch.tensor(list(chain.from_iterable(segments)))
        first_position = torch.zeros(len(segments), dtype=torch.long)
        first_position[is_response] = repeat_per_segment(prompt_lengths_G, sizes_G)
        positions_L = torch.arange(len(tokens_L)) + repeat_per_segment(
            first_position - starts, segment_lengths
        )
        response_starts_T = segment_starts(lengths_N)
        offset_T = torch.arange(int(lengths_N.sum())) - repeat_per_segment(
            response_starts_T, lengths_N
        )
        token_positions_T = repeat_per_segment(starts_N, lengths_N) + offset_T
        logit_positions_T = token_positions_T - 1
        logit_positions_T[response_starts_T] = repeat_per_segment(
            prompt_starts_G + prompt_lengths_G - 1, sizes_G
        )
        return cls(
            tokens_L=tokens_L,
            positions_L=positions_L,
            prompt_lengths_G=prompt_lengths_G,
            sizes_G=sizes_G,
            lengths_N=lengths_N,
            prompt_starts_G=prompt_starts_G,
            starts_N=starts_N,
            targets_T=tokens_L[token_positions_T],
            token_positions_T=token_positions_T,
            logit_positions_T=logit_positions_T,
        )

    @property
    def last_tokens_N(self) -> Tensor:
        """Index of each response's last token in the packed sequence, ``[N]``."""
        return self.starts_N + self.lengths_N - 1

    @property
    def row_lengths_N(self) -> Tensor:
        """Number of tokens of each response with its prompt, ``[N]``."""
        return repeat_per_segment(self.prompt_lengths_G, self.sizes_G) + self.lengths_N

    def rows(self) -> list[Group]:
        """Return each response with its own copy of the prompt."""
        prompt_starts_N = repeat_per_segment(self.prompt_starts_G, self.sizes_G).tolist()
        prompt_lengths_N = repeat_per_segment(self.prompt_lengths_G, self.sizes_G).tolist()
        tokens = self.tokens_L.tolist()
        return [
            Group(tokens[p : p + m], [tokens[r : r + n]])
            for p, m, r, n in zip(
                prompt_starts_N,
                prompt_lengths_N,
                self.starts_N.tolist(),
                self.lengths_N.tolist(),
                strict=True,
            )
        ]

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch with its tensors on ``device``."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Grouped:
    """Groups with tensors that belong to their responses; subclasses add the tensors.

    A field whose name ends in ``_N`` has one entry per response, a field whose name ends in ``_T``
    one entry per response token. ``select`` indexes all of them.
    """

    groups: list[Group]

    @property
    def sizes_G(self) -> Tensor:
        """Number of responses of each group, ``[G]``."""
        return torch.tensor([len(g.responses) for g in self.groups])

    @property
    def lengths_N(self) -> Tensor:
        """Number of tokens of each response, ``[N]``."""
        return torch.tensor([len(r) for g in self.groups for r in g.responses])

    @property
    def tokens(self) -> int:
        """Number of tokens of the packed sequence: each prompt once, and all responses."""
        return sum(len(g.prompt) + sum(map(len, g.responses)) for g in self.groups)

    def select(self, responses: Sequence[int]) -> Self:
        """Return only these responses (flat indices, ascending), with their prompts."""
        group_of = segment_ids(self.sizes_G).tolist()
        flat = [r for g in self.groups for r in g.responses]
        groups = [
            Group(self.groups[g].prompt, [flat[i] for i in members])
            for g, members in groupby(responses, key=group_of.__getitem__)
        ]
        index_N = torch.as_tensor(responses, dtype=torch.long)
        index_T = token_index(self.lengths_N, index_N)
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "groups"}
        for name, tensor in tensors.items():
            if tensor is not None:
                index = index_T if name.endswith("_T") else index_N
                tensors[name] = tensor.index_select(0, index.to(tensor.device))
        return replace(self, groups=groups, **tensors)

    def split(self, max_tokens: int, *, whole_groups: bool = False) -> list[list[int]]:
        """Return the response indices of micro-batches of at most ``max_tokens`` packed tokens.

        The micro-batches are few, cost about the same, and hold groups of similar length. A group
        is split over micro-batches, with its prompt repeated, only if it exceeds ``max_tokens``
        alone, and never with ``whole_groups``. A single response may exceed ``max_tokens``.
        """
        return pack(self.groups, max_tokens, whole_groups=whole_groups)

    def halves(self, *, whole_groups: bool = False) -> tuple[list[int], list[int]] | None:
        """Return the response indices of two halves with about equal numbers of response tokens.

        Return None for a single response or, with ``whole_groups``, for a single group.
        """
        count = len(self.lengths_N)
        ends = self.sizes_G.cumsum(0).tolist() if whole_groups else range(1, count + 1)
        tokens_before = [0, *accumulate(self.lengths_N.tolist())]
        candidates = [end for end in ends if end < count]
        if not candidates:
            return None
        middle = min(candidates, key=lambda end: abs(2 * tokens_before[end] - tokens_before[-1]))
        return list(range(middle)), list(range(middle, count))


def token_index(lengths_N: Tensor, responses: Tensor) -> Tensor:
    """Return the flat token indices of these responses, in their order."""
    lengths = lengths_N[responses]
    start = segment_starts(lengths_N)[responses] - segment_starts(lengths)
    return torch.arange(int(lengths.sum())) + repeat_per_segment(start, lengths)
