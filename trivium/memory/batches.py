"""Batches of the shapes that a run meets, for its memory prediction; tokens have no meaning."""

from __future__ import annotations

import torch

from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.data.batch import Grouped
from trivium.memory.simulator import Simulator, heaviest
from trivium.training.experience import MicroBatches, WeightedGroups, plan_updates
from trivium.training.reward_losses import LabeledSteps, Pairs, Rankings


def zeros(data: Grouped) -> torch.Tensor:
    """Return a zero for each response token, ``[T]``."""
    return torch.zeros(int(data.lengths_N.sum()))


def demonstrations(simulator: Simulator, count: int) -> WeightedGroups:
    """Return ``count`` demonstrations whose response tokens are all trained on."""
    groups = simulator.groups(count, 1)
    tokens = sum(len(g.responses[0]) for g in groups)
    return WeightedGroups(groups, loss_mask_T=torch.ones(tokens, dtype=torch.bool))


def preference_pairs(simulator: Simulator, count: int) -> Pairs:
    """Return ``count`` pairs of a chosen and a rejected response."""
    return Pairs.of(simulator.groups(count, 2))


def rankings(simulator: Simulator, count: int) -> Rankings:
    """Return ``count`` rankings of the data's mean number of responses, rounded up."""
    lengths = simulator.lengths
    size = max(2, -(-len(lengths.responses) // len(lengths.prompts)))
    return Rankings.of(simulator.groups(count, size), [list(map(float, range(size)))] * count)


def labeled_steps(simulator: Simulator, count: int) -> LabeledSteps:
    """Return ``count`` responses with one labeled step each."""
    groups = simulator.groups(count, 1)
    ends = [[len(g.responses[0]) - 1] for g in groups]
    return LabeledSteps.of(groups, ends, [[1.0]] * count)


def largest_micro_batches(config: PPOConfig | GRPOConfig, data: Grouped) -> MicroBatches:
    """Return the largest micro-batches of the first epoch's largest optimizer step."""
    steps = plan_updates(
        data,
        epochs=1,
        minibatches=config.minibatches,
        max_tokens=config.tokens_per_micro_batch,
        seed=config.run.seed,
        step=0,
    )
    return heaviest(data, max(steps, key=lambda step: len(step.responses)).micro_batches)
