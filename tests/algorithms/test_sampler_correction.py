"""Importance sampling between sampler and trainer in the losses and metrics of PPO and GRPO."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.loops import grpo_learner, ppo_learner, rollout_batches
from helpers.tiny_models import World, metrics_of
from torch import Tensor

from trivium.algorithms import grpo, ppo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.sampler_correction import SamplerCorrection, importance_metrics
from trivium.data.batch import Batch, Grouped
from trivium.errors import TrainingError
from trivium.maths.aggregation import sequence_mean
from trivium.training.setup import build_components

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CAP = 1.3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def weights_by_hand(mode: str, log_ratio_T: Tensor, lengths: list[int]) -> list[float]:
    found = []
    for row in log_ratio_T.double().split(lengths):
        ratios = [math.exp(x) for x in row.tolist()]
        if mode.startswith("sequence"):
            ratios = [math.prod(ratios)] * len(ratios)
        bounded = [min(r, CAP) if mode.endswith("truncate") else r * (r <= CAP) for r in ratios]
        found += bounded
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_loss_has_the_weights_written_out(world: World, method: str, mode: str) -> None:
    options = {"importance_sampling_cap": CAP, "importance_sampling": mode, "beta": 0.0}
    kind: Any = GRPOConfig if method == "grpo" else PPOConfig
    config = kind(**world.on_policy(**options))
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    rollouts = rollout_batches(config, parts).roll_out(0)
    if method == "grpo":
        learner: Any = grpo_learner(config, parts)
        experience: Any = learner.prepare(rollouts, 1)
    else:
        learner = ppo_learner(
            config, parts, ppo.make_critic(config.critic, config.model, parts.policy)
        )
        minibatches = learner.schedule.plan(Grouped(rollouts.groups), 1)
        experience = learner.prepare(rollouts, minibatches, 0.0)
    with torch.no_grad():
        old_T = parts.policy.logprobs(Batch.of(experience.groups))
    shift_T = 0.4 * torch.randn(len(old_T), generator=torch.Generator().manual_seed(1))
    advantages_T = torch.linspace(-1, 2, len(old_T))
    experience = replace(
        experience, old_logprobs_T=old_T, sampler_logprobs_T=old_T - shift_T,
        advantages_T=advantages_T,
    )  # fmt: skip
    lengths = experience.lengths_N.tolist()
    (part,) = experience.split_with_token_weights([list(range(len(lengths)))], sequence_mean)
    loss = learner.loss if method == "grpo" else learner.actor_loss
    total, observed = loss(part)
    expected = weights_by_hand(mode, shift_T, lengths)
    assert len({round(x, 4) for x in expected}) > 2
    assert observed["importance_T"].tolist() == pytest.approx(expected, rel=1e-5)
    per_token = -torch.tensor(expected) * advantages_T  # ρ is 1.
    means = torch.stack([row.mean() for row in per_token.split(lengths)])
    assert float(total.detach()) == pytest.approx(float(means.mean()), abs=1e-5)
    found = importance_metrics(observed)
    free = weights_by_hand(mode.replace("mask", "truncate"), shift_T, lengths)
    capped = [x == CAP for x in free]
    assert any(capped) and not all(capped)
    assert found["policy/importance_capped"] == pytest.approx(sum(capped) / len(capped))
    assert found["policy/importance_mean"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_without_a_cap_there_are_no_weights_and_no_metrics(world: World) -> None:
    assert SamplerCorrection.of("token_truncate", None) is None
    run = grpo.train(GRPOConfig(**world.on_policy(steps_per_iteration=1)))
    assert "policy/importance_mean" not in metrics_of(run)[0]


@pytest.mark.parametrize("mode", MODES)
def test_runs_log_weights_of_one_where_sampler_and_trainer_agree(world: World, mode: str) -> None:
    options = {"importance_sampling_cap": 2.0, "importance_sampling": mode}
    (line,) = metrics_of(ppo.train(PPOConfig(**world.on_policy(steps=1, **options))))
    assert line["policy/importance_mean"] == pytest.approx(1, abs=1e-4)
    assert line["policy/importance_capped"] == 0


def test_step_whose_responses_are_all_masked_ends_the_run() -> None:
    zero_T = torch.zeros(3)
    observed = {"importance_T": zero_T, "importance_capped_T": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(TrainingError, match=r"every response was masked.*raise the cap"):
        importance_metrics(observed)
    some = observed | {"importance_T": torch.tensor([0.0, 1.0, 0.0])}
    assert importance_metrics(some)["policy/importance_mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("config", [GRPOConfig, PPOConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_sampling": "sequence_mask"}, "set importance_sampling_cap, 2 is usual"),
        ({"importance_sampling": "token_mask"}, "set importance_sampling_cap, 2 is usual"),
        (
            {"importance_sampling": "sequence_mask", "importance_sampling_cap": 1.0},
            "sequence_mask leaves out what is above it",
        ),
        ({"importance_sampling": "sequence"}, "token_truncate"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(
    world: World, config: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config(**world.on_policy(**options))


def test_cap_below_one_truncates(world: World) -> None:
    options = {"importance_sampling": "sequence_truncate", "importance_sampling_cap": 0.5}
    (line,) = metrics_of(
        grpo.train(GRPOConfig(**world.on_policy(steps_per_iteration=1, **options)))
    )
    assert line["policy/importance_mean"] == pytest.approx(0.5)
    assert line["policy/importance_capped"] == 1
