"""The bandit of IPO's paper at full size (Azar et al. 2024, section 5.4).

Three actions, no context, a uniform reference. Policies are softmaxes of three logits, trained with
Adam at 0.01 for 18,000 steps on minibatches of 9 pairs, over 10 seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trivium.maths import dpo_loss, ipo_loss

STEPS, MINIBATCH, SEEDS = 18_000, 9, 10
BETAS = (0.1, 0.5, 1.0)
A, B, C = 0, 1, 2
D1 = torch.tensor([[A, B], [B, C], [A, C]])
"""Every action is compared once with every other, and a is preferred to b to c."""
D3 = torch.tensor([[A, B], [B, A]])
"""The comparisons contradict each other, and c is never seen."""


def train(loss: Callable[..., Tensor], pairs: Tensor) -> Tensor:
    """Return the policies after training, ``[betas, seeds, actions]``."""
    logits = torch.zeros(len(BETAS), SEEDS, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(pairs), (STEPS, SEEDS, MINIBATCH), generator=generator)
    for minibatch in drawn:
        chosen, rejected = pairs[minibatch].expand(len(BETAS), -1, -1, -1).unbind(-1)
        # The reference is uniform: its log ratios are 0.
        margins = logits.gather(2, chosen) - logits.gather(2, rejected)
        losses = [loss(x, beta=beta) for x, beta in zip(margins, BETAS, strict=True)]
        optimizer.zero_grad()
        torch.stack(losses).mean(2).sum().backward()
        optimizer.step()
    return logits.detach().softmax(2)


def closed_form(tau: float) -> list[float]:
    """Return IPO's policy on D1.

    With k = 1/(2τ), u = θ_a − θ_b and v = θ_b − θ_c the loss is (u − k)² + (v − k)² + (u + v − k)².
    Its derivatives are 0 at u = v = 2k/3 = 1/(3τ).
    """
    weights = [math.exp(n / (3 * tau)) for n in (2, 1, 0)]
    return [w / sum(weights) for w in weights]


@pytest.mark.slow
def test_dpo_collapses_onto_one_action_whatever_its_beta() -> None:
    policies = train(dpo_loss, D1)
    assert (policies[..., A] > 0.999).all()


@pytest.mark.slow
def test_ipo_s_policy_depends_on_tau_as_the_closed_form_says() -> None:
    policies = train(ipo_loss, D1)
    for tau, policy in zip(BETAS, policies, strict=True):
        expected = torch.tensor(closed_form(tau), dtype=torch.float64)
        torch.testing.assert_close(policy.mean(0), expected, atol=0.02, rtol=0)
        assert (policy - expected).abs().max() < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_contradicting_comparisons_leave_both_uniform(loss: Callable[..., Tensor]) -> None:
    policies = train(loss, D3)
    torch.testing.assert_close(
        policies.mean(1), torch.full((len(BETAS), 3), 1 / 3, dtype=torch.float64), atol=0.03, rtol=0
    )
