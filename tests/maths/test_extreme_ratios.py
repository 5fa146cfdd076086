"""Losses of log-ratios that overflow an exponential: bounded, and untouched below the bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.equations import SURROGATES
from torch import Tensor

from trivium.maths import importance_ratio, k1, k2, k3, truncated_importance
from trivium.maths.kl import MAX_LOG_RATIO

LENGTHS = torch.tensor([3, 2, 4])
ADVANTAGES = torch.tensor([2.0, -1.0, 0.5, -2.0, -2.0, 1.0, -0.5, -1.5, 3.0])
BELOW = [-300.0, -25.0, -3.0, -0.1, 0.05, 2.0, 10.0, 19.0, -0.7]
ABOVE = [25.0, 60.0, 90.0, 300.0, 1e4, -1e4, -90.0, 1e30, 21.0]


def surrogate(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(new_T: Tensor, old_T: Tensor) -> Tensor:
        found = SURROGATES[name](
            new_T, old_T, ADVANTAGES.to(new_T), LENGTHS, clip_low=0.2, clip_high=0.3
        )
        return getattr(found, "loss_T", found)

    return loss


def corrected(new_T: Tensor, old_T: Tensor) -> Tensor:
    """GRPO's unbiased KL: the estimate times the ratio."""
    return importance_ratio(new_T, old_T) * k2(new_T, torch.zeros_like(new_T))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: surrogate(name) for name in ("clipped", "gspo", "cispo")},
    "ratio": importance_ratio,
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "corrected kl": corrected,
}


def computed(
    name: str, log_ratios: list[float], dtype: torch.dtype
) -> tuple[list[float], list[float]]:
    """Return a loss and its gradient to the log-probs."""
    old_T = torch.full((len(log_ratios),), -2.0, dtype=dtype)
    new_T = (old_T + torch.tensor(log_ratios, dtype=dtype)).requires_grad_()
    loss_T = LOSSES[name](new_T, old_T)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), new_T)
    return loss_T.tolist(), gradient_T.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_of_any_log_ratio_are_finite(name: str, dtype: torch.dtype) -> None:
    ratios = [x if x < 1e10 or name not in ("k2", "corrected kl") else 1e10 for x in ABOVE]
    losses, gradients = computed(name, ratios, dtype)
    assert all(map(math.isfinite, losses + gradients)), (losses, gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_below_the_bound_is_the_unbounded_formula_in_float64(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = computed(name, BELOW if name != "k3" else [-x for x in BELOW], torch.float32)
    monkeypatch.setattr("trivium.maths.kl.MAX_LOG_RATIO", math.inf)
    expected = computed(name, BELOW if name != "k3" else [-x for x in BELOW], torch.float64)
    for mine, exact in zip(found, expected, strict=True):
        assert mine == pytest.approx(exact, rel=3e-6, abs=1e-6)


def test_ratio_and_its_gradient_stop_growing_at_the_bound() -> None:
    losses, gradients = computed("ratio", [19.5, 20.5, 80.0], torch.float64)
    assert losses == pytest.approx([math.exp(19.5), math.exp(20), math.exp(20)], rel=1e-12)
    assert gradients == pytest.approx([math.exp(19.5), 0.0, 0.0], rel=1e-12)
    assert MAX_LOG_RATIO == 20


def test_k3_keeps_its_pull_below_the_bound_and_has_none_beyond_it() -> None:
    losses, gradients = computed("k3", [-19.0, -30.0, 30.0], torch.float64)
    expected = [math.expm1(19) - 19, math.expm1(20) - 20, math.expm1(-30) + 30]
    assert losses == pytest.approx(expected, rel=1e-12)
    assert gradients == pytest.approx([1 - math.exp(19), 0.0, 1 - math.exp(-30)], rel=1e-12)


def test_a_bad_token_beyond_the_bound_does_not_change_the_others_gradients() -> None:
    plain = [0.1, -0.1, 0.2, 0.0, 0.05, 0.1, 0.0, 0.1, 0.2]
    extreme = [*plain]
    extreme[3] = 500.0  # Its advantage is negative, so clipping does not remove it.
    _, expected = computed("clipped", plain, torch.float32)
    losses, found = computed("clipped", extreme, torch.float32)
    assert found[3] == 0
    assert losses[3] == pytest.approx(2 * math.exp(20), rel=1e-6)
    assert found[:3] + found[4:] == pytest.approx(expected[:3] + expected[4:], rel=1e-6)


def test_importance_weights_of_any_log_ratio_are_capped_or_small() -> None:
    logprobs_T = torch.tensor([0.0, -500.0, -1.0])
    weights_T = truncated_importance(logprobs_T, torch.tensor([-400.0, 0.0, -1.0]), cap=2.0)
    assert weights_T.tolist() == [2.0, 0.0, 1.0]
    unbounded_T = truncated_importance(logprobs_T, torch.tensor([-400.0, 0.0, -1.0]), cap=math.inf)
    assert unbounded_T.tolist() == pytest.approx([math.exp(20), 0.0, 1.0], rel=1e-6)
