"""GAE, λ-returns and whitening, against loops that know nothing of flat tensors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.maths import gae, return_targets, whiten

REPRODUCIBLE = settings(max_examples=40, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Trajectories:
    """Rewards, values and a bootstrap value of responses of unequal lengths."""

    rewards: list[list[float]]
    values: list[list[float]]
    bootstrap: list[float]

    def advantages(
        self, gamma: float, gae_lambda: float, bootstrapped: bool = True
    ) -> torch.Tensor:
        return gae(
            self.flat(self.rewards),
            self.flat(self.values),
            torch.tensor([len(row) for row in self.rewards]),
            gamma=gamma,
            gae_lambda=gae_lambda,
            bootstrap_N=torch.tensor(self.bootstrap, dtype=torch.float64) if bootstrapped else None,
        )

    def targets(self, gamma: float, gae_lambda: float) -> torch.Tensor:
        return return_targets(self.flat(self.values), self.advantages(gamma, gae_lambda))

    @staticmethod
    def flat(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectories:
    number = st.floats(-3, 3, width=32)
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rows = [draw(st.lists(number, min_size=n, max_size=n)) for n in lengths]
    values = [draw(st.lists(number, min_size=n, max_size=n)) for n in lengths]
    return Trajectories(rows, values, [draw(number) for _ in lengths])


def n_step_return(
    rewards: list[float], values: list[float], bootstrap: float, t: int, n: int, gamma: float
) -> float:
    """``Σ_{k<n} γ^k r_{t+k} + γ^n V(s_{t+n})``, with the bootstrap value behind the last token."""
    after = [*values, bootstrap]
    return sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * after[t + n]


UNIT = st.sampled_from([0.0, 0.3, 0.9, 1.0])


@REPRODUCIBLE
@given(trajectories(), UNIT, UNIT)
def test_gae_is_the_discounted_sum_of_td_errors(
    world: Trajectories, gamma: float, gae_lambda: float
) -> None:
    expected = []
    for rewards, values, bootstrap in zip(
        world.rewards, world.values, world.bootstrap, strict=True
    ):
        after = [*values[1:], bootstrap]
        delta = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
        for t in range(len(delta)):
            expected.append(
                sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, len(delta)))
            )
    torch.testing.assert_close(
        world.advantages(gamma, gae_lambda), torch.tensor(expected, dtype=torch.float64)
    )


@REPRODUCIBLE
@given(trajectories(), UNIT, UNIT)
def test_return_target_is_the_lambda_mixture_of_n_step_returns(
    world: Trajectories, gamma: float, gae_lambda: float
) -> None:
    expected = []
    for row in zip(world.rewards, world.values, world.bootstrap, strict=True):
        for t in range(len(row[0])):
            left = len(row[0]) - t
            mixture = gae_lambda ** (left - 1) * n_step_return(*row, t, left, gamma)
            for n in range(1, left):
                mixture += (
                    (1 - gae_lambda) * gae_lambda ** (n - 1) * n_step_return(*row, t, n, gamma)
                )
            expected.append(mixture)
    torch.testing.assert_close(
        world.targets(gamma, gae_lambda), torch.tensor(expected, dtype=torch.float64)
    )


WORLD = Trajectories([[1.0, 2.0], [4.0]], [[10.0, 20.0], [40.0]], [100.0, 200.0])


def test_lambda_one_gives_the_monte_carlo_return() -> None:
    targets_T = WORLD.targets(0.5, 1.0)
    assert targets_T.tolist() == [1 + 0.5 * 2 + 0.25 * 100, 2 + 0.5 * 100, 4 + 0.5 * 200]


def test_lambda_zero_gives_the_one_step_target() -> None:
    targets_T = WORLD.targets(0.5, 0.0)
    assert targets_T.tolist() == [1 + 0.5 * 20, 2 + 0.5 * 100, 4 + 0.5 * 200]


def test_value_after_an_ended_response_is_zero() -> None:
    advantages_T = WORLD.advantages(1.0, 0.0, bootstrapped=False)
    assert advantages_T.tolist() == [1 + 20 - 10, 2 - 20, 4 - 40]


def test_empty_responses_are_passed_over() -> None:
    x_T = torch.tensor([1.0, 2.0])
    lengths_N, bootstrap_N = torch.tensor([0, 2, 0]), torch.tensor([7.0, 8.0, 9.0])
    kept_T = gae(x_T, x_T, lengths_N, gamma=1, gae_lambda=0, bootstrap_N=bootstrap_N)
    assert kept_T.tolist() == [1 + 2 - 1, 2 + 8 - 2]
    none = torch.tensor([], dtype=torch.float64)
    assert gae(none, none, torch.tensor([0]), gamma=1, gae_lambda=1).shape == (0,)


def test_gae_refuses_what_does_not_fit() -> None:
    x_T, lengths_N = torch.ones(3), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="same shape"):
        gae(x_T, torch.ones(1), lengths_N, gamma=1, gae_lambda=1)
    with pytest.raises(ValueError, match="add up to 3, but there are 2"):
        gae(torch.ones(2), torch.ones(2), lengths_N, gamma=1, gae_lambda=1)
    with pytest.raises(ValueError, match="same shape"):
        gae(x_T, x_T, lengths_N, gamma=1, gae_lambda=1, bootstrap_N=torch.ones(1))
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1 and 95"):
        gae(x_T, x_T, lengths_N, gamma=1, gae_lambda=95)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got -0.1 and 1"):
        gae(x_T, x_T, lengths_N, gamma=-0.1, gae_lambda=1)
    with pytest.raises(ValueError, match="same shape"):
        return_targets(x_T, torch.ones(1))


def test_whitened_advantages_have_mean_zero_and_population_variance_one() -> None:
    x_T = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    expected_T = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / (14 / 3) ** 0.5
    torch.testing.assert_close(whiten(x_T, epsilon=0), expected_T)


def test_whitening_reads_the_selected_tokens_alone() -> None:
    x_T = torch.tensor([torch.nan, 1.0, 3.0, 1e9], dtype=torch.float64)
    selected_T = torch.tensor([False, True, True, False])
    torch.testing.assert_close(
        whiten(x_T, selected_T, epsilon=0),
        torch.tensor([0.0, -1.0, 1.0, 0.0], dtype=torch.float64),
    )
    assert whiten(x_T, ~selected_T)[[0, 3]].isnan().all()


def test_whitening_what_cannot_vary_gives_zero() -> None:
    assert whiten(torch.tensor([5.0]), epsilon=0).tolist() == [0]
    assert whiten(torch.full((3,), 0.5)).tolist() == [0, 0, 0]
    assert whiten(torch.tensor([1.0, 2.0]), torch.tensor([False, False])).tolist() == [0, 0]
    assert whiten(torch.ones(0)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_equal_advantages_gives_exactly_zero(dtype: torch.dtype) -> None:
    for value, count in ((0.1, 3), (1 / 3, 7), (-1e6 / 3, 11), (0.7, 1000)):
        x_T = torch.full((count,), value, dtype=dtype)
        assert not whiten(x_T).any()
        assert not whiten(torch.cat([x_T, x_T[:1] + 1]), torch.arange(count + 1) < count).any()
    assert whiten(torch.tensor([0.3, 0.1 + 0.2], dtype=torch.float64)).tolist() == [0, 0]
    assert whiten(torch.full((3,), torch.nan)).isnan().all()
    assert whiten(torch.full((3,), torch.inf)).isnan().all()


def test_whitening_adds_its_epsilon_to_the_variance() -> None:
    x_T = torch.tensor([-1e-4, 1e-4], dtype=torch.float64)  # variance 1e-8, the default epsilon
    half = 0.5**0.5
    assert whiten(x_T).tolist() == pytest.approx([-half, half], abs=1e-12)
    assert whiten(x_T, epsilon=3e-8).tolist() == pytest.approx([-0.5, 0.5], abs=1e-12)
