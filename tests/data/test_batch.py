"""The packed sequence of groups, compared with one written token by token."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.batch import Batch
from trivium.data.group import Group

TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=4)
GROUPS = st.lists(
    st.builds(Group, TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=4
)


def test_packed_sequence_by_hand() -> None:
    batch = Batch.of([Group([10, 11], [[20], [21, 22]]), Group([12], [[23, 24]])])
    assert batch.tokens_L.tolist() == [10, 11, 20, 21, 22, 12, 23, 24]
    assert batch.positions_L.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert batch.targets_T.tolist() == [20, 21, 22, 23, 24]
    assert batch.token_positions_T.tolist() == [2, 3, 4, 6, 7]
    assert batch.logit_positions_T.tolist() == [1, 1, 3, 5, 6]
    assert batch.last_tokens_N.tolist() == [2, 4, 7]
    assert batch.sizes_G.tolist() == [2, 1]
    assert batch.lengths_N.tolist() == [1, 2, 2]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(GROUPS)
def test_maps_agree_with_a_token_by_token_packing(groups: list[Group]) -> None:
    batch = Batch.of(groups)
    packed: list[tuple[int, int]] = []  # token and position
    token_positions, logit_positions, starts, prompt_starts = [], [], [], []
    for group in groups:
        prompt_starts.append(len(packed))
        packed += [(token, position) for position, token in enumerate(group.prompt)]
        prompt_end = len(packed) - 1
        for response in group.responses:
            starts.append(len(packed))
            for t, token in enumerate(response):
                logit_positions.append(prompt_end if t == 0 else len(packed) - 1)
                token_positions.append(len(packed))
                packed.append((token, len(group.prompt) + t))
    assert list(zip(batch.tokens_L.tolist(), batch.positions_L.tolist(), strict=True)) == packed
    assert batch.token_positions_T.tolist() == token_positions
    assert batch.logit_positions_T.tolist() == logit_positions
    assert batch.starts_N.tolist() == starts
    assert batch.prompt_starts_G.tolist() == prompt_starts
    assert batch.prompt_lengths_G.tolist() == [len(group.prompt) for group in groups]
    assert torch.equal(batch.targets_T, batch.tokens_L[batch.token_positions_T])


def test_moving_a_batch_keeps_every_field() -> None:
    batch = Batch.of([Group([1, 2], [[3], [4, 5]])])
    moved = batch.to("cpu")
    for f in fields(batch):
        assert torch.equal(getattr(moved, f.name), getattr(batch, f.name))


def test_empty_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        Group([], [[1]])
    for responses in ([], [[1], []]):
        with pytest.raises(ValueError, match="every response at least one token"):
            Group([1], responses)
    with pytest.raises(ValueError, match="at least one group"):
        Batch.of([])
