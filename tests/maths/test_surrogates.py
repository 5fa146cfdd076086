"""The policy and value losses, against formulations that share no code with them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.equations import IMPORTANCE_WEIGHTS, SURROGATES

from trivium.maths import (
    cispo_surrogate,
    clipped_surrogate,
    gspo_surrogate,
    importance_ratio,
    token_nll,
    token_weights,
    truncated_importance,
    value_loss,
    weighted_sum,
)

CLIP: dict[str, float] = {"clip_low": 0.2, "clip_high": 0.3}


def losses_and_gradients(
    surrogate: str, ratios: list[float], advantages: list[float], lengths: list[int]
) -> tuple[list[float], list[float]]:
    """A surrogate's value and its gradient to the log-probs, per token."""
    old_T = torch.linspace(-3, -0.5, len(ratios), dtype=torch.float64)
    new_T = (old_T + torch.tensor(ratios, dtype=torch.float64).log()).requires_grad_()
    advantages_T = torch.tensor(advantages, dtype=torch.float64)
    loss_T = SURROGATES[surrogate](new_T, old_T, advantages_T, torch.tensor(lengths), **CLIP).loss_T
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), new_T)
    return loss_T.tolist(), gradient_T.tolist()


# advantage, ratio, loss, gradient to log π: worked out by hand with clip to [0.8, 1.3].
BRANCHES = [
    (2.0, 0.5, -1.0, -1.0),  # below, wanted up: no clip, pulled back up
    (2.0, 1.1, -2.2, -2.2),  # inside
    (2.0, 1.5, -2.6, 0.0),  # above and wanted up: clipped
    (-2.0, 0.5, 1.6, 0.0),  # below and wanted down: clipped
    (-2.0, 1.1, 2.2, 2.2),  # inside
    (-2.0, 1.5, 3.0, 3.0),  # above, wanted down: no clip, pushed back down
    (0.0, 1.5, 0.0, 0.0),
    (0.0, 0.5, 0.0, 0.0),
    (3.0, 1.0, -3.0, -3.0),  # on-policy
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "gradient"), BRANCHES)
def test_clipped_surrogate_takes_the_branch_of_its_sign_and_ratio(
    advantage: float, ratio: float, loss: float, gradient: float
) -> None:
    losses, gradients = losses_and_gradients("clipped", [ratio], [advantage], [1])
    assert losses == pytest.approx([loss], abs=1e-14)
    assert gradients == pytest.approx([gradient], abs=1e-14)
    if gradient == 0:
        assert gradients[0] == 0


def test_clipped_surrogate_is_written_per_token() -> None:
    advantages, ratios, expected, gradients = (
        list(column) for column in zip(*BRANCHES, strict=True)
    )
    actual = losses_and_gradients("clipped", ratios, advantages, [3, 6])
    assert actual[0] == pytest.approx(expected, abs=1e-14)
    assert actual[1] == pytest.approx(gradients, abs=1e-14)


def test_cispo_weighs_every_token_and_loses_no_gradient() -> None:
    ratios, advantages = [0.5, 1.1, 1.5, 0.5, 1.5], [2.0, 2.0, 2.0, -2.0, -2.0]
    losses, gradients = losses_and_gradients("cispo", ratios, advantages, [5])
    weights = [0.8, 1.1, 1.3, 0.8, 1.3]
    assert gradients == pytest.approx(
        [-w * a for w, a in zip(weights, advantages, strict=True)], abs=1e-14
    )
    logprobs = [
        o + math.log(r) for o, r in zip([-3, -2.375, -1.75, -1.125, -0.5], ratios, strict=True)
    ]
    assert losses == pytest.approx(
        [-w * a * p for w, a, p in zip(weights, advantages, logprobs, strict=True)], abs=1e-14
    )


def test_gspo_clips_the_geometric_mean_of_a_responses_ratios() -> None:
    ratios = [0.5, 2.42, 1.6, 1.6, 0.5]  # geometric means 1.1, 1.6 and 0.5
    losses, gradients = losses_and_gradients("gspo", ratios, [2.0, 2.0, 2.0, 2.0, 2.0], [2, 2, 1])
    assert losses == pytest.approx([-2.2, -2.2, -2.6, -2.6, -1.0], abs=1e-14)
    assert gradients == pytest.approx([-2.2, -2.2, 0, 0, -1.0], abs=1e-14)
    assert gradients[2:4] == [0, 0]


def test_gspo_under_sequence_mean_has_the_gradient_of_the_sequence_ratio() -> None:
    lengths_N = torch.tensor([3, 1])
    old_T = torch.tensor([-1.0, -2.0, -0.5, -1.5], dtype=torch.float64)
    new_T = torch.tensor([-0.9, -2.1, -0.4, -1.6], dtype=torch.float64, requires_grad=True)
    advantages_T = torch.tensor([2.0, 2.0, 2.0, -1.0], dtype=torch.float64)
    weights_T = token_weights(lengths_N, dtype=torch.float64)
    loss_T = gspo_surrogate(new_T, old_T, advantages_T, lengths_N, **CLIP).loss_T
    loss = weighted_sum(loss_T, weights_T)
    ratio_N = torch.stack([((new_T - old_T)[:3].sum() / 3).exp(), (new_T - old_T)[3].exp()])
    expected = -(2 * ratio_N[0] - ratio_N[1]) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, new_T, retain_graph=True), torch.autograd.grad(expected, new_T)
    )


def clip_masks(
    surrogate: str, ratios: list[float], advantages: list[float], lengths: list[int]
) -> tuple[list[bool], list[bool]]:
    """The tokens that a surrogate reports as clipped below and above."""
    old_T = torch.linspace(-3, -0.5, len(ratios), dtype=torch.float64)
    new_T = old_T + torch.tensor(ratios, dtype=torch.float64).log()
    advantages_T = torch.tensor(advantages, dtype=torch.float64)
    _, low_T, high_T = SURROGATES[surrogate](
        new_T, old_T, advantages_T, torch.tensor(lengths), **CLIP
    )
    return low_T.tolist(), high_T.tolist()


def test_clipped_tokens_are_those_that_lose_their_gradient() -> None:
    advantages, ratios, _, gradients = (list(column) for column in zip(*BRANCHES, strict=True))
    low, high = clip_masks("clipped", ratios, advantages, [3, 6])
    lost = [g == 0 and a != 0 for g, a in zip(gradients, advantages, strict=True)]
    assert [a or b for a, b in zip(low, high, strict=True)] == lost
    assert low.index(True) == 3 and high.index(True) == 2
    assert sum(low) == sum(high) == 1


def test_gspo_clips_whole_sequences_by_their_own_ratio() -> None:
    # Single tokens are far outside [0.8, 1.3]; the geometric means are 1.0, 1.6 and 0.5.
    ratios, lengths = [0.5, 2.0, 3.2, 0.8, 0.25, 1.0], [2, 2, 2]
    up, down = [2.0] * 6, [-2.0] * 6
    none, second, third = [False] * 6, [False] * 2 + [True] * 2 + [False] * 2, [False] * 4
    assert clip_masks("gspo", ratios, up, lengths) == (none, second)
    assert clip_masks("gspo", ratios, down, lengths) == ([*third, True, True], none)


def test_cispo_reports_the_tokens_whose_weight_it_bounds() -> None:
    ratios, advantages = [0.5, 1.1, 1.5, 0.5, 1.5, 1.5], [2.0, 2.0, 2.0, -2.0, -2.0, 0.0]
    low, high = clip_masks("cispo", ratios, advantages, [6])
    assert low == [True, False, False, True, False, False]
    assert high == [False, False, True, False, True, False]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_no_token_is_clipped_while_the_policy_has_not_moved(surrogate: str) -> None:
    low, high = clip_masks(surrogate, [1.0] * 4, [1.0, 1.0, -1.0, -1.0], [2, 2])
    assert not any(low + high)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_first_step_has_ratio_one_and_the_plain_policy_gradient(surrogate: str) -> None:
    logprobs_T = torch.tensor([-0.1, -2.3, -7.7], requires_grad=True)
    advantages_T = torch.tensor([1.5, -0.5, 0.25])
    loss_T = SURROGATES[surrogate](
        logprobs_T, logprobs_T.detach(), advantages_T, torch.tensor([2, 1]), **CLIP
    ).loss_T
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), logprobs_T)
    assert importance_ratio(logprobs_T, logprobs_T.detach()).tolist() == [1, 1, 1]
    assert gradient_T.tolist() == (-advantages_T).tolist()


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_surrogates_refuse_what_would_broadcast_or_never_clip(surrogate: str) -> None:
    function, x_T, lengths_N = SURROGATES[surrogate], torch.zeros(3), torch.tensor([3])
    for wrong in (
        (x_T[:1], x_T, x_T),
        (x_T, x_T[:1], x_T),
        (x_T, x_T, x_T[:1]),
    ):
        with pytest.raises(ValueError, match="same shape"):
            function(*wrong, lengths_N, **CLIP)
    for low, high in ((0.0, 0.2), (0.2, 0.0), (1.5, 0.2), (-0.2, 0.2)):
        with pytest.raises(ValueError, match="clipping needs"):
            function(x_T, x_T, x_T, lengths_N, clip_low=low, clip_high=high)


def test_a_nan_stays_a_nan() -> None:
    nan_T, one_T, lengths_N = torch.tensor([torch.nan]), torch.ones(1), torch.tensor([1])
    for function in (clipped_surrogate, gspo_surrogate, cispo_surrogate):
        assert function(nan_T, one_T, one_T, lengths_N, **CLIP).loss_T.isnan().all()
        assert function(one_T, one_T, nan_T, lengths_N, **CLIP).loss_T.isnan().all()


def test_truncated_importance_is_a_constant_ratio_up_to_its_cap() -> None:
    trainer_T = torch.tensor([0.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    sampler_T = -torch.tensor([0.5, 1.5, 4.0], dtype=torch.float64).log()
    weights_T = truncated_importance(trainer_T, sampler_T, cap=2.0)
    assert weights_T.tolist() == pytest.approx([0.5, 1.5, 2.0], abs=1e-14)
    assert not weights_T.requires_grad
    with pytest.raises(ValueError, match="must be positive, got 0"):
        truncated_importance(trainer_T, sampler_T, cap=0)


# Per-token ratios of three responses; their products are 3, 0.25 and 1.
RATIOS, RATIO_LENGTHS = [2.0, 3.0, 0.5, 0.25, 4.0, 0.25], [3, 1, 2]
WEIGHTS = {
    "token_truncate": [2.0, 2.0, 0.5, 0.25, 2.0, 0.25],
    "token_mask": [2.0, 0.0, 0.5, 0.25, 0.0, 0.25],
    "sequence_truncate": [2.0, 2.0, 2.0, 0.25, 1.0, 1.0],
    "sequence_mask": [0.0, 0.0, 0.0, 0.25, 1.0, 1.0],
}


@pytest.mark.parametrize(("name", "expected"), WEIGHTS.items())
def test_importance_weights_are_of_tokens_or_responses_truncated_or_masked(
    name: str, expected: list[float]
) -> None:
    trainer_T = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    sampler_T = -torch.tensor(RATIOS, dtype=torch.float64).log()
    weight, lengths_N = IMPORTANCE_WEIGHTS[name], torch.tensor(RATIO_LENGTHS)
    weights_T = weight(trainer_T, sampler_T, lengths_N, cap=2.0)
    assert weights_T.tolist() == pytest.approx(expected, abs=1e-14)
    assert not weights_T.requires_grad
    free_T = weight(trainer_T, sampler_T, lengths_N, cap=math.inf)
    products = [3.0, 3.0, 3.0, 0.25, 1.0, 1.0]
    assert free_T.tolist() == pytest.approx(products if "sequence" in name else RATIOS, abs=1e-14)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        weight(trainer_T, sampler_T, lengths_N, cap=0)
    with pytest.raises(ValueError, match="same shape"):
        weight(trainer_T, sampler_T[:5], lengths_N, cap=2.0)


def test_sequence_weights_make_the_samplers_mean_the_trainers() -> None:
    # Two tokens of two values each: the weighted mean over μ's four responses, by enumeration.
    trainer = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    sampler = torch.tensor([[0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)
    value = {(0, 0): 1.0, (0, 1): -2.0, (1, 0): 0.5, (1, 1): 3.0}

    def mean(name: str, cap: float) -> float:
        total = 0.0
        for y, reward in value.items():
            logs = [torch.stack([p[t, y[t]] for t in range(2)]).log() for p in (trainer, sampler)]
            weights_T = IMPORTANCE_WEIGHTS[name](*logs, torch.tensor([2]), cap=cap)
            total += float(logs[1].sum().exp() * weights_T[0]) * reward
        return total

    exact = sum(float(trainer[0, a] * trainer[1, b]) * r for (a, b), r in value.items())
    assert mean("sequence_truncate", math.inf) == pytest.approx(exact, abs=1e-14)
    assert mean("sequence_mask", math.inf) == pytest.approx(exact, abs=1e-14)
    # A token's own ratio leaves its prefix and what follows it uncorrected.
    assert abs(mean("token_truncate", math.inf) - exact) > 0.1


# value, loss, gradient: target 0, old value 1, clip 0.4, worked out by hand.
VALUES = [
    (1.2, 1.44, 2.4),  # inside the clip: the plain error
    (2.0, 4.0, 4.0),  # moved away from the target: the plain error is worse, keeps its gradient
    (0.2, 0.36, 0.0),  # moved far toward the target: held at 0.6, no gradient
]


@pytest.mark.parametrize(("value", "loss", "gradient"), VALUES)
def test_value_clipping_takes_the_worse_error(value: float, loss: float, gradient: float) -> None:
    values_T = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old_T, targets_T = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    loss_T = value_loss(values_T, targets_T, old_values_T=old_T, clip=0.4)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), values_T)
    assert loss_T.item() == pytest.approx(loss, abs=1e-14)
    assert gradient_T.item() == pytest.approx(gradient, abs=1e-14)


def test_value_loss_is_the_squared_error() -> None:
    values_T = torch.tensor([3.0, -1.0], requires_grad=True)
    loss_T = value_loss(values_T, torch.tensor([1.0, 2.0]))
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), values_T)
    assert loss_T.tolist() == [4, 9]
    assert gradient_T.tolist() == [4, -6]


def test_value_loss_refuses_a_clip_without_its_center() -> None:
    x_T = torch.zeros(2)
    with pytest.raises(ValueError, match=r"needs old_values_T and a clip > 0, got 0.2"):
        value_loss(x_T, x_T, clip=0.2)
    with pytest.raises(ValueError, match="clip > 0, got 0"):
        value_loss(x_T, x_T, old_values_T=x_T, clip=0)
    with pytest.raises(ValueError, match="same shape"):
        value_loss(x_T, torch.zeros(1))


def test_token_nll_is_minus_the_logprob() -> None:
    assert token_nll(torch.tensor([-0.5, -2.0])).tolist() == [0.5, 2.0]
