"""DPO, its variants and the reward-model losses: by hand, by enumeration, against TRL's numbers.

``margins_P`` is the difference of the two responses' log ratios to the reference, before β.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from helpers.equations import PREFERENCE_LOSSES
from torch import Tensor

from trivium.maths import (
    bradley_terry_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    preference_gradient_weight,
    robust_loss,
    segment_mean,
    segment_sum,
    step_loss,
)

# Three pairs of responses: the log-prob of each token under the policy and under the reference,
# chosen responses first. All fractions are exact in binary.
LENGTHS_N = torch.tensor([2, 3, 1, 3, 1, 2])
POLICY_T = torch.tensor(
    [-1.0, -0.5, -2.0, -0.25, -0.75, -3.0, -1.5, -0.5, -1.0, -2.5, -0.5, -2.0], dtype=torch.float64
)
REFERENCE_T = torch.tensor(
    [-1.25, -0.75, -1.0, -0.5, -0.5, -2.0, -1.0, -1.0, -0.5, -2.25, -1.0, -1.0], dtype=torch.float64
)


def difference(x_N: Tensor) -> Tensor:
    """Chosen minus rejected, for responses laid out as above."""
    chosen_P, rejected_P = x_N.chunk(2)
    return chosen_P - rejected_P


MARGINS_P = difference(segment_sum(POLICY_T - REFERENCE_T, LENGTHS_N))
MEAN_MARGINS_P = difference(segment_mean(POLICY_T - REFERENCE_T, LENGTHS_N))
MEAN_LOGPROBS_P = difference(segment_mean(POLICY_T, LENGTHS_N))


def test_margins_by_hand() -> None:
    assert MARGINS_P.tolist() == [1.0, -0.75, -0.5]


# Printed by TRL 1.16.0's own DPOTrainer and CPOTrainer on the log-probs above: our loss, margin and
# options, and their value of each pair. TRL's IPO and SimPO average log-probs over a response's
# tokens; our functions take whichever margin they are given.
TRL = {
    "dpo": (
        (dpo_loss, MARGINS_P, {"beta": 0.1}),
        [0.6443966600735709, 0.7313501408267951, 0.7184596480132863],
    ),
    "dpo with a larger beta": (
        (dpo_loss, MARGINS_P, {"beta": 0.5}),
        [0.4740769841801067, 0.8981232641398401, 0.8259394198788436],
    ),
    "length-normalized dpo": (
        (dpo_loss, MEAN_MARGINS_P, {"beta": 0.5}),
        [0.5943960779478069, 0.7141975120856415, 0.8981232641398401],
    ),
    "ipo": (
        (ipo_loss, MEAN_MARGINS_P, {"beta": 0.1}),
        [21.006944444444443, 25.840277777777775, 33.0625],
    ),
    "ipo with a larger beta": (
        (ipo_loss, MEAN_MARGINS_P, {"beta": 0.5}),
        [0.34027777777777785, 1.173611111111111, 3.0625],
    ),
    "hinge": (
        (hinge_loss, MARGINS_P, {"beta": 0.5}),
        [0.5, 1.375, 1.25],
    ),
    "robust": (
        (robust_loss, MARGINS_P, {"beta": 0.5, "label_smoothing": 0.1}),
        [0.41157698418010663, 0.9449982641398402, 0.8571894198788435],
    ),
    "simpo": (
        (dpo_loss, MEAN_LOGPROBS_P, {"beta": 2.0, "target_margin": 0.5}),
        [0.6931471805599453, 0.07888973429254963, 4.0181499279178094],
    ),
    "smoothed labels": (
        (dpo_loss, MEAN_LOGPROBS_P, {"beta": 2.0, "label_smoothing": 0.1}),
        [0.5240769841801067, 0.3485873515737421, 3.179750418272621],
    ),
}


@pytest.mark.parametrize(("ours", "theirs"), TRL.values(), ids=TRL.keys())
def test_losses_agree_with_trl(
    ours: tuple[Callable[..., Tensor], Tensor, dict[str, float]], theirs: list[float]
) -> None:
    loss, margins_P, options = ours
    assert loss(margins_P, **options).tolist() == pytest.approx(theirs, abs=1e-12, rel=0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_loss_of_equal_log_ratios_is_log_two() -> None:
    assert dpo_loss(torch.zeros(1), beta=0.1).item() == pytest.approx(math.log(2), rel=1e-7)


def test_dpo_loss_falls_as_the_chosen_response_gains() -> None:
    loss_P = dpo_loss(torch.tensor([-50.0, -1.0, 0.0, 1.0, 50.0]), beta=1.0)
    assert (loss_P.diff() < 0).all()
    assert loss_P[0] == pytest.approx(50)  # no overflow at either end
    assert loss_P[-1] == pytest.approx(math.exp(-50))


def test_dpo_gradient_is_its_weight_times_the_difference_of_scores() -> None:
    logits_V = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logprobs_V = logits_V.log_softmax(0)
    log_ratio_V = logprobs_V - reference_V
    chosen, rejected, beta = 0, 2, 0.7
    margin_P = (log_ratio_V[chosen] - log_ratio_V[rejected])[None]
    (gradient,) = torch.autograd.grad(
        dpo_loss(margin_P, beta=beta).sum(), logits_V, retain_graph=True
    )
    weight = sigmoid(beta * -margin_P.item())
    (score_w,) = torch.autograd.grad(logprobs_V[chosen], logits_V, retain_graph=True)
    (score_l,) = torch.autograd.grad(logprobs_V[rejected], logits_V)
    torch.testing.assert_close(gradient, -beta * weight * (score_w - score_l), atol=1e-12, rtol=0)
    shipped = preference_gradient_weight(dpo_loss, margin_P, beta=beta).item()
    assert shipped == pytest.approx(weight, abs=1e-12)


# −dL/dh/β written out by hand, for each entry of the table and each of its variants.
WEIGHTS: dict[str, tuple[str, dict[str, float], Callable[[float, float], float]]] = {
    "sigmoid": ("sigmoid", {}, lambda h, beta: sigmoid(-beta * h)),
    "cdpo": (
        "sigmoid",
        {"label_smoothing": 0.2},
        lambda h, beta: 0.8 * sigmoid(-beta * h) - 0.2 * sigmoid(beta * h),
    ),
    "cdpo with a target margin": (
        "sigmoid",
        {"label_smoothing": 0.2, "target_margin": 0.5},
        lambda h, beta: 0.8 * sigmoid(0.5 - beta * h) - 0.2 * sigmoid(beta * h - 0.5),
    ),
    "simpo": ("sigmoid", {"target_margin": 0.5}, lambda h, beta: sigmoid(0.5 - beta * h)),
    "ipo": ("ipo", {}, lambda h, beta: 2 * (1 / (2 * beta) - h) / beta),
    "hinge": ("hinge", {}, lambda h, beta: float(beta * h < 1)),
    "robust": (
        "robust",
        {"label_smoothing": 0.2},
        lambda h, beta: (0.8 * sigmoid(-beta * h) + 0.2 * sigmoid(beta * h)) / 0.6,
    ),
}


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("variant", WEIGHTS)
def test_gradient_weight_is_that_of_the_loss_in_use(variant: str, beta: float) -> None:
    name, options, weight = WEIGHTS[variant]
    margins = [-30.0, -0.7, 0.0, 0.3, 11.0]
    margins_P = torch.tensor(margins, dtype=torch.float64)
    loss = PREFERENCE_LOSSES[name]
    with torch.no_grad():  # as in evaluations; the weight needs autograd of its own
        found_P = preference_gradient_weight(loss, margins_P, beta=beta, **options)
    assert found_P.tolist() == pytest.approx([weight(h, beta) for h in margins], abs=1e-12)
    assert not found_P.requires_grad and not margins_P.requires_grad


def test_gradient_weights_are_written_out_for_every_preference_loss() -> None:
    assert {name for name, _, _ in WEIGHTS.values()} == set(PREFERENCE_LOSSES)


class Responses:
    """The nine responses of two tokens of three, under a table with a row of logits per prefix."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pairs = torch.tensor(list(product(range(3), repeat=2)))
        self.row_T = torch.stack([torch.zeros(9, dtype=torch.long), pairs[:, 0] + 1], 1).flatten()
        self.token_T = pairs.flatten()
        self.lengths_N = torch.full((9,), 2)
        self.reference = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        self.reward_N = torch.randn(9, generator=generator, dtype=torch.float64)
        # Every ordered pair, labeled by Bradley-Terry.
        self.chosen_P, self.rejected_P = torch.tensor(list(product(range(9), repeat=2))).T
        gap_P = self.reward_N[self.chosen_P] - self.reward_N[self.rejected_P]
        both_P = self.logprobs_N(self.reference).exp()[
            torch.stack([self.chosen_P, self.rejected_P])
        ]
        self.probability_P = both_P.prod(0) * torch.sigmoid(gap_P)

    def logprobs_N(self, logits: Tensor) -> Tensor:
        logprobs_T = logits.log_softmax(-1)[self.row_T, self.token_T]
        return segment_sum(logprobs_T, self.lengths_N)

    def margins_P(self, logits: Tensor) -> Tensor:
        log_ratio_N = self.logprobs_N(logits) - self.logprobs_N(self.reference)
        return log_ratio_N[self.chosen_P] - log_ratio_N[self.rejected_P]


def test_dpo_on_bradley_terry_pairs_finds_the_exponential_tilt_of_the_reference() -> None:
    world, beta = Responses(), 0.5
    logits = world.reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (world.probability_P * dpo_loss(world.margins_P(logits), beta=beta)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    tilt_N = world.logprobs_N(world.reference).exp() * (world.reward_N / beta).exp()
    policy_N = world.logprobs_N(logits.detach()).exp()
    assert float((policy_N - tilt_N / tilt_N.sum()).abs().sum() / 2) < 1e-4
    assert float((policy_N - world.logprobs_N(world.reference).exp()).abs().sum() / 2) > 0.1


def test_smoothed_labels_put_the_minimum_where_the_margin_says_one_minus_epsilon() -> None:
    best = torch.tensor([math.log(0.9 / 0.1) / 0.5], dtype=torch.float64, requires_grad=True)
    loss = dpo_loss(best, beta=0.5, label_smoothing=0.1)
    assert loss.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-12)
    assert torch.autograd.grad(loss, best)[0].abs() < 1e-12


def test_robust_loss_is_unbiased_for_the_dpo_loss_under_flipped_labels() -> None:
    h = torch.linspace(-3, 3, 7, dtype=torch.float64)
    options = {"beta": 0.7, "label_smoothing": 0.2}
    mean = 0.8 * robust_loss(h, **options) + 0.2 * robust_loss(-h, **options)
    torch.testing.assert_close(mean, dpo_loss(h, beta=0.7), atol=1e-12, rtol=0)


def test_ipo_is_the_squared_distance_to_half_the_inverse_beta() -> None:
    loss_P = ipo_loss(torch.tensor([0.0, 2.5, 5.0, -1.0]), beta=0.1)
    assert loss_P.tolist() == [25.0, 6.25, 0.0, 36.0]


def test_hinge_has_no_gradient_beyond_its_margin() -> None:
    margins_P = torch.tensor([-1.0, 1.0, 3.0], requires_grad=True)
    loss_P = hinge_loss(margins_P, beta=0.5)
    assert loss_P.tolist() == [1.5, 0.5, 0.0]
    assert torch.autograd.grad(loss_P.sum(), margins_P)[0].tolist() == [-0.5, -0.5, 0.0]


def test_simpo_asks_for_its_target_margin() -> None:
    loss_P = dpo_loss(torch.tensor([0.75], dtype=torch.float64), beta=2.0, target_margin=0.5)
    assert loss_P.item() == pytest.approx(-math.log(sigmoid(2 * 0.75 - 0.5)), abs=1e-12)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_losses_refuse_options_that_they_would_not_use(name: str) -> None:
    loss, zero_P = PREFERENCE_LOSSES[name], torch.zeros(1)
    smoothing = {"label_smoothing": 0.1} if name == "robust" else {}
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        loss(zero_P, beta=0, **smoothing)
    wrong = {
        "sigmoid": ({"label_smoothing": 0.5}, {"label_smoothing": -0.1}),
        "ipo": ({"label_smoothing": 0.1}, {"target_margin": 1.0}),
        "hinge": ({"label_smoothing": 0.1}, {"target_margin": 1.0}),
        "robust": (
            {},
            {"label_smoothing": 0.5},
            {"label_smoothing": 0.1, "target_margin": 1.0},
        ),
    }
    for options in wrong[name]:
        with pytest.raises(ValueError, match=r"label_smoothing|target_margin"):
            loss(zero_P, beta=0.1, **options)


def test_bradley_terry_loss_by_hand() -> None:
    chosen_P, rejected_P = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    loss_P = bradley_terry_loss(chosen_P, rejected_P)
    assert loss_P.tolist() == pytest.approx([-math.log(sigmoid(1)), -math.log(sigmoid(-3))])
    held_P = bradley_terry_loss(chosen_P, rejected_P, margin_P=torch.tensor([0.5, 0.0]))
    assert held_P.tolist() == pytest.approx([-math.log(sigmoid(0.5)), -math.log(sigmoid(-3))])
    with pytest.raises(ValueError, match="same shape"):
        bradley_terry_loss(chosen_P, rejected_P[:1])
    with pytest.raises(ValueError, match="same shape"):
        bradley_terry_loss(chosen_P, rejected_P, margin_P=torch.zeros(1))


def test_bradley_terry_loss_is_least_at_the_rewards_that_labeled_the_pairs() -> None:
    world = Responses()
    scores_N = world.reward_N.clone().requires_grad_()
    loss_P = bradley_terry_loss(scores_N[world.chosen_P], scores_N[world.rejected_P])
    (gradient,) = torch.autograd.grad((world.probability_P * loss_P).sum(), scores_N)
    assert gradient.abs().max() < 1e-12


def test_step_loss_is_the_cross_entropy_with_its_label() -> None:
    scores_S = torch.tensor([1.0, 1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    labels = [1.0, 0.0, 0.25, 0.5]
    loss_S = step_loss(scores_S, torch.tensor(labels, dtype=torch.float64))
    p = [sigmoid(s) for s in scores_S.tolist()]
    expected = [
        -y * math.log(q) - (1 - y) * math.log(1 - q) for y, q in zip(labels, p, strict=True)
    ]
    assert loss_S.tolist() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss_S.sum(), scores_S)
    assert gradient.tolist() == pytest.approx([q - y for q, y in zip(p, labels, strict=True)])
    with pytest.raises(ValueError, match="same shape"):
        step_loss(scores_S, torch.zeros(1, dtype=torch.float64))
