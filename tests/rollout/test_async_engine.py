"""Sampling a step ahead: whose responses they are, what they cost, and what corrects for them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loops import grpo_learner, ppo_learner
from helpers.tiny_models import EOS, World, family, letters_tokenizer, perturb, random_lm
from safetensors.torch import load_file

from trivium.algorithms import grpo, ppo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.rollout_step import RolloutBatches
from trivium.data.batch import Batch, Grouped
from trivium.data.prompts import Prompt
from trivium.errors import ModelError
from trivium.models import flops
from trivium.models.loading import trained_parameters
from trivium.models.policy import Policy
from trivium.rollout.async_engine import AsyncEngine
from trivium.rollout.engine import Response
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.rollouts import Rollouts
from trivium.rollout.sampling import Sampling
from trivium.runs.store import read_metrics
from trivium.training.optimizer import Optimizer
from trivium.training.protocols import Updates
from trivium.training.setup import build_components

FAST = {"learning_rate": 0.01}
PROMPTS = [Prompt([1 + i, 2, 3][: 1 + i % 3], "", {}, i) for i in range(6)]
REQUEST: dict[str, Any] = {"samples": 3, "sampling": Sampling(max_tokens=12), "seed": 1}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def engine_of() -> LocalEngine:
    policy = Policy(random_lm(family("llama", 13), spread=0.2), letters_tokenizer())
    return LocalEngine(policy, {EOS}, max_rows=9)


def sampled(engine: LocalEngine | AsyncEngine, step: int, **options: Any) -> list[list[Response]]:
    return engine.generate(PROMPTS, step=step, **REQUEST, **options)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if "ahead" in t.name]


# --- The engine ----------------------------------------------------------------------------------


def test_responses_are_those_of_the_policy_as_it_was_when_they_were_begun() -> None:
    engine = engine_of()
    ahead = AsyncEngine(engine)
    old = sampled(engine, 5)
    ahead.begin(PROMPTS, step=5, **REQUEST)
    perturb(engine.policy.model, seed=3, spread=0.3)
    assert sampled(ahead, 5) == old != sampled(engine, 5)
    assert sampled(ahead, 6) == sampled(engine, 6)
    ahead.begin(PROMPTS, step=7, **REQUEST)
    assert sampled(ahead, 7) == sampled(engine, 7)


def test_groups_are_told_in_the_order_in_which_they_end() -> None:
    engine = engine_of()
    ahead = AsyncEngine(engine)
    ahead.begin(PROMPTS, step=5, **REQUEST)
    told: list[list[tuple[int, list[Response]]]] = [[], []]
    sampled(ahead, 5, finished=lambda *group: told[0].append(group))
    sampled(engine, 5, finished=lambda *group: told[1].append(group))
    assert told[0] == told[1]
    assert len(told[0]) == 6


def test_state_samples_again_what_was_being_sampled() -> None:
    engine = engine_of()
    ahead = AsyncEngine(engine)
    assert ahead.state_dict() is None
    ahead.begin(PROMPTS, step=5, **REQUEST)
    expected = sampled(engine, 5)
    state = ahead.state_dict()
    assert state is not None
    state["weights"] = {name: value.clone() for name, value in state["weights"].items()}
    ahead.close()
    perturb(engine.policy.model, seed=3, spread=0.3)
    for prepared in (False, True):
        other = AsyncEngine(engine)
        other.load_state_dict(state)
        if prepared:
            other.begin(PROMPTS, step=5, **REQUEST)
        assert sampled(other, 5) == expected


def test_cost_is_counted_when_the_responses_are_taken() -> None:
    engine = engine_of()
    ahead = AsyncEngine(engine)
    before = flops.total()
    sampled(engine, 5)
    cost = flops.total() - before
    ahead.begin(PROMPTS, step=5, **REQUEST)
    while threads():
        time.sleep(0.001)
    assert flops.total() == before + cost
    sampled(ahead, 5)
    assert flops.total() == before + 2 * cost


def test_closing_ends_the_sampling_between_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, extend, drawn = AsyncEngine(engine_of()), LocalEngine._sample_tokens, []

    def slow(*args: Any) -> None:
        drawn.append(1)
        time.sleep(0.05)
        extend(*args)

    monkeypatch.setattr(LocalEngine, "_sample_tokens", slow)
    ahead.begin(PROMPTS, step=5, **REQUEST)
    while not drawn:
        time.sleep(0.001)
    ahead.close()
    assert threads() == []
    assert len(drawn) <= 2


def test_error_of_the_thread_is_raised_where_the_responses_are_wanted() -> None:
    ahead = AsyncEngine(engine_of())
    long = [Prompt([1] * 60, "", {}, 0)]
    ahead.begin(long, step=5, **REQUEST)
    with pytest.raises(ModelError, match="do not fit the model's context"):
        ahead.generate(long, step=5, **REQUEST)


# --- The loops -----------------------------------------------------------------------------------


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def assert_same(policy: Policy, run: Path) -> None:
    saved = weights_of(run)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_grpo_is_the_loop_written_out_by_hand(world: World) -> None:
    options: dict[str, Any] = {
        "iterations": 2, "steps_per_iteration": 3, "epochs": 2, "minibatches": 2, "beta": 0.1,
        "optimizer": FAST, "importance_sampling_cap": 1.1,
    }  # fmt: skip
    config = GRPOConfig(**world.on_policy(**options, asynchronous=True))
    run = grpo.train(config)
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    trained = [(config.optimizer, trained_parameters(parts.policy.model))]
    optimizer = Optimizer(trained, 6 * 2 * 2)
    rollouts = RolloutBatches.of(config, parts).of_step(1, config.dynamic_sampling)
    for step in range(1, 7):
        # The next responses, from the policy as it is before this step's updates.
        ahead = RolloutBatches.of(config, parts).of_step(step + 1, config.dynamic_sampling)
        experience = grpo_learner(config, parts).prepare(rollouts, step)
        steps = grpo_learner(config, parts).plan(experience, step)
        grpo_learner(config, parts).update(optimizer, experience, Updates(steps))
        if step == 3:
            parts.reference.refresh()
            ahead = RolloutBatches.of(config, parts).of_step(4, config.dynamic_sampling)
        rollouts = ahead
    assert_same(parts.policy, run)
    assert threads() == []
    plain = grpo.train(GRPOConfig(**world.on_policy(**options)))
    differs = (not torch.equal(v, weights_of(run)[n]) for n, v in weights_of(plain).items())
    assert any(differs)


def test_ppo_is_the_loop_written_out_by_hand(world: World) -> None:
    config = PPOConfig(
        **world.on_policy(
            steps=4, epochs=2, minibatches=2, optimizer=FAST, critic={"optimizer": FAST},
            importance_sampling_cap=1.1, asynchronous=True,
        )
    )  # fmt: skip
    run = ppo.train(config)
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    critic = ppo.make_critic(config.critic, config.model, parts.policy)
    actor = (config.optimizer, trained_parameters(parts.policy.model))
    optimizer = Optimizer([actor, (config.critic.optimizer, critic.parameters())], 4 * 2 * 2)
    rollouts = RolloutBatches.of(config, parts).roll_out(1 - 1)
    for step in range(1, 5):
        ahead = RolloutBatches.of(config, parts).roll_out(step + 1 - 1)
        steps = ppo_learner(config, parts, critic).schedule.plan(Grouped(rollouts.groups), step)
        experience = ppo_learner(config, parts, critic).prepare(rollouts, steps, config.beta)
        ppo_learner(config, parts, critic).update(
            optimizer, experience, Updates(steps), actor=True, mix=None
        )
        rollouts = ahead
    assert_same(parts.policy, run)


def test_first_step_identities_hold_for_old_samples(world: World) -> None:
    run = grpo.train(
        GRPOConfig(
            **world.on_policy(
                steps_per_iteration=3, beta=0.1, optimizer=FAST, importance_sampling_cap=2.0,
                asynchronous=True,
            )
        )
    )  # fmt: skip
    first, *later = read_metrics(run)
    assert first["policy/sampler_difference"] < 1e-5
    for line in later:
        assert line["policy/sampler_difference"] > 1e-3
        assert line["policy/ratio_min"] == line["policy/ratio_max"] == 1.0
        assert line["policy/clip_low"] == line["policy/clip_high"] == 0.0


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_old_samplers_log_probs_never_stand_in_for_the_policys(world: World, method: str) -> None:
    def scored(**options: Any) -> float:
        given = world.on_policy(
            beta=0.0,
            minibatches=2,
            tokens_per_micro_batch=20,
            importance_sampling_cap=2.0,
            **options,
        )
        if method == "grpo":
            run = grpo.train(GRPOConfig(**given, steps_per_iteration=2))
        else:
            run = ppo.train(PPOConfig(**given, steps=2))
        return read_metrics(run)[-1]["policy/old_scored"]

    assert scored() < scored(sampler_tolerance=0.0) == scored(asynchronous=True)


def test_steps_cost_what_they_cost_without_sampling_ahead(world: World) -> None:
    options = {"steps_per_iteration": 3, "beta": 0.1, "importance_sampling_cap": 2.0}
    runs = [
        grpo.train(GRPOConfig(**world.on_policy(**options, asynchronous=asynchronous)))
        for asynchronous in (False, True)
    ]
    plain, ahead = ([line["flops"] for line in read_metrics(run)] for run in runs)
    assert plain == ahead


def test_budget_ends_a_run_after_the_same_step_and_leaves_nothing_sampling(world: World) -> None:
    def steps(asynchronous: bool) -> int:
        config = GRPOConfig(
            **world.on_policy(
                steps_per_iteration=50, importance_sampling_cap=2.0, asynchronous=asynchronous,
                run=world.run(budget={"generated_tokens": 300}),
            )
        )  # fmt: skip
        return len(read_metrics(grpo.train(config)))

    assert 1 < steps(True) == steps(False) < 50
    assert threads() == []


# --- The correction ------------------------------------------------------------------------------


def test_surrogate_of_ppo_is_weighted_by_the_truncated_ratio_to_the_sampler(world: World) -> None:
    config = PPOConfig(**world.on_policy(steps=1, whiten_advantages=False))
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    critic = ppo.make_critic(config.critic, config.model, parts.policy)
    rollouts: Rollouts = RolloutBatches.of(config, parts).roll_out(1 - 1)
    steps = ppo_learner(config, parts, critic).schedule.plan(Grouped(rollouts.groups), 1)
    experience = ppo_learner(config, parts, critic).prepare(rollouts, steps, config.beta)
    assert experience.old_logprobs_T is not None
    experience = replace(
        experience, sampler_logprobs_T=experience.old_logprobs_T - torch.tensor(1.5).log()
    )
    (part,) = experience.split_with_token_weights([list(range(12))], config.aggregation, 8)

    def loss(limit: float | None) -> float:
        limited = config.model_copy(update={"importance_sampling_cap": limit})
        return ppo_learner(limited, parts, critic).joint_loss(part, with_actor=True)[0].item()

    surrogate = (loss(1.5) - loss(1.0)) / 0.5
    assert abs(surrogate) > 0.01
    assert loss(None) == pytest.approx(loss(1.0), abs=1e-6)
    assert loss(1.2) - loss(1.0) == pytest.approx(0.2 * surrogate, abs=1e-5)
    assert loss(2.0) == pytest.approx(loss(1.5), abs=1e-5)


@pytest.mark.parametrize("shift", [1.5, 1 / 1.5])
def test_loss_of_grpo_is_weighted_by_the_truncated_ratio_to_the_sampler(
    world: World, shift: float
) -> None:
    config = GRPOConfig(**world.on_policy(steps_per_iteration=1, beta=0.0))
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    rollouts: Rollouts = RolloutBatches.of(config, parts).of_step(1, config.dynamic_sampling)
    experience = grpo_learner(config, parts).prepare(rollouts, 1)
    advantages_T = torch.ones_like(experience.advantages_T)
    with torch.no_grad():
        old_T = parts.policy.logprobs(Batch.of(experience.groups))
    sampler_T = old_T - torch.tensor(shift).log()
    experience = replace(
        experience, advantages_T=advantages_T, old_logprobs_T=old_T, sampler_logprobs_T=sampler_T
    )
    everything = [list(range(len(experience.lengths_N)))]
    (part,) = experience.split_with_token_weights(everything, config.aggregation, 8)

    def loss(limit: float | None) -> float:
        limited = config.model_copy(update={"importance_sampling_cap": limit})
        return grpo_learner(limited, parts).loss(part)[0].item()

    assert loss(None) == pytest.approx(-1.0, abs=1e-5)
    for limit in (0.5, 1.0, 1.2, 2.0):
        assert loss(limit) == pytest.approx(-min(shift, limit), abs=1e-5)


@pytest.mark.parametrize(("method", "first"), [("grpo", 0), ("ppo", 1)])
def test_random_numbers_of_a_batch_are_those_of_its_number(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str, first: int
) -> None:
    # What a seed draws is a promise: runs of before are repeated by it.
    steps: list[int] = []
    generate = LocalEngine.generate

    def noted(self: LocalEngine, *given: Any, step: int, **options: Any) -> Any:
        steps.append(step)
        return generate(self, *given, step=step, **options)

    monkeypatch.setattr(LocalEngine, "generate", noted)
    if method == "grpo":
        grpo.train(GRPOConfig(**world.on_policy(steps_per_iteration=3)))
    else:
        ppo.train(PPOConfig(**world.on_policy(steps=3)))
    assert steps == [first, first + 1, first + 2]
