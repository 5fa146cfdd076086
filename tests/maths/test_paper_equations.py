"""Losses and estimators against the equations of their papers, by number.

Each expectation is written out from the paper's line, in plain Python, and shares no code with the
library.
"""

from __future__ import annotations

import math
from itertools import chain, combinations, product
from statistics import mean, pstdev, stdev
from typing import Any

import pytest
import torch
from torch import Tensor

from trivium.evaluation.statistics import pass_at_k
from trivium.maths import (
    cispo_surrogate,
    decoupled_advantages,
    dpo_loss,
    group_advantages,
    gspo_surrogate,
    leave_one_out_advantages,
    normalize_over_batch,
    repeat_per_segment,
    segment_mean,
    token_weights,
    weighted_sum,
)
from trivium.maths.aggregation import fixed_length, sequence_mean
from trivium.maths.rankings import comparisons, ranking_losses
from trivium.rewards.format import length


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


# --- reward models: Ouyang et al. 2022, Touvron et al. 2023, Nakano et al. 2021 ------------------


def ranked(
    labels: list[list[float]], scores: list[list[float]], **options: Any
) -> tuple[Tensor, Tensor]:
    """The weights and losses of all comparisons of these rankings."""
    flat_N, sizes_G = tensor([*chain(*labels)]), torch.tensor(list(map(len, labels)))
    found = comparisons(flat_N, sizes_G)
    return found.weights_P, ranking_losses(tensor([*chain(*scores)]), found, **options)


def test_instructgpt_eq_1_averages_all_k_choose_2_comparisons_of_a_prompt() -> None:
    labels, scores = [[3.0, 1.0, 4.0, 2.0], [0.0, 1.0]], [[0.2, -0.4, 0.1, 1.0], [0.5, -0.5]]
    expected = []
    for label, score in zip(labels, scores, strict=True):
        better = [
            (i, j) if label[i] > label[j] else (j, i) for i, j in combinations(range(len(label)), 2)
        ]
        assert len(better) == math.comb(len(label), 2)
        losses = [-log_sigmoid(score[w] - score[lost]) for w, lost in better]
        expected.append(sum(losses) / math.comb(len(label), 2))
    weights_P, losses_P = ranked(labels, scores)
    assert float((weights_P * losses_P).sum()) == pytest.approx(sum(expected), abs=1e-14)
    assert weights_P.tolist() == pytest.approx([1 / 6] * 6 + [1.0])


@pytest.mark.parametrize("size", [2, 4, 9])
def test_every_response_of_a_ranking_is_compared_with_every_other_once(size: int) -> None:
    labels_N = torch.randperm(size, generator=torch.Generator().manual_seed(size)).double()
    found = comparisons(labels_N, torch.tensor([size]))
    pairs = {
        frozenset(p) for p in zip(found.better_P.tolist(), found.worse_P.tolist(), strict=True)
    }
    assert pairs == {frozenset(p) for p in combinations(range(size), 2)}
    assert len(found.better_P) == math.comb(size, 2)
    assert bool((labels_N[found.better_P] > labels_N[found.worse_P]).all())


def test_gradient_of_a_ranking_is_that_of_its_comparisons_one_by_one() -> None:
    scores_N = tensor([0.2, -0.4, 0.1]).requires_grad_()
    found = comparisons(tensor([2.0, 1.0, 3.0]), torch.tensor([3]))
    (found.weights_P * ranking_losses(scores_N, found)).sum().backward()
    expected = [0.0, 0.0, 0.0]
    for won, lost in ((0, 1), (2, 0), (2, 1)):
        pull = 1 / (1 + math.exp((scores_N[won] - scores_N[lost]).item())) / 3
        expected[won] -= pull
        expected[lost] += pull
    assert scores_N.grad is not None
    assert scores_N.grad.tolist() == pytest.approx(expected, abs=1e-14)


def test_instructgpt_appendix_c_2_drops_ties_and_webgpt_counts_them_half() -> None:
    labels, scores = [[1.0, 1.0, 2.0]], [[0.7, -0.3, 0.4]]
    decided = [-log_sigmoid(0.4 - 0.7), -log_sigmoid(0.4 + 0.3)]
    tie = -(log_sigmoid(0.7 + 0.3) + log_sigmoid(-0.7 - 0.3)) / 2
    weights_P, dropped_P = ranked(labels, scores)
    assert float((weights_P * dropped_P).sum()) == pytest.approx(sum(decided) / 3, abs=1e-14)
    _, half_P = ranked(labels, scores, counts_ties_N=torch.ones(3, dtype=torch.bool))
    assert float((weights_P * half_P).sum()) == pytest.approx((sum(decided) + tie) / 3, abs=1e-14)


def test_llama_2_eq_2_subtracts_the_margin() -> None:
    labels, scores = [[3.0, 1.0, 0.0]], [[0.2, 0.1, -0.4]]
    _, losses_P = ranked(labels, scores, margin_N=tensor([1.5, 0.5, 0.0]))
    expected = [
        -log_sigmoid(0.2 - 0.1 - 1.0), -log_sigmoid(0.2 + 0.4 - 1.5), -log_sigmoid(0.1 + 0.4 - 0.5)
    ]  # fmt: skip
    assert losses_P.tolist() == pytest.approx(expected, abs=1e-14)


def test_rankings_of_one_response_are_refused_and_of_none_are_empty() -> None:
    with pytest.raises(ValueError, match="at least 2 responses, got one of 1"):
        comparisons(tensor([1.0, 2.0, 3.0]), torch.tensor([2, 1]))
    empty = comparisons(tensor([]), torch.tensor([], dtype=torch.long))
    assert all(len(x) == 0 for x in empty)


# --- RLOO: Ahmadian et al. 2024; Dr. GRPO: Liu et al. 2025 --------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8])
def test_rloo_is_the_mean_centered_group_times_g_over_g_minus_1(size: int) -> None:
    rewards_N = torch.randn(2 * size, generator=torch.Generator().manual_seed(size)).double()
    sizes_G = torch.tensor([size, size])
    centered_N = group_advantages(rewards_N, sizes_G, scale="none")
    rloo_N = leave_one_out_advantages(rewards_N, sizes_G)
    torch.testing.assert_close(rloo_N, size / (size - 1) * centered_N, atol=1e-14, rtol=0)
    for i, reward in enumerate(rewards_N.tolist()):
        first = i // size * size
        others = [rewards_N[j].item() for j in range(first, first + size) if j != i]
        assert rloo_N[i].item() == pytest.approx(reward - mean(others), abs=1e-14)


def test_dr_grpo_response_length_bias_is_the_division_by_the_own_length() -> None:
    # Liu et al. 2025, section 3.1: of two equally wrong responses GRPO penalizes the longer less
    # per token, and of two right ones it favors the shorter; Dr. GRPO divides by a constant.
    lengths_N = torch.tensor([2, 8])
    grpo_T = token_weights(lengths_N, sequence_mean, dtype=torch.float64)
    fixed_T = token_weights(lengths_N, fixed_length, max_length=10, dtype=torch.float64)
    assert grpo_T[0] / grpo_T[2] == pytest.approx(4)
    assert len(set(fixed_T.tolist())) == 1
    assert fixed_T[0].item() == pytest.approx(1 / (2 * 10))


def test_dr_grpo_question_difficulty_bias_is_the_division_by_the_deviation() -> None:
    # Liu et al. 2025, section 3.1: questions that are nearly always or never answered weigh more.
    hard, even = [1.0, *[0.0] * 7], [1.0] * 4 + [0.0] * 4
    rewards_N, sizes_G = tensor(hard + even), torch.tensor([8, 8])
    biased_N = group_advantages(rewards_N, sizes_G, scale="population_std")
    plain_N = group_advantages(rewards_N, sizes_G, scale="none")
    for group, at in ((hard, 0), (even, 8)):
        p = mean(group)
        assert plain_N[at].item() == pytest.approx(1 - p, abs=1e-14)
        assert biased_N[at].item() == pytest.approx((1 - p) / math.sqrt(p * (1 - p)), abs=1e-13)
    # The sum of |Â| of a question: 2 G p (1 − p), and divided by the deviation 2 G √(p (1 − p)).
    assert plain_N[:8].abs().sum() / plain_N[8:].abs().sum() == pytest.approx(7 / 64 / 0.25)
    assert biased_N[:8].abs().sum() / biased_N[8:].abs().sum() == pytest.approx(
        math.sqrt(7 / 64 / 0.25)
    )


def test_dr_grpo_without_both_is_the_policy_gradient_times_g_minus_1_over_g() -> None:
    # Liu et al. 2025, appendix A: summed over every group of two responses of a two-armed policy.
    logit = tensor(0.3).requires_grad_()
    probability = torch.stack([torch.sigmoid(logit), torch.sigmoid(-logit)])
    rewards, lengths, longest, size = [1.0, -0.5], [1, 3], 3, 2
    (exact,) = torch.autograd.grad((probability * tensor(rewards)).sum(), logit, retain_graph=True)
    total = torch.zeros((), dtype=torch.float64)
    for group in product(range(2), repeat=size):
        rewards_N = tensor([rewards[i] for i in group])
        lengths_N = torch.tensor([lengths[i] for i in group])
        advantages_N = group_advantages(rewards_N, torch.tensor([size]), scale="none")
        weights_T = token_weights(lengths_N, fixed_length, max_length=longest, dtype=torch.float64)
        # Only a response's first token depends on the policy.
        logprobs_T = torch.cat(
            [torch.stack([probability[i].log(), *[tensor(0.0)] * (lengths[i] - 1)]) for i in group]
        )
        loss = weighted_sum(-repeat_per_segment(advantages_N, lengths_N) * logprobs_T, weights_T)
        total = total + probability[list(group)].prod().detach() * loss
    (gradient,) = torch.autograd.grad(-longest * total, logit)
    assert gradient.item() == pytest.approx((size - 1) / size * exact.item(), abs=1e-14)


# --- DAPO: Yu et al. 2025; pass@k: Chen et al. 2021 ---------------------------------------------


def test_dapo_eq_13_with_the_papers_lengths() -> None:
    def curve(tokens: int) -> float:
        longest, cache = 20480, 4096
        if tokens <= longest - cache:
            return 0.0
        return (longest - cache - tokens) / cache if tokens <= longest else -1.0

    lengths = [1, 16384, 16385, 18432, 20479, 20480, 20481, 40000]
    found = length([[0] * n for n in lengths], limit=20480, buffer=4096)
    assert found == pytest.approx([curve(n) for n in lengths], abs=1e-15)
    assert found[3] == -0.5


@pytest.mark.parametrize(("n", "passed"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 5), (200, 3)])
def test_pass_at_k_is_chens_eq_1_and_the_product_of_his_code(n: int, passed: int) -> None:
    for k in {1, min(2, n), n}:
        term = 1 - math.comb(n - passed, k) / math.comb(n, k)
        product_form = 1.0
        if n - passed >= k:
            product_form -= math.prod(1 - k / i for i in range(n - passed + 1, n + 1))
        assert pass_at_k(n, passed, k) == pytest.approx(term, abs=1e-14)
        assert pass_at_k(n, passed, k) == pytest.approx(product_form, abs=1e-12)


# --- length-normalized DPO: Lambert et al. 2024 -------------------------------------------------


def test_length_normalized_dpo_divides_each_log_ratio_by_its_length() -> None:
    # As Tülu 3 writes it: −log σ(β/|y_c| log π/π_ref(y_c) − β/|y_r| log π/π_ref(y_r)).
    chosen, rejected, beta = [0.5, -0.25, 0.75, 1.0], [0.25, -1.0], 5.0
    log_ratio_T, lengths_N = tensor(chosen + rejected), torch.tensor([4, 2])
    margin_P = segment_mean(log_ratio_T, lengths_N)[0::2] - segment_mean(log_ratio_T, lengths_N)[1:]
    expected = -log_sigmoid(beta / 4 * sum(chosen) - beta / 2 * sum(rejected))
    assert dpo_loss(margin_P, beta=beta).item() == pytest.approx(expected, abs=1e-14)


# --- GSPO: Zheng et al. 2025; CISPO: MiniMax 2025 -----------------------------------------------

LENGTHS = [3, 2, 4]
LOG_RATIOS = [0.3, -0.2, 0.5, -0.6, -0.1, 0.0, 0.02, -0.02, 0.01]


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_gspo_eq_5_and_7_clips_the_sequence_ratio_and_eq_10_is_its_gradient(
    advantage: float,
) -> None:
    low, high = 0.1, 0.15
    new_T = tensor([-1.0] * 9).requires_grad_()
    old_T = new_T.detach() - tensor(LOG_RATIOS)
    advantages_T, lengths_N = torch.full((9,), advantage).double(), torch.tensor(LENGTHS)
    found = gspo_surrogate(new_T, old_T, advantages_T, lengths_N, clip_low=low, clip_high=high)
    weights_T = token_weights(lengths_N, sequence_mean, dtype=torch.float64)
    loss = weighted_sum(found.loss_T, weights_T)
    (gradient_T,) = torch.autograd.grad(loss, new_T)
    objective, gradients, at = 0.0, [], 0
    for n in LENGTHS:
        s = math.exp(sum(LOG_RATIOS[at : at + n]) / n)  # eq. 7
        clipped = min(max(s, 1 - low), 1 + high)
        objective += min(s * advantage, clipped * advantage) / len(LENGTHS)  # eq. 5
        kept = s * advantage <= clipped * advantage
        gradients += [-kept * s * advantage / n / len(LENGTHS)] * n  # eq. 10
        at += n
    assert loss.item() == pytest.approx(-objective, abs=1e-14)
    assert gradient_T.tolist() == pytest.approx(gradients, abs=1e-14)
    assert 0.0 in gradients and any(gradients)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_cispo_eq_4_and_5_clip_a_detached_weight(advantage: float) -> None:
    low, high = 0.3, 0.2
    logprobs = [-1.0, -0.5, -2.0, -0.1, -3.0, -0.7, -1.2, -0.4, -0.9]
    new_T = tensor(logprobs).requires_grad_()
    old_T = new_T.detach() - tensor(LOG_RATIOS)
    found = cispo_surrogate(
        new_T, old_T, torch.full((9,), advantage).double(), torch.tensor(LENGTHS),
        clip_low=low, clip_high=high,
    )  # fmt: skip
    weights = [min(max(math.exp(r), 1 - low), 1 + high) for r in LOG_RATIOS]  # eq. 5
    expected = [-w * advantage * p for w, p in zip(weights, logprobs, strict=True)]  # eq. 4
    assert found.loss_T.tolist() == pytest.approx(expected, abs=1e-14)
    (gradient_T,) = torch.autograd.grad(found.loss_T.sum(), new_T)
    assert gradient_T.tolist() == pytest.approx([-w * advantage for w in weights], abs=1e-14)
    assert found.clipped_low_T.tolist() == [r < math.log(1 - low) for r in LOG_RATIOS]
    assert found.clipped_high_T.tolist() == [r > math.log(1 + high) for r in LOG_RATIOS]


# --- GDPO: Liu et al. 2026 ----------------------------------------------------------------------


def gdpo(rewards: list[list[float]], weights: list[float], size: int, **options: Any) -> Tensor:
    sizes_G = torch.full((len(rewards[0]) // size,), size)
    return decoupled_advantages(tensor(rewards), tensor(weights), sizes_G, **options)


# Section 3.1 and figure 2: two rollouts and two binary rewards, by the rollouts' total rewards.
PAPER = {
    "(0,1)": ([[0.0, 1.0], [0.0, 0.0]], 0.7071, 0.7071, 0.5),
    "(0,2)": ([[0.0, 1.0], [0.0, 1.0]], 0.7071, 1.4142, 1.0),
    "(1,2)": ([[1.0, 1.0], [0.0, 1.0]], 0.7071, 0.7071, 0.5),
    "(0,0)": ([[0.0, 0.0], [0.0, 0.0]], 0.0, 0.0, 0.0),
    "(2,2)": ([[1.0, 1.0], [1.0, 1.0]], 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize(
    ("rewards", "grpo", "decoupled", "plain"), PAPER.values(), ids=PAPER.keys()
)
def test_gdpos_example_of_two_rollouts_and_two_rewards(
    rewards: list[list[float]], grpo: float, decoupled: float, plain: float
) -> None:
    total_N, sizes_G = tensor(rewards).sum(0), torch.tensor([2])
    assert group_advantages(total_N, sizes_G).tolist() == pytest.approx([-grpo, grpo], abs=5e-5)
    without_std = group_advantages(total_N, sizes_G, scale="none").tolist()
    assert without_std == pytest.approx([-plain, plain], abs=5e-5)
    found = gdpo(rewards, [1.0, 1.0], 2).tolist()
    assert found == pytest.approx([-decoupled, decoupled], abs=5e-5)


def test_gdpo_keeps_three_groups_of_advantages_where_grpo_keeps_two() -> None:
    # The caption of figure 2, over all sixteen outcomes.
    grpo, decoupled = set(), set()
    for outcome in product([0.0, 1.0], repeat=4):
        rewards = [list(outcome[:2]), list(outcome[2:])]
        total_N = tensor(rewards).sum(0)
        grpo.add(round(abs(group_advantages(total_N, torch.tensor([2]))[1].item()), 4))
        decoupled.add(round(abs(gdpo(rewards, [1.0, 1.0], 2)[1].item()), 4))
    assert grpo == {0.0, 0.7071}
    assert decoupled == {0.0, 0.7071, 1.4142}


def test_gdpo_eq_4_to_7_written_out() -> None:
    rewards = [[1.0, 0.0, 0.0, 2.0, 5.0, 3.0], [0.1, 0.1, 0.4, 0.2, 0.2, 0.2]]
    weights, expected = [1.0, -0.5], []
    for first in (0, 3):
        parts = []
        for row, weight in zip(rewards, weights, strict=True):
            group = row[first : first + 3]
            deviation = stdev(group) or 1.0
            parts.append([weight * (r - mean(group)) / deviation for r in group])  # eq. 4
        expected += [sum(column) for column in zip(*parts, strict=True)]  # eq. 7
    summed_N = gdpo(rewards, weights, 3)
    assert summed_N.tolist() == pytest.approx(expected, abs=1e-14)
    batch = [(a - mean(expected)) / pstdev(expected) for a in expected]  # eq. 6, with ε = 0
    assert normalize_over_batch(summed_N).tolist() == pytest.approx(batch, abs=1e-14)


def test_rewards_that_cancel_have_advantage_zero_and_not_rounding_errors() -> None:
    # Section 3.1 expects a signal from r1 = (1, 1, 0) and r2 = (0, 0, 1). Two binary rewards that
    # add up to a constant have opposite deviations, so with equal weights they cancel.
    rewards = [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    single = torch.tensor(rewards)  # In float32 the sum is not 0 by itself.
    found_N = decoupled_advantages(single, torch.ones(2), torch.tensor([3]))
    assert found_N.tolist() == [0, 0, 0]
    assert normalize_over_batch(found_N).tolist() == [0, 0, 0]
    assert gdpo(rewards, [1.0, 0.5], 3).abs().min() > 0.2
    # Three rewards of one total, with unequal deviations, do not cancel; their sum has no signal.
    rewards = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert gdpo(rewards, [1.0, 1.0, 1.0], 4).abs().min() > 0.1
    assert group_advantages(tensor(rewards).sum(0), torch.tensor([4])).tolist() == [0] * 4


def test_responses_that_a_reward_does_not_apply_to_are_not_compared_by_it() -> None:
    rewards = [[1.0, 3.0, 99.0, 5.0, 99.0, 2.0], [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]]
    applies = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    found_N = gdpo(rewards, [1.0, 1.0], 3, applies_RN=applies)
    second_N = group_advantages(tensor(rewards[1]), torch.tensor([3, 3]))
    half = math.sqrt(0.5)  # The first reward compares 1 with 3, and nothing in the second group.
    expected_N = second_N + tensor([-half, half, 0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(found_N, expected_N, atol=1e-14, rtol=0)
    nowhere = torch.zeros_like(applies)
    assert gdpo(rewards, [1.0, 1.0], 3, applies_RN=nowhere).tolist() == [0] * 6


def test_gdpo_takes_any_baseline_and_refuses_weights_of_another_number() -> None:
    rewards = [[1.0, 0.0, 4.0], [0.0, 1.0, 1.0]]
    found_N = gdpo(rewards, [1.0, 2.0], 3, estimator=leave_one_out_advantages)
    torch.testing.assert_close(found_N, 1.5 * gdpo(rewards, [1.0, 2.0], 3), atol=1e-14, rtol=0)
    assert gdpo([[math.nan, 1.0], [0.0, 1.0]], [1.0, 1.0], 2).isnan().all()
    with pytest.raises(ValueError, match=r"must be \[R, N\] and \[R\], got \(2, 3\) and \(1,\)"):
        gdpo(rewards, [1.0], 3)
