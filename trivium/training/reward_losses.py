"""Losses of reward models over groups: pairs (Bradley-Terry), rankings and labeled steps.

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
from trivium.maths.rankings import Comparisons, comparisons, ranking_losses
from trivium.models.reward_model import RewardModel
from trivium.training.micro_batch import LossOutput


@dataclass(frozen=True)
class Pairs(Grouped):
    """Preference pairs: each group holds the chosen and the rejected response, in this order.

    Attributes:
        margin_N: the pair's margin, at both of its responses; None without margins.
    """

    margin_N: Tensor | None = None

    @classmethod
    def of(cls, groups: Sequence[Group], margins: Sequence[float] | None = None) -> Pairs:
        """Build from groups of two responses, and the margin of each pair."""
        margin_N = None if margins is None else torch.tensor(margins).repeat_interleave(2)
        return cls(list(groups), margin_N)


@dataclass(frozen=True)
class Rankings(Grouped):
    """Rankings of two or more responses to each prompt, whose numbers may differ.

    Attributes:
        labels_N: each response's score in the data; higher is better.
        counts_ties_N: whether a tie is learned as half a win of each response.
        margin_N: a better response must win by the difference of these.
    """

    labels_N: Tensor
    counts_ties_N: Tensor
    margin_N: Tensor

    @classmethod
    def of(
        cls,
        groups: Sequence[Group],
        scores: Sequence[Sequence[float]],
        *,
        counts_ties: bool = False,
        margin_scale: float = 0.0,
    ) -> Rankings:
        """Build from groups and the scores of their responses."""
        labels_N = torch.tensor([x for row in scores for x in row], dtype=torch.float64)
        counts_ties_N = torch.full(labels_N.shape, counts_ties)
        return cls(list(groups), labels_N, counts_ties_N, margin_scale * labels_N)


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
    """``1/total Σ_p {−log σ(s_w − s_l − m) + center·(s_w + s_l)²}`` of one micro-batch of pairs."""
    scores_P2 = model.scores(Batch.of(pairs.groups)).view(-1, 2)
    chosen_P, rejected_P = scores_P2.unbind(1)
    margin_P = None if pairs.margin_N is None else pairs.margin_N[0::2].to(chosen_P)
    loss_P = bradley_terry_loss(chosen_P, rejected_P, margin_P=margin_P)
    loss_P = loss_P + center * scores_P2.sum(1).square()
    observed = {
        "margin_P": (chosen_P - rejected_P).detach(),
        "score_P": scores_P2.detach().mean(1),
    }
    return loss_P.sum() / total, observed


def ranking_loss(model: RewardModel, rankings: Rankings, total: int, center: float) -> LossOutput:
    """``1/total Σ_g 1/C(K, 2) Σ_p {−log σ(s_w − s_l − m) + center·(s_w + s_l)²}``.

    All comparisons p of a prompt's K responses come from one forward pass of each response.
    """
    scores_N = model.scores(Batch.of(rankings.groups))
    device = scores_N.device
    on_host = comparisons(rankings.labels_N, rankings.sizes_G)
    found = Comparisons(*(x.to(device) for x in on_host))
    counts_ties_N = rankings.counts_ties_N.to(device)
    loss_P = ranking_losses(
        scores_N, found, counts_ties_N=counts_ties_N, margin_N=rankings.margin_N.to(scores_N)
    )
    sum_P = scores_N[found.better_P] + scores_N[found.worse_P]
    used_P = ~found.tied_P | counts_ties_N[found.better_P]
    loss_P = loss_P + center * torch.where(used_P, sum_P.square(), 0.0)
    margin_P = (scores_N[found.better_P] - scores_N[found.worse_P]).detach()
    right_P = torch.where(found.tied_P, 0.0, pair_accuracy(margin_P))
    decided_G = torch.zeros(len(rankings.groups)).index_add(
        0, on_host.ranking_P, (~on_host.tied_P).float()
    )
    right_G = right_P.new_zeros(len(decided_G)).index_add(0, found.ranking_P, right_P)
    some = torch.nonzero(decided_G)[:, 0]
    observed = {"accuracy_G": right_G[some.to(device)] / decided_G[some].to(device)}
    return (found.weights_P.to(loss_P) * loss_P).sum() / total, observed


def labeled_step_loss(model: RewardModel, steps: LabeledSteps, total: int) -> LossOutput:
    """``1/total Σ_s BCE(logit_s, label_s)`` of one micro-batch of labeled responses."""
    batch = Batch.of(steps.groups)
    is_end_T = ~steps.labels_T.isnan()
    logits_S = model.scores_at(batch, batch.token_positions_T[is_end_T])
    labels_S = steps.labels_T[is_end_T].to(logits_S)
    observed = {"logit_S": logits_S.detach(), "label_S": labels_S}
    return step_loss(logits_S, labels_S).sum() / total, observed


def reward_loss(model: RewardModel, data: Grouped, total: int, center: float) -> LossOutput:
    """Return the loss of one micro-batch of pairs, rankings or labeled responses."""
    if isinstance(data, LabeledSteps):
        return labeled_step_loss(model, data, total)
    if isinstance(data, Rankings):
        return ranking_loss(model, data, total, center)
    assert isinstance(data, Pairs), f"{type(data).__name__} is no data of a reward model"
    return pair_loss(model, data, total, center)


def pair_accuracy(margin_P: Tensor) -> Tensor:
    """Return 1 if the chosen response scores higher, 0.5 if both score the same, ``[P]``."""
    return (margin_P > 0).float() + 0.5 * (margin_P == 0).float()


def step_accuracy(logit_S: Tensor, label_S: Tensor) -> Tensor:
    """Return 1 if the step's probability is on its label's side of one half, ``[S]``."""
    return ((logit_S > 0) == (label_S > 0.5)).float()
