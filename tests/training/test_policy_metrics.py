"""Metrics of an update, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trivium.training.policy_metrics import policy_metrics, value_metrics


def test_policy_metrics_by_hand() -> None:
    ratios = torch.tensor([0.5, 1.0, 2.0, 1.0])
    old_T = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    metrics = policy_metrics(
        {
            "logprobs_T": old_T + ratios.log(),
            "old_logprobs_T": old_T,
            "entropy_T": torch.tensor([1.0, 2.0, 3.0, 0.0]),
            "advantages_T": torch.tensor([1.0, -1.0, 3.0, 1.0]),
            "clipped_low_T": torch.tensor([False, False, False, True]),
            "clipped_high_T": torch.tensor([True, True, True, False]),
        }
    )
    expected = {
        "policy/entropy": 1.5,
        "policy/ratio_mean": 1.125,
        "policy/ratio_min": 0.5,
        "policy/ratio_max": 2.0,
        "policy/clip_low": 0.25,
        "policy/clip_high": 0.75,
        # KL(π_old‖π) of samples of π_old: l = −log ρ, and k3 = ρ − 1 − log ρ.
        "policy/kl_old_k1": -(math.log(0.5) + math.log(2)) / 4,
        "policy/kl_old": (0.5 - 1 - math.log(0.5) + 2 - 1 - math.log(2)) / 4,
        "tokens/trained": 4.0,
        "advantage/mean": 1.0,
        "advantage/std": math.sqrt(2),
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_explained_variance_by_hand() -> None:
    metrics = value_metrics(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 3.0, 5.0]))
    # The targets vary by 8/3, and their difference to the values, 0, 1, 0, by 2/9.
    assert metrics["value/explained_variance"] == pytest.approx(1 - (2 / 9) / (8 / 3))
    assert metrics["value/mean"] == pytest.approx(8 / 3)
    assert metrics["value/target_mean"] == pytest.approx(3.0)


@pytest.mark.parametrize("count", [3, 7, 1000])
def test_targets_that_differ_by_rounding_alone_explain_nothing(count: int) -> None:
    targets_T = torch.full((count,), 0.1)
    targets_T[0] = 0.3 - 0.2
    metrics = value_metrics(torch.linspace(0, 1, count), targets_T)
    assert metrics["value/explained_variance"] == 0.0
