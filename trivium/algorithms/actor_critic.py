"""How PPO's critic is configured and made, and what actor and critic say before an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trivium.algorithms.critic_config import CriticConfig
from trivium.data.batch import Batch, Grouped
from trivium.errors import ConfigurationError
from trivium.models.critic import Critic, SeparateCritic, SharedCritic
from trivium.models.model_config import ModelConfig
from trivium.models.oom import run_with_oom_split, score_all
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel
from trivium.rollout.rollouts import Rollouts
from trivium.training.experience import Minibatch, WeightedGroups, first_epoch, old_logprobs


def make_critic(config: CriticConfig, actor: ModelConfig, policy: Policy) -> Critic:
    """A separate critic from its own checkpoint (by default the actor's), or a shared head."""
    if config.kind == "shared":
        return SharedCritic(policy)
    model = RewardModel.load(config.model or actor)
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigurationError(
            f"critic.model.path is {model.model.name_or_path}, whose vocabulary is not that of the "
            "actor, and the critic reads the actor's tokens: train it from the actor's base model"
        )
    return SeparateCritic(model)


@dataclass(frozen=True)
class OldScores:
    """π_old's log-probs and V_old's values, ``[T]``; ``rescored_mask_T``: which log-probs were scored and
    are not the sampler's."""

    logprobs_T: Tensor
    values_T: Tensor
    rescored_mask_T: Tensor


def old_scores(
    policy: Policy,
    critic: Critic,
    data: WeightedGroups,
    steps: Sequence[Minibatch],
    sampler_T: Tensor,
    *,
    tolerance: float,
) -> OldScores:
    """Score a rollout batch in the micro-batches of its first epoch.

    A critic of its own is spared the actor's pass as far as ``experience.old_logprobs`` allows. One
    that shares the actor's trunk gets values and log-probs from one pass.
    """
    micro_batches = first_epoch(steps, len(data.lengths_N))
    if tolerance > 0 and isinstance(critic, SeparateCritic):
        (values_T,) = score_all(data, micro_batches, lambda batch: (critic.values(batch),))
        old_T, rescored_mask_T = old_logprobs(data, steps, sampler_T, policy, tolerance=tolerance)
        return OldScores(old_T.to(values_T.device), values_T, rescored_mask_T)

    def both(batch: Batch) -> tuple[Tensor, Tensor]:
        scores = critic.score(policy, batch)
        return scores.logprobs_T, scores.values_T

    old_T, values_T = score_all(data, micro_batches, both)
    return OldScores(old_T, values_T, torch.ones(len(old_T), dtype=torch.bool))


@torch.no_grad()
def final_values(
    policy: Policy, critic: Critic, rollouts: Rollouts, like_T: Tensor, *, max_tokens: int
) -> Tensor:
    """V after the last token of cut-off responses, 0 for those that ended, ``[N]``."""
    data = Grouped(rollouts.groups)
    values_N = like_T.new_zeros(len(rollouts.flat))
    final = partial(critic.final_values, policy)
    for whole in data.split(max_tokens):
        for responses, values in run_with_oom_split(
            data, whole, lambda d: final(Batch.of(d.groups))
        ):
            values_N[responses] = values.to(values_N)
    return torch.where(rollouts.truncated_N.to(values_N.device), values_N, 0.0)
