"""The surrogate's expected gradient at ρ = 1, summed over every response, against the exact one.

A world holds every response over a few tokens; its policy is a table with one row of logits per
prefix, so autograd through the enumerated expectation is the exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from helpers.equations import ADVANTAGES, AGGREGATIONS
from torch import Tensor

from trivium.maths import (
    clipped_surrogate,
    gae,
    importance_ratio,
    k1,
    k2,
    k3,
    kl_shaped_rewards,
    repeat_per_segment,
    segment_sum,
    token_weights,
    weighted_sum,
)

Members = tuple[int, ...]


def assert_exact(gradient: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(gradient, expected, atol=1e-8, rtol=0)


class World:
    """All responses of up to ``longest`` tokens; token 0 ends a response where ``eos`` is set."""

    def __init__(self, vocabulary: int, longest: int, eos: bool) -> None:
        whole = product(range(vocabulary), repeat=longest)
        responses = list(dict.fromkeys(y[: y.index(0) + 1] if eos and 0 in y else y for y in whole))
        prefixes = [y[:t] for y in responses for t in range(len(y))]
        row = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefixes))}
        generator = torch.Generator().manual_seed(len(responses))

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.longest = longest
        self.logits = draw(len(row), vocabulary).requires_grad_()
        self.ref_logits = draw(len(row), vocabulary)
        self.critic = draw(len(row))
        self.reward_N = draw(len(responses))
        self.row_T = torch.tensor([row[prefix] for prefix in prefixes])
        self.token_T = torch.tensor([token for y in responses for token in y])
        self.lengths_N = torch.tensor([len(y) for y in responses])

    def logprobs_T(self) -> Tensor:
        return self.logits.log_softmax(-1)[self.row_T, self.token_T]

    def ref_logprobs_T(self) -> Tensor:
        return self.ref_logits.log_softmax(-1)[self.row_T, self.token_T]

    def probability_N(self) -> Tensor:
        return segment_sum(self.logprobs_T(), self.lengths_N).exp()

    def gradient(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.logits)[0]

    def reward_gradient(self) -> Tensor:
        """The exact gradient of the expected reward."""
        return self.gradient((self.probability_N() * self.reward_N).sum())

    def step_loss(self, members: Members, advantages_T: Tensor, aggregation: str) -> Tensor:
        """One optimizer step's loss on a rollout batch of these responses."""
        spans_T = list(torch.arange(len(self.token_T)).split(self.lengths_N.tolist()))
        logprobs_T = self.logprobs_T()[torch.cat([spans_T[i] for i in members])]
        lengths_N = self.lengths_N[list(members)]
        loss_T = clipped_surrogate(
            logprobs_T, logprobs_T.detach(), advantages_T, lengths_N, clip_low=0.2, clip_high=0.2
        ).loss_T
        weights_T = token_weights(
            lengths_N,
            AGGREGATIONS[aggregation],
            max_length=self.longest if aggregation == "fixed_length" else None,
            dtype=torch.float64,
        )
        return weighted_sum(loss_T, weights_T)

    def expectation(self, size: int, loss: Callable[[Members], Tensor]) -> Tensor:
        """The expected loss of a batch of ``size`` responses sampled from the policy as it is."""
        probability_N = self.probability_N().detach()
        batches = product(range(len(self.lengths_N)), repeat=size)
        return torch.stack([probability_N[list(m)].prod() * loss(m) for m in batches]).sum()

    def ppo_loss(
        self, rewards_T: Tensor, critic: Tensor, gae_lambda: float, aggregation: str
    ) -> Tensor:
        """Expected PPO loss of a rollout batch of one response, γ = 1."""
        advantages_T = gae(
            rewards_T, critic[self.row_T], self.lengths_N, gamma=1, gae_lambda=gae_lambda
        )
        own_T = advantages_T.detach().split(self.lengths_N.tolist())
        return self.expectation(1, lambda m: self.step_loss(m, own_T[m[0]], aggregation))

    def grpo_loss(self, size: int, aggregation: str, advantage: str = "group_mean") -> Tensor:
        """Expected GRPO loss of one prompt's group, advantages not divided by a deviation."""

        def loss(members: Members) -> Tensor:
            rewards_N, lengths_N = self.reward_N[list(members)], self.lengths_N[list(members)]
            advantages_N = ADVANTAGES[advantage](rewards_N, torch.tensor([size]), scale="none")
            return self.step_loss(members, repeat_per_segment(advantages_N, lengths_N), aggregation)

        return self.expectation(size, loss)

    def outcome_rewards_T(self, beta: float = 0.0) -> Tensor:
        kl_T = k1(self.logprobs_T(), self.ref_logprobs_T()).detach()
        return kl_shaped_rewards(self.reward_N, kl_T, self.lengths_N, beta)

    def true_values(self) -> Tensor:
        """V(s) of every prefix: the mean reward of the responses that pass through it."""
        probability_T = repeat_per_segment(self.probability_N().detach(), self.lengths_N)
        nothing = torch.zeros_like(self.critic)
        visits = nothing.index_add(0, self.row_T, probability_T)
        rewards_T = probability_T * repeat_per_segment(self.reward_N, self.lengths_N)
        return nothing.index_add(0, self.row_T, rewards_T) / visits


@pytest.fixture(params=["fixed_length", "with_eos"])
def world(request: pytest.FixtureRequest) -> World:
    """Nine responses of two tokens, or fifteen of one to three that end at token 0."""
    return World(3, 3, eos=True) if request.param == "with_eos" else World(3, 2, eos=False)


def test_world_enumerates_a_probability_distribution(world: World) -> None:
    assert len(world.lengths_N) in (9, 15)
    assert world.probability_N().sum().item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("scale_of_critic", [0.0, 1.0, 100.0])
def test_ppo_at_lambda_one_has_the_gradient_of_expected_reward_for_any_critic(
    world: World, scale_of_critic: float
) -> None:
    loss = world.ppo_loss(
        world.outcome_rewards_T(), scale_of_critic * world.critic, 1.0, "fixed_length"
    )
    assert_exact(-world.longest * world.gradient(loss), world.reward_gradient())


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95])
def test_ppo_below_lambda_one_has_the_gradient_of_expected_reward_for_the_true_critic(
    world: World, gae_lambda: float
) -> None:
    loss = world.ppo_loss(
        world.outcome_rewards_T(), world.true_values(), gae_lambda, "fixed_length"
    )
    assert_exact(-world.longest * world.gradient(loss), world.reward_gradient())
    wrong = world.ppo_loss(world.outcome_rewards_T(), world.critic, gae_lambda, "fixed_length")
    assert (world.longest * world.gradient(wrong) + world.reward_gradient()).abs().max() > 1e-3


def test_kl_in_the_reward_has_the_gradient_of_reward_minus_beta_kl(world: World) -> None:
    loss = world.ppo_loss(world.outcome_rewards_T(beta=0.3), world.critic, 1.0, "fixed_length")
    log_ratio_N = segment_sum(k1(world.logprobs_T(), world.ref_logprobs_T()), world.lengths_N)
    objective = (world.probability_N() * (world.reward_N - 0.3 * log_ratio_N)).sum()
    assert_exact(-world.longest * world.gradient(loss), world.gradient(objective))


def test_group_mean_has_the_gradient_of_expected_reward_after_its_factor(world: World) -> None:
    loss = world.grpo_loss(2, "fixed_length")
    assert_exact(-world.longest * 2 / (2 - 1) * world.gradient(loss), world.reward_gradient())


def test_group_of_three_needs_the_factor_three_halves() -> None:
    world = World(2, 2, eos=True)
    loss = world.grpo_loss(3, "fixed_length")
    assert_exact(-world.longest * 3 / (3 - 1) * world.gradient(loss), world.reward_gradient())


def test_leave_one_out_needs_no_factor(world: World) -> None:
    loss = world.grpo_loss(2, "fixed_length", advantage="leave_one_out")
    assert_exact(-world.longest * world.gradient(loss), world.reward_gradient())


def length_weighted_reward_gradient(world: World, reward_N: Tensor) -> Tensor:
    """``E[r(y) / |y| · ∇log π(y)]``, the gradient of the length-weighted reward."""
    return world.gradient((world.probability_N() * reward_N / world.lengths_N).sum())


def test_sequence_mean_has_the_gradient_of_length_weighted_reward(world: World) -> None:
    loss = world.ppo_loss(
        world.outcome_rewards_T(), torch.zeros_like(world.critic), 1.0, "sequence_mean"
    )
    expected = length_weighted_reward_gradient(world, world.reward_N)
    assert_exact(-world.gradient(loss), expected)


def test_sequence_mean_with_a_group_weighs_the_centered_reward_by_length(world: World) -> None:
    mean = (world.probability_N() * world.reward_N).sum().detach()
    expected = length_weighted_reward_gradient(world, world.reward_N - mean)
    assert_exact(-2 / (2 - 1) * world.gradient(world.grpo_loss(2, "sequence_mean")), expected)


def test_sequence_mean_is_exact_only_for_responses_of_one_length() -> None:
    for eos in (False, True):
        world = World(3, 2, eos)
        gradient = -2 * 2 * world.gradient(world.grpo_loss(2, "sequence_mean"))
        exact = torch.allclose(gradient, world.reward_gradient(), atol=1e-8, rtol=0)
        assert exact is not eos


def token_kl_gradient(world: World, *, reverse: bool = False) -> Tensor:
    """``Σ_t E[∇KL(π(·|s_t)‖π_ref(·|s_t))]`` (``reverse``: ‖ swapped), with the prefixes s_t drawn
    from the policy as it is."""
    p, q = world.logits.log_softmax(-1), world.ref_logits.log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1) if reverse else (p.exp() * (p - q)).sum(-1)
    probability_T = repeat_per_segment(world.probability_N().detach(), world.lengths_N)
    # A prefix's row appears once in every response that passes through it.
    visits = torch.zeros_like(kl).index_add(0, world.row_T, probability_T).detach()
    return world.gradient((visits * kl).sum())


def whole_kl_gradient(world: World) -> Tensor:
    """``∇KL(π‖π_ref)`` of whole responses."""
    log_ratio_N = segment_sum(k1(world.logprobs_T(), world.ref_logprobs_T()), world.lengths_N)
    return world.gradient((world.probability_N() * log_ratio_N).sum())


def kl_loss_gradient(world: World, kl: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The expected gradient of a KL term summed over the tokens of a sampled response."""
    probability_T = repeat_per_segment(world.probability_N().detach(), world.lengths_N)
    return world.gradient(
        weighted_sum(kl(world.logprobs_T(), world.ref_logprobs_T()), probability_T)
    )


def test_k3_in_the_loss_has_the_gradient_of_each_tokens_reverse_kl(world: World) -> None:
    expected = token_kl_gradient(world, reverse=True)
    assert_exact(kl_loss_gradient(world, k3), expected)


@pytest.mark.parametrize("kl", [k1, k3])
def test_kl_times_ratio_has_the_gradient_of_each_tokens_kl(
    world: World, kl: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def corrected(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
        return importance_ratio(logprobs_T, logprobs_T.detach()) * kl(logprobs_T, ref_logprobs_T)

    assert_exact(kl_loss_gradient(world, corrected), token_kl_gradient(world))


def test_k2_in_the_loss_has_the_gradient_of_each_tokens_kl(world: World) -> None:
    assert_exact(kl_loss_gradient(world, k2), token_kl_gradient(world))


def test_k1_in_the_loss_without_the_ratio_has_no_expected_gradient(world: World) -> None:
    assert kl_loss_gradient(world, k1).abs().max() < 1e-14


def test_kl_in_the_loss_leaves_out_what_a_token_does_to_later_prefixes(world: World) -> None:
    difference = (token_kl_gradient(world) - whole_kl_gradient(world)).abs().sum(1)
    first_row, last_rows = difference[0], difference[world.row_T[-1]]
    assert first_row > 1e-2
    assert last_rows < 1e-14
