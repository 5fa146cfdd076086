"""Build PPO's critic, and score a rollout batch with actor and critic before its updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trivium.algorithms.critic_config import CriticConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.data.batch import Batch, Grouped
from trivium.data.oom import run_parts, score_all
from trivium.errors import ConfigurationError
from trivium.hf.loading import trained_parameters
from trivium.hf.model_config import ModelConfig
from trivium.models.critic import Critic, SeparateCritic, SharedCritic
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel
from trivium.rollout.rollouts import Rollouts
from trivium.training.experience import (
    Minibatch,
    WeightedGroups,
    first_epoch_micro_batches,
    old_logprobs,
)
from trivium.training.optimizer import ParameterSet


def make_critic(config: CriticConfig, actor: ModelConfig, policy: Policy) -> Critic:
    """Return a separate critic from its checkpoint (by default the actor's), or a shared head."""
    if config.kind == "shared":
        return SharedCritic(policy)
    model = RewardModel.load(config.model or actor, new_head=True)
    if model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigurationError(
            f"critic.model.path is {model.model.name_or_path}, whose vocabulary is not that of the "
            "actor, and the critic reads the actor's tokens: train it from the actor's base model"
        )
    return SeparateCritic(model)


def parameter_sets(config: PPOConfig, policy: Policy, critic: Critic) -> list[ParameterSet]:
    """Return the parameters of actor and critic, each with its own rate, decay and clipping."""
    actor = (config.optimizer, trained_parameters(policy.model))
    return [actor, (config.critic.optimizer, critic.parameters())]


@dataclass(frozen=True)
class OldScores:
    """Scores of a rollout batch before its updates, all ``[T]``.

    Attributes:
        logprobs_T: π_old's log-probs.
        values_T: V_old.
        rescored_mask_T: tokens scored by a forward pass; elsewhere log-probs are the sampler's.
    """

    logprobs_T: Tensor
    values_T: Tensor
    rescored_mask_T: Tensor


def old_scores(
    policy: Policy,
    critic: Critic,
    data: WeightedGroups,
    minibatches: Sequence[Minibatch],
    sampler_logprobs_T: Tensor,
    *,
    tolerance: float,
) -> OldScores:
    """Score a rollout batch in the micro-batches of its first epoch.

    With a separate critic, ``experience.old_logprobs`` decides which log-probs need a forward pass
    of the actor. A critic that shares the actor's backbone computes both in one pass.
    """
    micro_batches = first_epoch_micro_batches(minibatches, len(data.lengths_N))
    if tolerance > 0 and isinstance(critic, SeparateCritic):
        (values_T,) = score_all(data, micro_batches, lambda batch: (critic.values(batch),))
        old_T, rescored_T = old_logprobs(
            data, minibatches, sampler_logprobs_T, policy, tolerance=tolerance
        )
        return OldScores(old_T.to(values_T.device), values_T, rescored_T)

    def logprobs_and_values(batch: Batch) -> tuple[Tensor, Tensor]:
        scores = critic.score(policy, batch)
        return scores.logprobs_T, scores.values_T

    old_T, values_T = score_all(data, micro_batches, logprobs_and_values)
    return OldScores(old_T, values_T, torch.ones(len(old_T), dtype=torch.bool))


@torch.no_grad()
def final_values(
    policy: Policy, critic: Critic, rollouts: Rollouts, like_T: Tensor, max_tokens: int
) -> Tensor:
    """Return V after the last token of truncated responses, 0 for those that ended, ``[N]``."""
    data = Grouped(rollouts.groups)
    values_N = like_T.new_zeros(len(rollouts.flat))
    score = partial(critic.final_values, policy)
    parts = data.split(max_tokens)
    for responses, values in run_parts(data, parts, lambda part: score(Batch.of(part.groups))):
        values_N[responses] = values.to(values_N)
    return torch.where(rollouts.truncated_N.to(values_N.device), values_N, 0.0)
