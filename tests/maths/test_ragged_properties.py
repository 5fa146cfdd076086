"""The ragged layout against plain lists: nothing is lost, repeated or moved, however it is cut."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, product
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.equations import AGGREGATIONS
from helpers.tiny_models import family, letters_tokenizer, random_lm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trivium.data import oom
from trivium.data.batch import Batch, Group, Grouped, token_index
from trivium.data.oom import score_all
from trivium.maths.aggregation import token_weights, weighted_sum
from trivium.maths.ragged import repeat_per_segment, segment_ids, segment_starts
from trivium.models.policy import Policy
from trivium.training.experience import (
    Experience,
    epoch_batch,
    first_epoch_micro_batches,
    group_minibatches,
    num_steps,
    plan_updates,
    shuffled,
)

EACH = settings(max_examples=40)

TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=6)
GROUP = st.builds(Group, TOKENS, st.lists(TOKENS, min_size=1, max_size=4))
GROUPS = st.lists(GROUP, min_size=1, max_size=6)


@dataclass(frozen=True, kw_only=True)
class Data(Experience):
    """Experience with a number per response too."""

    score_N: Tensor


@st.composite
def experiences(draw: Any) -> Data:
    """Groups whose tensors all differ, so that an entry in a wrong place is seen."""
    groups = draw(GROUPS)
    count = sum(len(r) for g in groups for r in g.responses)
    marks = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    return Data(
        groups=groups,
        loss_mask_T=marks,
        advantages_T=torch.arange(count, dtype=torch.float64) + 0.5,
        ref_logprobs_T=-torch.arange(count, dtype=torch.float64) if draw(st.booleans()) else None,
        score_N=torch.arange(sum(len(g.responses) for g in groups)) * 10,
    )


def listed(data: Data) -> list[tuple[Any, ...]]:
    """Every response as plain values: its prompt, its tokens and what each tensor says of it."""
    found, at = [], 0
    flat = [(g.prompt, r) for g in data.groups for r in g.responses]
    for number, (prompt, response) in enumerate(flat):
        here = slice(at, at := at + len(response))
        ref = None if data.ref_logprobs_T is None else data.ref_logprobs_T[here].tolist()
        said = data.loss_mask_T[here].tolist(), data.advantages_T[here].tolist(), ref
        found.append((prompt, response, *said, int(data.score_N[number])))
    assert at == len(data.loss_mask_T) and len(found) == len(data.score_N)
    return found


def packed_length(data: Grouped, part: list[int]) -> int:
    return len(Batch.of(data.select(part).groups).tokens_L)


# --- selecting, splitting, joining ----------------------------------------------------------------


@EACH
@given(data=experiences(), draw=st.data())
def test_a_selection_holds_exactly_the_chosen_responses(data: Data, draw: Any) -> None:
    everything = listed(data)
    chosen = draw.draw(st.sets(st.integers(0, len(everything) - 1), min_size=1).map(sorted))
    selected = data.select(chosen)
    assert listed(selected) == [everything[i] for i in chosen]
    inner = draw.draw(st.sets(st.integers(0, len(chosen) - 1), min_size=1).map(sorted))
    assert listed(selected.select(inner)) == [everything[chosen[i]] for i in inner]


@EACH
@given(data=experiences(), max_tokens=st.integers(1, 60), whole=st.booleans())
def test_a_split_holds_every_response_once_within_its_bound(
    data: Data, max_tokens: int, whole: bool
) -> None:
    parts = data.split(max_tokens, whole_groups=whole)
    everything = listed(data)
    assert sorted(i for part in parts for i in part) == list(range(len(everything)))
    group_of = segment_ids(data.sizes_G).tolist()
    for part in parts:
        assert part == sorted(part)
        assert listed(data.select(part)) == [everything[i] for i in part]
        units = {group_of[i] for i in part} if whole else part
        assert packed_length(data, part) <= max_tokens or len(units) == 1
    if whole:
        assert sum(len({group_of[i] for i in part}) for part in parts) == len(data.groups)


@EACH
@given(data=experiences(), max_tokens=st.integers(1, 60), draw=st.data())
def test_scores_of_parts_in_any_order_join_to_the_scores_of_the_whole(
    data: Data, max_tokens: int, draw: Any
) -> None:
    def score(batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.targets_T, batch.positions_L[batch.token_positions_T]

    parts = draw.draw(st.permutations(data.split(max_tokens)))
    tokens_T, positions_T = score_all(data, parts, score)
    flat = [(g.prompt, r) for g in data.groups for r in g.responses]
    assert tokens_T.tolist() == [token for _, response in flat for token in response]
    expected = [len(prompt) + t for prompt, response in flat for t in range(len(response))]
    assert positions_T.tolist() == expected


@EACH
@given(data=experiences(), whole=st.booleans())
def test_halves_hold_every_response_once_and_are_as_even_as_can_be(data: Data, whole: bool) -> None:
    sizes = [len(g.responses) for g in data.groups] if whole else [1] * len(listed(data))
    halves = data.halves(whole_groups=whole)
    if len(sizes) == 1:
        assert halves is None
        return
    first, second = halves or ([], [])
    assert first and second and first + second == list(range(len(listed(data))))
    assert len(first) in accumulate(sizes)
    lengths = data.lengths_N.tolist()

    def uneven(cut: int) -> int:
        return abs(sum(lengths[:cut]) - sum(lengths[cut:]))

    assert uneven(len(first)) == min(map(uneven, list(accumulate(sizes))[:-1]))


@EACH
@given(data=experiences(), room=st.integers(1, 40))
def test_scores_are_the_same_where_memory_runs_out(data: Data, room: int) -> None:
    def score(batch: Batch) -> tuple[Tensor]:
        if len(batch.tokens_L) > room and len(batch.lengths_N) > 1:
            raise MemoryError
        return (batch.targets_T,)

    with mock.patch.object(oom, "release_caches"):
        (tokens_T,) = score_all(data, [list(range(len(data.lengths_N)))], score)
    assert tokens_T.tolist() == [t for g in data.groups for r in g.responses for t in r]


@EACH
@given(st.lists(st.integers(0, 5), max_size=7), st.data())
def test_places_of_segments_are_those_of_nested_lists(lengths: list[int], draw: Any) -> None:
    places, at = [], 0
    for length in lengths:
        places.append(list(range(at, at := at + length)))
    lengths_N = torch.tensor(lengths, dtype=torch.long)
    owners = [n for n, length in enumerate(lengths) for _ in range(length)]
    assert segment_ids(lengths_N).tolist() == owners
    assert segment_starts(lengths_N).tolist() == [sum(lengths[:n]) for n in range(len(lengths))]
    assert repeat_per_segment(torch.arange(len(lengths)) * 7, lengths_N).tolist() == [
        7 * n for n in owners
    ]
    chosen = draw.draw(st.lists(st.sampled_from(range(len(lengths))))) if lengths else []
    index_T = token_index(lengths_N, torch.tensor(chosen, dtype=torch.long))
    assert index_T.tolist() == [place for n in chosen for place in places[n]]


# --- weights --------------------------------------------------------------------------------------


def weights_by_hand(
    lengths: list[int], trained: list[bool], aggregation: str, longest: int
) -> list[float]:
    marks = iter(trained)
    rows = [[next(marks) for _ in range(length)] for length in lengths]
    responses = sum(any(row) for row in rows)
    of_row = {
        "sequence_mean": lambda row: responses * sum(row),
        "token_mean": lambda row: sum(trained),
        "fixed_length": lambda row: responses * longest,
    }[aggregation]
    return [1 / of_row(row) if mark else 0.0 for row in rows for mark in row]


@EACH
@given(data=experiences(), longest=st.integers(6, 9))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_are_those_of_the_formula_and_sum_to_what_it_promises(
    aggregation: str, data: Data, longest: int
) -> None:
    weights_T = token_weights(
        data.lengths_N,
        AGGREGATIONS[aggregation],
        loss_mask_T=data.loss_mask_T,
        max_length=longest,
        dtype=torch.float64,
    )
    trained = data.loss_mask_T.tolist()
    expected = weights_by_hand(data.lengths_N.tolist(), trained, aggregation, longest)
    assert weights_T.tolist() == pytest.approx(expected, rel=1e-12)
    if aggregation == "fixed_length":
        assert float(weights_T.sum()) <= 1 + 1e-12
    else:
        assert float(weights_T.sum()) == pytest.approx(float(any(trained)), rel=1e-12)


@EACH
@given(data=experiences(), max_tokens=st.integers(1, 60), draw=st.data())
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_step_s_weights_and_loss_do_not_depend_on_the_cut(
    aggregation: str, data: Data, max_tokens: int, draw: Any
) -> None:
    parts = draw.draw(st.permutations(data.split(max_tokens)))
    weighted = data.split_with_token_weights(parts, AGGREGATIONS[aggregation], 9)
    loss = sum(weighted_sum(p.advantages_T, p.weights(p.advantages_T)) for p in weighted)
    expected = weights_by_hand(data.lengths_N.tolist(), data.loss_mask_T.tolist(), aggregation, 9)
    pairs = zip(expected, data.advantages_T.tolist(), strict=True)
    assert float(loss) == pytest.approx(math.fsum(w * a for w, a in pairs), rel=1e-5)
    joined = {
        number: part.weights_T[at].tolist()
        for indices, part in zip(parts, weighted, strict=True)
        for number, at in zip(indices, _slices(part.lengths_N), strict=True)
    }
    whole = token_weights(
        data.lengths_N, AGGREGATIONS[aggregation], loss_mask_T=data.loss_mask_T, max_length=9
    )
    assert joined == {n: whole[at].tolist() for n, at in enumerate(_slices(data.lengths_N))}


def _slices(lengths_N: Tensor) -> list[slice]:
    ends = lengths_N.cumsum(0).tolist()
    return [slice(a, b) for a, b in zip([0, *ends][:-1], ends, strict=True)]


# --- plans and epochs -----------------------------------------------------------------------------


@EACH
@given(
    data=experiences(),
    epochs=st.integers(1, 3),
    minibatches=st.integers(1, 8),
    max_tokens=st.integers(1, 60),
    seed=st.integers(0, 2**62),
    step=st.integers(0, 10_000),
)
def test_every_epoch_of_a_plan_holds_every_response_once(
    data: Data, epochs: int, minibatches: int, max_tokens: int, seed: int, step: int
) -> None:
    options = {"epochs": epochs, "minibatches": minibatches, "max_tokens": max_tokens}
    steps = plan_updates(data, **options, seed=seed, step=step)
    per_epoch = min(minibatches, len(data.groups))
    assert len(steps) == epochs * per_epoch
    everything = list(range(len(listed(data))))
    group_of = segment_ids(data.sizes_G).tolist()
    for epoch in range(epochs):
        of_epoch = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        held = [i for step in of_epoch for part in step.micro_batches for i in part]
        assert sorted(held) == sorted(i for step in of_epoch for i in step.responses) == everything
        owners = [{group_of[i] for part in step.micro_batches for i in part} for step in of_epoch]
        assert sum(map(len, owners)) == len(data.groups), "a group lies in one optimizer step"
        assert max(map(len, owners)) - min(map(len, owners)) <= 1
    for part in (part for step in steps for part in step.micro_batches):
        assert packed_length(data, part) <= max_tokens or len(part) == 1
    first = first_epoch_micro_batches(steps, len(everything))
    assert first == [part for step in steps[:per_epoch] for part in step.micro_batches]
    other = replace(data, groups=[Group([1] * len(g.prompt), g.responses) for g in data.groups])
    assert plan_updates(other, **options, seed=seed, step=step) == steps


@EACH
@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 12), st.data())
def test_minibatches_cut_groups_and_never_a_group(sizes: list[int], count: int, draw: Any) -> None:
    order = draw.draw(st.permutations(range(len(sizes))))
    cut = group_minibatches(torch.tensor(sizes), order, count)
    owners = [n for n, size in enumerate(sizes) for _ in range(size)]
    assert len(cut) == min(count, len(sizes))
    taken = [list(dict.fromkeys(owners[i] for i in sorted(part))) for part in cut]
    assert [sorted(part) for part in taken] == taken
    assert sorted(n for part in taken for n in part) == list(range(len(sizes)))
    assert Counter(i for part in cut for i in part) == Counter(range(len(owners)))
    at = 0
    for part in taken:
        assert sorted(order[at : at + len(part)]) == part
        at += len(part)


@EACH
@given(
    count=st.integers(1, 20),
    size=st.integers(1, 25),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_batches_hold_every_item_once_per_epoch(
    count: int, size: int, epochs: int, seed: int
) -> None:
    taken = min(size, count)
    batches = num_steps(epochs, count, size)
    assert batches == -(-epochs * count // taken)
    stream = [i for step in range(batches) for i in epoch_batch(count, size, step, seed=seed)]
    assert len(stream) == batches * taken
    for epoch in range(epochs):
        of_epoch = stream[epoch * count : (epoch + 1) * count]
        assert sorted(of_epoch) == list(range(count))
        assert of_epoch == shuffled(count, seed=seed, epoch=epoch)


# --- one model, two layouts -----------------------------------------------------------------------


@cache
def policies() -> tuple[Policy, Policy]:
    """One model in float64 twice: prompts shared, and a row for every response.

    GPT-2, because others norm or rotate in float32 whatever their weights are.
    """
    shared, rows = (Policy(random_lm(family("gpt2")).double(), letters_tokenizer()) for _ in "ab")
    assert shared.shared
    rows.shared = False
    rows.model.set_attn_implementation("sdpa")
    return shared, rows


@settings(max_examples=15)
@given(groups=GROUPS, max_tokens=st.integers(1, 60))
def test_shared_prompts_score_like_separate_rows_however_they_are_cut(
    groups: list[Group], max_tokens: int
) -> None:
    shared, rows = policies()
    count = sum(len(r) for g in groups for r in g.responses)
    zeros_T = torch.zeros(count, dtype=torch.float64)
    data = Experience(groups=groups, loss_mask_T=zeros_T == 0, advantages_T=zeros_T)

    def score(policy: Policy) -> Tensor:
        (logprobs_T,) = score_all(
            data, data.split(max_tokens), lambda batch: (policy.score(batch).logprobs_T,)
        )
        return logprobs_T

    whole_T = rows.score(Batch.of(groups)).logprobs_T.detach()
    torch.testing.assert_close(score(shared), whole_T, atol=1e-13, rtol=0)
    torch.testing.assert_close(score(rows), whole_T, atol=1e-13, rtol=0)


# --- how evenly it is cut -------------------------------------------------------------------------


def work_of(data: Grouped, part: list[int]) -> int:
    """Tokens on the line, 4,096 each, and pairs of one with another that it sees or with itself."""
    batch = Batch.of(data.select(part).groups)
    return 4096 * len(batch.positions_L) + int((batch.positions_L + 1).sum())


def units_of(data: Grouped, max_tokens: int, whole: bool) -> list[list[int]]:
    """Return the parts that are never divided, in the order of the groups' lengths."""
    first = [0, *accumulate(len(g.responses) for g in data.groups)]
    longest = [len(g.prompt) + max(map(len, g.responses)) for g in data.groups]
    units = []
    for g in sorted(range(len(data.groups)), key=longest.__getitem__):
        members = list(range(first[g], first[g + 1]))
        fits = packed_length(data, members) <= max_tokens
        units += [members] if whole or fits else [[m] for m in members]
    return units


FEW = st.lists(
    st.builds(Group, TOKENS, st.lists(TOKENS, min_size=1, max_size=3)), min_size=1, max_size=5
).map(Grouped)


@EACH
@given(data=FEW, max_tokens=st.integers(1, 60), whole=st.booleans())
def test_split_is_into_few_parts_of_even_work_and_divides_no_group_that_fits(
    data: Grouped, max_tokens: int, whole: bool
) -> None:
    units = units_of(data, max_tokens, whole)
    assume(len(units) <= 8)
    found = data.split(max_tokens, whole_groups=whole)
    assert {tuple(u) for u in units} == {
        tuple(u) for part in found for u in units if set(u) <= set(part)
    }
    cuts = []
    for borders in product([False, True], repeat=len(units) - 1):
        ends = [n + 1 for n, border in enumerate(borders) if border] + [len(units)]
        parts = [units[a:b] for a, b in zip([0, *ends][:-1], ends, strict=True)]
        flat = [sorted(r for unit in part for r in unit) for part in parts]
        pairs = zip(flat, parts, strict=True)
        if all(packed_length(data, f) <= max_tokens or len(part) == 1 for f, part in pairs):
            cuts.append(flat)
    fewest = min(map(len, cuts))
    assert len(found) == fewest
    works = [[work_of(data, part) for part in flat] for flat in cuts if len(flat) == fewest]
    worst, even = list(map(max, works)), min(map(sum, works)) / fewest
    here = max(work_of(data, part) for part in found)
    assert here <= min(worst) + (max(worst) - even) / 64 + 1


def test_last_part_is_not_what_is_left_over() -> None:
    data = Grouped([Group([1] * 4, [[1] * 6]) for _ in range(11)])
    assert [len(part) for part in data.split(100)] == [6, 5]
    assert [len(part) for part in data.split(40)] == [4, 4, 3]


def test_group_that_fits_is_not_divided_to_fill_a_part() -> None:
    data = Grouped([Group([1] * 50, [[1] * 10, [1] * 10]) for _ in range(3)])
    assert data.split(100) == [[0, 1], [2, 3], [4, 5]]
    assert data.split(60) == [[0], [1], [2], [3], [4], [5]]


def test_prompt_counts_once_for_the_responses_of_a_divided_group_that_stay_together() -> None:
    data = Grouped([Group([1] * 10, [[1] * 5 for _ in range(6)])])
    assert data.split(25) == [[0, 1, 2], [3, 4, 5]]


def test_long_contexts_weigh_more_than_their_tokens() -> None:
    # 501 tokens and their pairs are 2.18 million, 2,001 are 10.2: 16 · 2.18 = 34.8 and
    # 6 · 2.18 + 2 · 10.2 = 33.5. Tokens alone would be even as 15 and 9, pairs alone as 17 and 7.
    short, long = Group([1] * 500, [[1]]), Group([1] * 2000, [[1]])
    parts = Grouped([short] * 22 + [long] * 2).split(9014)
    assert [len(part) for part in parts] == [16, 8]


def test_nothing_is_cut_into_nothing() -> None:
    assert Grouped([]).split(10) == []
