"""Losses of reward models over groups: pairs (Bradley-Terry) and labeled steps.

Shared by ``reward_model`` (a run of its own) and ``reward_update`` (inside PPO and GRPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.data.batch import Batch, Grouped
from trivium.data.group import Group
from trivium.maths.objectives import bradley_terry_loss, step_loss
from trivium.models.reward_model import RewardModel
from trivium.training.micro_batch import LossOutput


@dataclass(frozen=True)
class Pairs(Grouped):
    """Preference pairs: each group holds the chosen and the rejected response, in this order."""

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Pairs:
        return cls(list(groups))


@dataclass(frozen=True)
class LabeledSteps(Grouped):
    """Responses whose steps are labeled.

    Attributes:
        labels_T: each step's label in [0, 1] at its last token, NaN at every other token.
    """

    labels_T: Tensor

    @classmethod
    def of(
        cls, groups: Sequence[Group], ends: Sequence[list[int]], labels: Sequence[list[float]]
    ) -> LabeledSteps:
        """Build from the end token and label of each response's steps, one response per group."""
        rows = []
        for group, at, values in zip(groups, ends, labels, strict=True):
            row = torch.full((len(group.responses[0]),), torch.nan)
            row[at] = torch.tensor(values)
            rows.append(row)
        return cls(list(groups), torch.cat(rows))

    @property
    def count(self) -> int:
        """Number of labeled steps."""
        return int((~self.labels_T.isnan()).sum())


def pair_loss(model: RewardModel, pairs: Pairs, total: int, center: float) -> LossOutput:
    """``1/total Σ_p {−log σ(s_w − s_l) + center·(s_w + s_l)²}`` of one micro-batch of pairs."""
    scores_P2 = model.scores(Batch.of(pairs.groups)).view(-1, 2)
    chosen_P, rejected_P = scores_P2.unbind(1)
    loss_P = bradley_terry_loss(chosen_P, rejected_P) + center * scores_P2.sum(1).square()
    observed = {
        "margin_P": (chosen_P - rejected_P).detach(),
        "score_P": scores_P2.detach().mean(1),
    }
    return loss_P.sum() / total, observed


def labeled_step_loss(model: RewardModel, steps: LabeledSteps, total: int) -> LossOutput:
    """``1/total Σ_s BCE(logit_s, label_s)`` of one micro-batch of labeled responses."""
    batch = Batch.of(steps.groups)
    is_end_T = ~steps.labels_T.isnan()
    logits_S = model.scores_at(batch, batch.token_positions_T[is_end_T])
    labels_S = steps.labels_T[is_end_T].to(logits_S)
    observed = {"logit_S": logits_S.detach(), "label_S": labels_S}
    return step_loss(logits_S, labels_S).sum() / total, observed


def pair_accuracy(margin_P: Tensor) -> Tensor:
    """Return 1 if the chosen response scores higher, 0.5 if both score the same, ``[P]``."""
    return (margin_P > 0).float() + 0.5 * (margin_P == 0).float()


def step_accuracy(logit_S: Tensor, label_S: Tensor) -> Tensor:
    """Return 1 if the step's probability is on its label's side of one half, ``[S]``."""
    return ((logit_S > 0) == (label_S > 0.5)).float()
