"""Asynchronous sampling: weights that responses come from, cost, and off-policy correction."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equations import AGGREGATIONS
from helpers.loops import grpo_learner, ppo_learner, rollout_batches
from helpers.tiny_models import EOS, World, family, letters_tokenizer, perturb, random_lm
from safetensors.torch import load_file

from trivium.algorithms import grpo, ppo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.data.batch import Batch, Grouped
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ModelError
from trivium.hf.loading import trained_parameters
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.rollout.async_engine import AsyncEngine
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


def generate(engine: LocalEngine | AsyncEngine, step: int, **options: Any) -> list[list[Response]]:
    return engine.generate(PROMPTS, step=step, **REQUEST, **options)


def sampling_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if "async sampling" in t.name]


# --- The engine ----------------------------------------------------------------------------------


def test_responses_come_from_the_policy_at_begin() -> None:
    engine = engine_of()
    async_engine = AsyncEngine(engine)
    old = generate(engine, 5)
    async_engine.begin(PROMPTS, step=5, **REQUEST)
    perturb(engine.policy.model, seed=3, spread=0.3)
    assert generate(async_engine, 5) == old != generate(engine, 5)
    assert generate(async_engine, 6) == generate(engine, 6)
    async_engine.begin(PROMPTS, step=7, **REQUEST)
    assert generate(async_engine, 7) == generate(engine, 7)


def test_groups_are_reported_in_the_order_in_which_they_finish() -> None:
    engine = engine_of()
    async_engine = AsyncEngine(engine)
    async_engine.begin(PROMPTS, step=5, **REQUEST)
    reported: list[list[tuple[int, list[Response]]]] = [[], []]
    generate(async_engine, 5, finished=lambda *group: reported[0].append(group))
    generate(engine, 5, finished=lambda *group: reported[1].append(group))
    assert reported[0] == reported[1]
    assert len(reported[0]) == 6


def test_restored_state_gives_the_same_responses() -> None:
    engine = engine_of()
    async_engine = AsyncEngine(engine)
    assert async_engine.state_dict() is None
    async_engine.begin(PROMPTS, step=5, **REQUEST)
    expected = generate(engine, 5)
    state = async_engine.state_dict()
    assert state is not None
    state["weights"] = {name: value.clone() for name, value in state["weights"].items()}
    async_engine.close()
    perturb(engine.policy.model, seed=3, spread=0.3)
    for call_begin in (False, True):
        other = AsyncEngine(engine)
        other.load_state_dict(state)
        if call_begin:
            other.begin(PROMPTS, step=5, **REQUEST)
        assert generate(other, 5) == expected


def test_flops_are_counted_when_responses_are_returned() -> None:
    engine = engine_of()
    async_engine = AsyncEngine(engine)
    before = flops.total()
    generate(engine, 5)
    cost = flops.total() - before
    async_engine.begin(PROMPTS, step=5, **REQUEST)
    while sampling_threads():
        time.sleep(0.001)
    assert flops.total() == before + cost
    generate(async_engine, 5)
    assert flops.total() == before + 2 * cost


def test_close_stops_sampling_between_two_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    async_engine, sample_tokens, calls = AsyncEngine(engine_of()), LocalEngine._sample_tokens, []

    def slow(*args: Any) -> None:
        calls.append(1)
        time.sleep(0.05)
        sample_tokens(*args)

    monkeypatch.setattr(LocalEngine, "_sample_tokens", slow)
    async_engine.begin(PROMPTS, step=5, **REQUEST)
    while not calls:
        time.sleep(0.001)
    async_engine.close()
    assert sampling_threads() == []
    assert len(calls) <= 2


def test_error_of_the_thread_is_raised_by_generate() -> None:
    async_engine = AsyncEngine(engine_of())
    long = [Prompt([1] * 60, "", {}, 0)]
    async_engine.begin(long, step=5, **REQUEST)
    with pytest.raises(ModelError, match="do not fit the model's context"):
        async_engine.generate(long, step=5, **REQUEST)


# --- The loops -----------------------------------------------------------------------------------


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def assert_same(policy: Policy, run: Path) -> None:
    saved = weights_of(run)
    for name, value in policy.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_grpo_equals_an_explicit_loop(world: World) -> None:
    options: dict[str, Any] = {
        "iterations": 2, "steps_per_iteration": 3, "epochs": 2, "minibatches": 2, "beta": 0.1,
        "optimizer": FAST, "importance_sampling_cap": 1.1,
    }  # fmt: skip
    config = GRPOConfig(**world.on_policy(**options, asynchronous=True))
    run = grpo.train(config)
    components = build_components(config.model, config.data, config.rewards, None, config.sampling)
    trained = [(config.optimizer, trained_parameters(components.policy.model))]
    optimizer = Optimizer(trained, 6 * 2 * 2)
    rollouts = rollout_batches(config, components).of_step(1, config.dynamic_sampling)
    for step in range(1, 7):
        # The next responses come from the policy before this step's updates.
        next_rollouts = rollout_batches(config, components).of_step(
            step + 1, config.dynamic_sampling
        )
        experience = grpo_learner(config, components).prepare(rollouts, step)
        steps = grpo_learner(config, components).plan(experience, step)
        grpo_learner(config, components).update(optimizer, experience, Updates(steps))
        if step == 3:
            components.reference.refresh()
            next_rollouts = rollout_batches(config, components).of_step(4, config.dynamic_sampling)
        rollouts = next_rollouts
    assert_same(components.policy, run)
    assert sampling_threads() == []
    synchronous = grpo.train(GRPOConfig(**world.on_policy(**options)))
    differences = (
        not torch.equal(v, weights_of(run)[n]) for n, v in weights_of(synchronous).items()
    )
    assert any(differences)


def test_ppo_equals_an_explicit_loop(world: World) -> None:
    config = PPOConfig(
        **world.on_policy(
            steps=4, epochs=2, minibatches=2, optimizer=FAST, critic={"optimizer": FAST},
            importance_sampling_cap=1.1, asynchronous=True,
        )
    )  # fmt: skip
    run = ppo.train(config)
    components = build_components(config.model, config.data, config.rewards, None, config.sampling)
    critic = ppo.make_critic(config.critic, config.model, components.policy)
    actor = (config.optimizer, trained_parameters(components.policy.model))
    optimizer = Optimizer([actor, (config.critic.optimizer, critic.parameters())], 4 * 2 * 2)
    rollouts = rollout_batches(config, components).roll_out(1 - 1)
    for step in range(1, 5):
        next_rollouts = rollout_batches(config, components).roll_out(step + 1 - 1)
        steps = ppo_learner(config, components, critic).schedule.plan(
            Grouped(rollouts.groups), step
        )
        experience = ppo_learner(config, components, critic).prepare(rollouts, steps, config.beta)
        ppo_learner(config, components, critic).update(
            optimizer, experience, Updates(steps), with_actor=True, mix=None
        )
        rollouts = next_rollouts
    assert_same(components.policy, run)


def test_first_step_identities_hold_for_off_policy_samples(world: World) -> None:
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
def test_sampler_logprobs_never_replace_policy_logprobs_in_async_runs(
    world: World, method: str
) -> None:
    def fraction_rescored(**options: Any) -> float:
        config_values = world.on_policy(
            beta=0.0,
            minibatches=2,
            tokens_per_micro_batch=20,
            importance_sampling_cap=2.0,
            **options,
        )
        if method == "grpo":
            run = grpo.train(GRPOConfig(**config_values, steps_per_iteration=2))
        else:
            run = ppo.train(PPOConfig(**config_values, steps=2))
        return read_metrics(run)[-1]["policy/old_scored"]

    assert (
        fraction_rescored()
        < fraction_rescored(sampler_tolerance=0.0)
        == fraction_rescored(asynchronous=True)
    )


def test_steps_cost_the_same_with_async_sampling(world: World) -> None:
    options = {"steps_per_iteration": 3, "beta": 0.1, "importance_sampling_cap": 2.0}
    runs = [
        grpo.train(GRPOConfig(**world.on_policy(**options, asynchronous=asynchronous)))
        for asynchronous in (False, True)
    ]
    synchronous, asynchronous = ([line["flops"] for line in read_metrics(run)] for run in runs)
    assert synchronous == asynchronous


def test_budget_ends_an_async_run_after_the_same_step(world: World) -> None:
    def steps(asynchronous: bool) -> int:
        config = GRPOConfig(
            **world.on_policy(
                steps_per_iteration=50, importance_sampling_cap=2.0, asynchronous=asynchronous,
                run=world.run(budget={"generated_tokens": 300}),
            )
        )  # fmt: skip
        return len(read_metrics(grpo.train(config)))

    assert 1 < steps(True) == steps(False) < 50
    assert sampling_threads() == []


# --- The correction ------------------------------------------------------------------------------


def test_ppo_surrogate_is_weighted_by_the_truncated_sampler_ratio(world: World) -> None:
    config = PPOConfig(**world.on_policy(steps=1, whiten_advantages=False))
    components = build_components(config.model, config.data, config.rewards, None, config.sampling)
    critic = ppo.make_critic(config.critic, config.model, components.policy)
    rollouts: Rollouts = rollout_batches(config, components).roll_out(1 - 1)
    steps = ppo_learner(config, components, critic).schedule.plan(Grouped(rollouts.groups), 1)
    experience = ppo_learner(config, components, critic).prepare(rollouts, steps, config.beta)
    assert experience.old_logprobs_T is not None
    experience = replace(
        experience, sampler_logprobs_T=experience.old_logprobs_T - torch.tensor(1.5).log()
    )
    (micro_batch,) = experience.split_with_token_weights(
        [list(range(12))], AGGREGATIONS[config.aggregation], 8
    )

    def loss(cap: float | None) -> float:
        capped = config.model_copy(update={"importance_sampling_cap": cap})
        return (
            ppo_learner(capped, components, critic)
            .joint_loss(micro_batch, with_actor=True)[0]
            .item()
        )

    surrogate = (loss(1.5) - loss(1.0)) / 0.5
    assert abs(surrogate) > 0.01
    assert loss(None) == pytest.approx(loss(1.0), abs=1e-6)
    assert loss(1.2) - loss(1.0) == pytest.approx(0.2 * surrogate, abs=1e-5)
    assert loss(2.0) == pytest.approx(loss(1.5), abs=1e-5)


@pytest.mark.parametrize("shift", [1.5, 1 / 1.5])
def test_grpo_loss_is_weighted_by_the_truncated_sampler_ratio(world: World, shift: float) -> None:
    config = GRPOConfig(**world.on_policy(steps_per_iteration=1, beta=0.0))
    components = build_components(config.model, config.data, config.rewards, None, config.sampling)
    rollouts: Rollouts = rollout_batches(config, components).of_step(1, config.dynamic_sampling)
    experience = grpo_learner(config, components).prepare(rollouts, 1)
    advantages_T = torch.ones_like(experience.advantages_T)
    with torch.no_grad():
        old_T = components.policy.logprobs(Batch.of(experience.groups))
    sampler_T = old_T - torch.tensor(shift).log()
    experience = replace(
        experience, advantages_T=advantages_T, old_logprobs_T=old_T, sampler_logprobs_T=sampler_T
    )
    all_responses = [list(range(len(experience.lengths_N)))]
    (micro_batch,) = experience.split_with_token_weights(
        all_responses, AGGREGATIONS[config.aggregation], 8
    )

    def loss(cap: float | None) -> float:
        capped = config.model_copy(update={"importance_sampling_cap": cap})
        return grpo_learner(capped, components).loss(micro_batch)[0].item()

    assert loss(None) == pytest.approx(-1.0, abs=1e-5)
    for cap in (0.5, 1.0, 1.2, 2.0):
        assert loss(cap) == pytest.approx(-min(shift, cap), abs=1e-5)


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_random_numbers_of_a_batch_depend_on_its_number(
    world: World, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    steps: list[int] = []
    generate = LocalEngine.generate

    def record_step(self: LocalEngine, *config_values: Any, step: int, **options: Any) -> Any:
        steps.append(step)
        return generate(self, *config_values, step=step, **options)

    monkeypatch.setattr(LocalEngine, "generate", record_step)
    if method == "grpo":
        grpo.train(GRPOConfig(**world.on_policy(steps_per_iteration=3)))
    else:
        ppo.train(PPOConfig(**world.on_policy(steps=3)))
    assert steps == [0, 1, 2]
