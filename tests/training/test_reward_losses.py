"""How the pairs and steps of reward models are counted as right."""

from __future__ import annotations

import torch

from trivium.training.reward_losses import pair_accuracy, step_accuracy


def test_pair_with_equal_scores_is_half_right() -> None:
    margin_P = torch.tensor([2.0, 0.0, -1e-6])
    assert pair_accuracy(margin_P).tolist() == [1.0, 0.5, 0.0]


def test_step_is_right_on_its_labels_side_of_one_half() -> None:
    logit_S = torch.tensor([0.1, -0.1, 0.1, -0.1])
    label_S = torch.tensor([1.0, 0.0, 0.25, 0.75])
    assert step_accuracy(logit_S, label_S).tolist() == [1.0, 1.0, 0.0, 0.0]
