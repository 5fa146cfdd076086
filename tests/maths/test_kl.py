"""KL estimators, the KL-shaped reward, the adaptive coefficient, and where each KL term leads.

Policies here write one token of four, so every expectation is a sum of four terms, and that over
all groups of two a sum of sixteen. ``docs/kl.md`` states the results.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from helpers.equations import KL_ESTIMATORS
from torch import Tensor

from trivium.maths import (
    adapted_coefficient,
    clipped_surrogate,
    group_advantages,
    importance_ratio,
    k1,
    k2,
    k3,
    kl_shaped_rewards,
    token_weights,
    weighted_sum,
)

REF_V = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
POLICY_V = torch.tensor([0.1, 0.5, 0.25, 0.15], dtype=torch.float64)
REWARD_V = torch.tensor([0.0, 0.5, -0.3, 1.0], dtype=torch.float64)
BETA = 0.25
Estimator = Callable[[Tensor, Tensor], Tensor]


def kl(p_V: Tensor, q_V: Tensor) -> Tensor:
    return (p_V * (p_V.log() - q_V.log())).sum()


def total_variation(p_V: Tensor, q_V: Tensor) -> float:
    return float((p_V - q_V).abs().sum() / 2)


def test_estimators_by_hand() -> None:
    logprobs_T = torch.tensor([0.5, 0.25], dtype=torch.float64).log()
    ref_logprobs_T = torch.tensor([0.25, 0.5], dtype=torch.float64).log()
    log2 = torch.tensor(2.0, dtype=torch.float64).log().item()
    assert k1(logprobs_T, ref_logprobs_T).tolist() == pytest.approx([log2, -log2])
    assert k2(logprobs_T, ref_logprobs_T).tolist() == pytest.approx([log2**2 / 2] * 2)
    assert k3(logprobs_T, ref_logprobs_T).tolist() == pytest.approx([0.5 - 1 + log2, 2 - 1 - log2])


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [(k1, torch.ones_like), (k2, lambda l_T: l_T), (k3, lambda l_T: -torch.expm1(-l_T))],
)
def test_gradient_of_every_sample_is_the_estimators_derivative(
    estimator: Estimator, derivative: Callable[[Tensor], Tensor]
) -> None:
    logprobs_T = torch.tensor([-0.5, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    ref_T = torch.tensor([-2.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    of_policy_T, of_reference_T = torch.autograd.grad(
        estimator(logprobs_T, ref_T).sum(), [logprobs_T, ref_T]
    )
    expected_T = derivative((logprobs_T - ref_T).detach())
    torch.testing.assert_close(of_policy_T, expected_T, atol=1e-14, rtol=0)
    torch.testing.assert_close(of_reference_T, -expected_T, atol=1e-14, rtol=0)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    mean = (POLICY_V * estimator(POLICY_V.log(), REF_V.log())).sum()
    torch.testing.assert_close(mean, kl(POLICY_V, REF_V), atol=1e-14, rtol=0)


def test_k2_is_biased_by_a_third_order_term() -> None:
    for step in (1e-2, 1e-3):
        policy_V = REF_V * (1 + step * torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64))
        bias = (policy_V * k2(policy_V.log(), REF_V.log())).sum() - kl(policy_V, REF_V)
        assert 0 < bias.abs() < 20 * step**3


def test_k3_is_never_negative_and_keeps_tiny_differences() -> None:
    logprobs_T = -torch.linspace(0.01, 9, 50)
    assert (k3(logprobs_T, logprobs_T.flip(0)) >= 0).all()
    tiny = torch.tensor([1e-4], dtype=torch.float32)
    assert k3(tiny, torch.zeros(1)).item() == pytest.approx(5e-9, rel=0.01, abs=0)


def test_equal_policies_have_kl_exactly_zero() -> None:
    logprobs_T = torch.tensor([-0.1, -3.3, -17.0])
    for estimator in KL_ESTIMATORS.values():
        assert estimator(logprobs_T, logprobs_T).tolist() == [0, 0, 0]
        with pytest.raises(ValueError, match="same shape"):
            estimator(logprobs_T, logprobs_T[:1])


def in_loss(estimator: Estimator, logprobs_T: Tensor, ref_T: Tensor, *, corrected: bool) -> Tensor:
    """A KL term as it stands in the loss: as it is, or multiplied by the ratio."""
    kl_T = estimator(logprobs_T, ref_T)
    return importance_ratio(logprobs_T, logprobs_T.detach()) * kl_T if corrected else kl_T


@pytest.mark.parametrize(
    ("estimator", "corrected", "divergence"),
    [
        (k3, False, lambda p_V: kl(REF_V, p_V)),
        (k3, True, lambda p_V: kl(p_V, REF_V)),
        (k2, False, lambda p_V: kl(p_V, REF_V)),
        (k1, True, lambda p_V: kl(p_V, REF_V)),
        (k1, False, lambda p_V: 0 * p_V.sum()),
        (k2, True, lambda p_V: (p_V * (p_V / REF_V).log() ** 2 / 2).sum()),
    ],
    ids=["k3", "ratio_k3", "k2", "ratio_k1", "k1", "ratio_k2"],
)
def test_what_a_kl_term_in_the_loss_descends(
    estimator: Estimator, corrected: bool, divergence: Callable[[Tensor], Tensor]
) -> None:
    logits_V = POLICY_V.log().requires_grad_()
    term_V = in_loss(estimator, logits_V.log_softmax(0), REF_V.log(), corrected=corrected)
    (gradient,) = torch.autograd.grad(weighted_sum(term_V, POLICY_V), logits_V)
    (expected,) = torch.autograd.grad(divergence(logits_V.softmax(0)), logits_V)
    torch.testing.assert_close(gradient, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize(
    ("estimator", "divergence"),
    [
        (k1, lambda p_V: kl(p_V, REF_V)),
        (k3, lambda p_V: kl(p_V, REF_V) - kl(REF_V, p_V)),
    ],
    ids=["k1", "k3"],
)
def test_what_a_kl_term_in_the_reward_descends(
    estimator: Estimator, divergence: Callable[[Tensor], Tensor]
) -> None:
    logits_V, one_N = POLICY_V.log().requires_grad_(), torch.ones(4, dtype=torch.long)
    logprobs_V = logits_V.log_softmax(0)
    rewards_V = kl_shaped_rewards(
        REWARD_V, estimator(logprobs_V.detach(), REF_V.log()), one_N, BETA
    )
    loss_V = clipped_surrogate(
        logprobs_V, logprobs_V.detach(), rewards_V, one_N, clip_low=0.2, clip_high=0.2
    ).loss_T
    (gradient,) = torch.autograd.grad(weighted_sum(loss_V, POLICY_V), logits_V)
    policy_V = logits_V.softmax(0)
    objective = (policy_V * REWARD_V).sum() - BETA * divergence(policy_V)
    (expected,) = torch.autograd.grad(objective, logits_V)
    torch.testing.assert_close(-gradient, expected, atol=1e-8, rtol=0)


GROUPS = torch.tensor(list(product(range(4), repeat=2)))  # every group of two one-token responses


def expected_gradient(logits_V: Tensor, *, corrected: bool) -> Tensor:
    """The gradient of an on-policy GRPO step's loss, with mean-only advantages, over all groups."""
    logits_V = logits_V.detach().requires_grad_()
    tokens_N = GROUPS.flatten()
    lengths_N = torch.ones_like(tokens_N)
    logprobs_N = logits_V.log_softmax(0)[tokens_N]
    advantages_N = group_advantages(REWARD_V[tokens_N], torch.full((16,), 2), scale="none")
    surrogate_N = clipped_surrogate(
        logprobs_N, logprobs_N.detach(), advantages_N, lengths_N, clip_low=0.2, clip_high=0.2
    ).loss_T
    kl_N = in_loss(k3, logprobs_N, REF_V.log()[tokens_N], corrected=corrected)
    # token_weights averages over the sixteen groups; each is weighed by its probability instead.
    probability_G = logits_V.detach().softmax(0)[GROUPS].prod(1)
    weights_N = token_weights(lengths_N, dtype=torch.float64) * 16
    loss = weighted_sum(surrogate_N + BETA * kl_N, weights_N * probability_G.repeat_interleave(2))
    return torch.autograd.grad(loss, logits_V)[0]


def exponential_tilt(beta: float) -> Tensor:
    """``π_ref exp(r/β) / Z``."""
    tilted_V = REF_V * (REWARD_V / beta).exp()
    return tilted_V / tilted_V.sum()


def rational_tilt(beta: float) -> Tensor:
    """``β π_ref / (c − r)`` with the one c above every reward that makes it sum to 1."""
    low, high = float(REWARD_V.max()), float(REWARD_V.max()) + beta
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (beta * REF_V / (c - REWARD_V)).sum() > 1 else (low, c)
    return beta * REF_V / (high - REWARD_V)


FIXED_POINTS = {False: rational_tilt(2 * BETA), True: exponential_tilt(2 * BETA)}  # β' = β G/(G−1)


@pytest.mark.parametrize("corrected", [False, True], ids=["k3", "ratio_k3"])
def test_grpo_with_k3_stands_still_at_its_closed_form(corrected: bool) -> None:
    own, other = FIXED_POINTS[corrected], FIXED_POINTS[not corrected]
    assert own.sum().item() == pytest.approx(1, abs=1e-12)
    assert expected_gradient(own.log(), corrected=corrected).abs().max() < 1e-12
    assert expected_gradient(other.log(), corrected=corrected).abs().max() > 1e-3
    assert total_variation(own, other) > 0.03


@pytest.mark.parametrize("corrected", [False, True], ids=["k3", "ratio_k3"])
def test_grpo_with_k3_converges_to_its_closed_form(corrected: bool) -> None:
    logits_V = REF_V.log()
    for _ in range(400):
        # Divided by π, the gradient's natural form, the steps converge at one rate for all tokens.
        step_V = expected_gradient(logits_V, corrected=corrected) / logits_V.softmax(0)
        logits_V = (logits_V - 0.2 * step_V).log_softmax(0)
    assert total_variation(logits_V.exp(), FIXED_POINTS[corrected]) < 1e-5


def test_shaped_reward_is_the_kl_at_every_token_and_the_score_at_the_last() -> None:
    rewards_T = kl_shaped_rewards(
        torch.tensor([10.0, 20.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([2, 1]),
        0.5,
    )
    assert rewards_T.tolist() == [-0.5, 10 - 1.0, 20 - 1.5]


def test_token_rewards_are_added_where_they_fall() -> None:
    rewards_T = kl_shaped_rewards(
        torch.tensor([10.0, 20.0]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([2, 1]),
        0.5,
        torch.tensor([7.0, 0.0, 8.0], dtype=torch.float64),
    )
    assert rewards_T.tolist() == [6.5, 9.0, 26.5]
    assert rewards_T.dtype == torch.float64


def test_score_that_would_fall_nowhere_is_refused() -> None:
    two_N, three_T = torch.ones(2), torch.ones(3)
    with pytest.raises(ValueError, match="an empty response has no last token"):
        kl_shaped_rewards(two_N, three_T, torch.tensor([3, 0]), 0.1)
    with pytest.raises(ValueError, match="add up to 4, but there are 3"):
        kl_shaped_rewards(two_N, three_T, torch.tensor([3, 1]), 0.1)
    with pytest.raises(ValueError, match="same shape"):
        kl_shaped_rewards(torch.ones(1), three_T, torch.tensor([2, 1]), 0.1)
    with pytest.raises(ValueError, match="same shape"):
        kl_shaped_rewards(two_N, three_T, torch.tensor([2, 1]), 0.1, torch.ones(1))
    none = torch.tensor([], dtype=torch.long)
    assert kl_shaped_rewards(torch.ones(0), torch.ones(0), none, 0.1).shape == (0,)


@pytest.mark.parametrize(
    ("kl_value", "expected"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1.001),  # 10 % above, 100 samples of a horizon of 10,000
        (60.0, 1.002),  # the error is clipped to 0.2
        (0.0, 0.998),
    ],
)
def test_adaptive_coefficient_moves_toward_its_target(kl_value: float, expected: float) -> None:
    beta = adapted_coefficient(1.0, kl_value, target=6.0, samples=100, horizon=10_000)
    assert beta == pytest.approx(expected, abs=1e-12)
    assert adapted_coefficient(0.5, kl_value, 6.0, 100, 10_000) == pytest.approx(expected / 2)


def test_adaptive_coefficient_refuses_a_target_or_horizon_of_zero() -> None:
    for target, horizon in ((0.0, 10), (1.0, 0)):
        with pytest.raises(ValueError, match="target and horizon must be positive"):
            adapted_coefficient(0.1, 1.0, target, 1, horizon)
