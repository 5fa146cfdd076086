"""Drawing tokens from logits."""

from __future__ import annotations

import torch

from trivium.rollout.engine import draw
from trivium.rollout.sampling import Sampling


def test_uniform_that_rounds_up_to_the_total_draws_the_last_possible_token() -> None:
    logits_RV = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
    token_R, _ = draw(logits_RV, torch.ones(2, dtype=torch.float64), Sampling())
    assert token_R.tolist() == [1, 2]
