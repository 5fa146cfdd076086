"""Forward passes that are skipped: their replacement is exact, and necessary passes are kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loops import grpo_learner, ppo_learner, rollout_batches
from helpers.tiny_models import STILL, Captured, World, metrics_of, source
from safetensors.torch import load_file
from torch import Tensor

from trivium.algorithms import dpo, grpo, ppo
from trivium.algorithms.actor_critic import make_critic
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.data.batch import Batch, Grouped
from trivium.data.group import Group
from trivium.data.oom import score_logprobs
from trivium.hf.loading import trained_parameters
from trivium.hf.model_config import ModelConfig
from trivium.models import group_model
from trivium.models import reference as references
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.models.reward_model import RewardModel
from trivium.rollout.rollouts import Rollouts
from trivium.training.experience import (
    Experience,
    Minibatch,
    first_epoch_micro_batches,
    old_logprobs,
    plan_updates,
    token_positions,
)
from trivium.training.optimizer import Optimizer, StepResult
from trivium.training.protocols import Updates
from trivium.training.setup import OnPolicyComponents, build_components

FAST = {"learning_rate": 0.01}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def grpo_config(world: World, **options: Any) -> GRPOConfig:
    return GRPOConfig(**(world.on_policy() | {"steps_per_iteration": 1, "beta": 0.0} | options))


def ppo_config(world: World, **options: Any) -> PPOConfig:
    critic = {"model": {"path": world.reward_model()}, "optimizer": STILL}
    given = world.on_policy() | {"critic": critic, "steps": 1, "beta": 0.0}
    return PPOConfig(**(given | options))


def parts_of(config: GRPOConfig | PPOConfig) -> OnPolicyComponents:
    return build_components(config.model, config.data, config.rewards, None, config.sampling)


def with_wrong_logprob(rollouts: Rollouts, by: float, response: int = 0) -> Rollouts:
    """Return rollouts whose sampler's log-prob of one token is wrong by ``by``."""
    groups = [[replace(r, logprobs=list(r.logprobs)) for r in g] for g in rollouts.responses]
    [r for group in groups for r in group][response].logprobs[0] += by
    return Rollouts(rollouts.prompts, groups, rollouts.scores, rollouts.seconds)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the forward passes of actor and critic, with and without gradients."""
    counted: Counter[str] = Counter()

    def count(kind: type, method: str, name: str) -> None:
        run = getattr(kind, method)

        def counting(model: Any, *given: Any) -> Any:
            counted[name + (" learning" if torch.is_grad_enabled() else "")] += 1
            return run(model, *given)

        monkeypatch.setattr(kind, method, counting)

    count(Policy, "hidden", "actor")
    count(RewardModel, "scores_at", "critic")
    return counted


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[StepResult]:
    """Record every optimizer step's result, in order."""
    kept: list[StepResult] = []
    step = Optimizer.step

    def step_and_keep(optimizer: Optimizer, work: Any) -> StepResult:
        kept.append(step(optimizer, work))
        return kept[-1]

    monkeypatch.setattr(Optimizer, "step", step_and_keep)
    return kept


# --- π_old ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scored"),
    [
        ({"epochs": 3}, 0),
        ({"epochs": 3, "beta": 0.1}, 0),
        ({"epochs": 3, "importance_sampling_cap": 2.0}, 0),
        ({"epochs": 2, "minibatches": 4}, 1),
        ({"epochs": 2, "minibatches": 4, "sampler_tolerance": 0.0}, 3),
        ({"epochs": 2, "minibatches": 4, "sampler_tolerance": 1e-12}, 3),
        ({"epochs": 2, "minibatches": 4, "beta": 0.1}, 3),
    ],
)
def test_grpo_scores_old_logprobs_only_for_later_minibatches(
    world: World, passes: Counter[str], options: dict[str, Any], scored: int
) -> None:
    config = grpo_config(world, **options)
    reference = 4 if options.get("minibatches") == 4 else 1
    (line,) = metrics_of(grpo.train(config))
    assert passes["actor learning"] == config.epochs * config.minibatches
    assert passes["actor"] == scored + reference * (config.beta > 0)
    assert line["policy/old_scored"] == pytest.approx(scored / 4, abs=0.2)
    assert (line["policy/old_scored"] == 0) == (scored == 0)
    assert 0 <= line["policy/sampler_difference"] < 1e-5


@pytest.mark.parametrize(
    ("options", "actor", "critic"),
    [
        ({"minibatches": 1}, 0, 1),
        ({"minibatches": 4}, 1, 4),
        ({"minibatches": 4, "sampler_tolerance": 0.0}, 4, 4),
        ({"minibatches": 1, "beta": 0.1}, 1 + 1, 1),
        ({"minibatches": 1, "critic": {"kind": "shared"}}, 1, 0),
    ],
    ids=["one", "several", "no tolerance", "kl", "shared trunk"],
)
def test_ppo_skips_the_actor_if_only_values_are_needed(
    world: World, passes: Counter[str], options: dict[str, Any], actor: int, critic: int
) -> None:
    config = ppo_config(world, epochs=2, **options)
    (line,) = metrics_of(ppo.train(config))
    assert 0 < line["policy/sampler_difference"] < 1e-5
    assert (passes["actor"], passes["critic"]) == (actor, critic)
    assert passes["actor learning"] == 2 * config.minibatches


@pytest.mark.parametrize("most", [10_000, 25])
def test_first_step_gives_the_logprobs_of_a_pass_over_the_batch(
    world: World, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    config = grpo_config(world, epochs=2, beta=0.1, tokens_per_micro_batch=40, optimizer=FAST)
    parts = parts_of(config)
    rollouts = rollout_batches(config, parts).of_step(1, config.dynamic_sampling)
    experience = grpo_learner(config, parts).prepare(rollouts, 1)
    steps = grpo_learner(config, parts).plan(experience, 1)
    whole = first_epoch_micro_batches(steps, 12)
    assert len(whole) > 2
    expected_T = score_logprobs(parts.policy, experience, whole)
    attend = group_model.states_at

    def limited(backbone: Any, batch: Any, index: Tensor, *, shared: bool) -> Tensor:
        if len(batch.tokens_L) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attend(backbone, batch, index, shared=shared)

    monkeypatch.setattr(group_model, "states_at", limited)
    optimizer = Optimizer([(config.optimizer, trained_parameters(parts.policy.model))], 10)
    updates = Updates(steps)
    results = grpo_learner(config, parts).update(optimizer, experience, updates)
    assert (results[0].splits > 0) == (most == 25)
    old_T = experience.with_first_step_logprobs(updates).old_logprobs_T
    assert old_T is not None
    torch.testing.assert_close(old_T, expected_T, rtol=0, atol=5e-6 if most == 25 else 0)
    assert not torch.equal(results[1].observed["logprobs_T"], results[0].observed["logprobs_T"])
    at = token_positions(experience, steps[1].micro_batches)
    second_T = results[1].observed["old_logprobs_T"]
    assert torch.equal(second_T, old_T[at])


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_sampler_logprobs_replace_those_of_later_minibatches_and_the_first_is_exact(
    world: World, results: list[StepResult], method: str
) -> None:
    options = {"epochs": 1, "minibatches": 4, "optimizer": {"learning_rate": 1e-30}}
    if method == "grpo":
        grpo.train(grpo_config(world, **options))
    else:
        ppo.train(ppo_config(world, **options))
    moved = [
        float((r.observed["logprobs_T"] - r.observed["old_logprobs_T"]).abs().max())
        for r in results
    ]
    assert moved[0] == 0.0
    assert 0.0 < max(moved[1:]) < 1e-5


def prepared(
    world: World, *, by: float, tolerance: float
) -> tuple[Experience, Rollouts, list[Minibatch]]:
    """Return a rollout batch in four minibatches with a wrong sampler log-prob.

    The token is in the longest response that is not in the first minibatch.
    """
    config = grpo_config(world, minibatches=4, epochs=2, sampler_tolerance=tolerance)
    parts = parts_of(config)
    rollouts = rollout_batches(config, parts).of_step(1, config.dynamic_sampling)
    steps = plan_updates(
        Grouped(rollouts.groups), epochs=2, minibatches=4, max_tokens=10_000, seed=0, step=1
    )
    later = [r for step in steps[1:4] for r in step.responses]
    lengths = rollouts.lengths_N.tolist()
    at = max(later, key=lengths.__getitem__)
    rollouts = with_wrong_logprob(rollouts, by, at)
    return grpo_learner(config, parts).prepare(rollouts, 1), rollouts, steps


def test_agreeing_sampler_logprobs_are_used_except_where_they_were_compared(world: World) -> None:
    experience, rollouts, steps = prepared(world, by=0.0, tolerance=1e-4)
    rescored_mask_T, old_T = experience.rescored_mask_T, experience.old_logprobs_T
    assert rescored_mask_T is not None and old_T is not None
    responses = [bool(row.all()) for row in rescored_mask_T.split(rollouts.lengths_N.tolist())]
    compared = [part for step in steps[1:4] for part in step.micro_batches if responses[part[0]]]
    assert len(compared) == 1
    assert torch.equal(old_T[~rescored_mask_T], rollouts.sampler_logprobs_T[~rescored_mask_T])


@pytest.mark.parametrize("by", [0.01, -0.01, float("nan")])
def test_sampler_that_differs_on_one_token_is_replaced_everywhere(world: World, by: float) -> None:
    experience, _, steps = prepared(world, by=by, tolerance=1e-4)
    rescored_mask_T = experience.rescored_mask_T
    assert rescored_mask_T is not None
    later = torch.ones_like(rescored_mask_T)
    later[token_positions(experience, steps[0].micro_batches)] = False
    assert torch.equal(rescored_mask_T, later)


def test_larger_tolerance_accepts_the_same_sampler(world: World) -> None:
    experience, _, _ = prepared(world, by=0.01, tolerance=0.011)
    assert experience.rescored_mask_T is not None
    assert float(experience.rescored_mask_T.float().mean()) < 0.5


def ragged() -> tuple[Experience, list[Minibatch], Tensor]:
    """Return four minibatches of one response each, the third the longest, and log-probs."""
    groups = [Group([1], [list(range(1, n + 1))]) for n in (2, 4, 9, 3)]
    values_T = torch.linspace(-3, -1, 18)
    data = Experience(
        groups=groups, loss_mask_T=torch.ones(18, dtype=torch.bool), advantages_T=values_T
    )
    return data, [Minibatch([n], [[n]]) for n in range(4)], values_T


@dataclass
class Known:
    """A policy with given log-probs of the responses of ``ragged``."""

    data: Experience
    values_T: Tensor
    seen: list[int] = field(default_factory=list)

    def logprobs(self, batch: Batch) -> Tensor:
        self.seen.append(len(batch.targets_T))
        return self.values_T[token_positions(self.data, [[(2, 4, 9, 3).index(self.seen[-1])]])]


@pytest.mark.parametrize(("tolerance", "lengths"), [(1e-4, [9]), (0.0, [9, 4, 3])])
def test_longest_micro_batch_is_compared_and_without_tolerance_all_are_scored(
    tolerance: float, lengths: list[int]
) -> None:
    data, steps, values_T = ragged()
    scorer = Known(data, values_T)
    found_T, rescored_mask_T = old_logprobs(data, steps, values_T, scorer, tolerance=tolerance)
    assert scorer.seen == lengths
    assert torch.equal(found_T, values_T)
    assert int(rescored_mask_T.sum()) == sum(lengths)


def test_single_minibatch_is_never_scored_in_advance() -> None:
    data, steps, values_T = ragged()
    scorer = Known(data, values_T)
    whole = [Minibatch([0, 1, 2, 3], [part for step in steps for part in step.micro_batches])]
    found_T, rescored_mask_T = old_logprobs(data, whole * 3, values_T, scorer, tolerance=0.0)
    assert torch.equal(found_T, values_T)
    assert not rescored_mask_T.any() and scorer.seen == []


def test_first_executed_step_counts_if_minibatches_are_dropped(world: World) -> None:
    config = grpo_config(world, minibatches=4, epochs=2, beta=0.1, optimizer=FAST)
    parts = parts_of(config)
    rollouts = rollout_batches(config, parts).of_step(1, config.dynamic_sampling)
    experience = grpo_learner(config, parts).prepare(rollouts, 1)
    steps = grpo_learner(config, parts).plan(experience, 1)
    loss_mask_T = experience.loss_mask_T.clone()
    loss_mask_T[token_positions(experience, steps[0].micro_batches)] = False
    dropped = replace(experience, loss_mask_T=loss_mask_T)
    old_T, rescored_mask_T = old_logprobs(
        dropped, steps, rollouts.sampler_logprobs_T, parts.policy, tolerance=0.0
    )
    assert not rescored_mask_T[token_positions(dropped, steps[1].micro_batches)].any()
    expected_T = score_logprobs(parts.policy, dropped, first_epoch_micro_batches(steps, 12))
    dropped = replace(dropped, old_logprobs_T=old_T, rescored_mask_T=rescored_mask_T)
    optimizer = Optimizer([(config.optimizer, trained_parameters(parts.policy.model))], 10)
    updates = Updates(steps)
    grpo_learner(config, parts).update(optimizer, dropped, updates)
    found_T = dropped.with_first_step_logprobs(updates).old_logprobs_T
    assert found_T is not None
    assert torch.equal(found_T, expected_T)


def test_ppo_experience_is_the_same_with_and_without_sampler_logprobs(world: World) -> None:
    found = []
    for tolerance in (0.0, 1e-4):
        config = ppo_config(world, minibatches=2, sampler_tolerance=tolerance)
        parts = parts_of(config)
        critic = make_critic(config.critic, config.model, parts.policy)
        rollouts = rollout_batches(config, parts).roll_out(1 - 1)
        steps = ppo_learner(config, parts, critic).schedule.plan(Grouped(rollouts.groups), 1)
        found.append(ppo_learner(config, parts, critic).prepare(rollouts, steps, 0.0))
    for name in ("advantages_T", "targets_T", "old_values_T"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))
    torch.testing.assert_close(found[0].old_logprobs_T, found[1].old_logprobs_T, rtol=0, atol=1e-5)


# --- the reference --------------------------------------------------------------------------------


def dpo_config(world: World, **options: Any) -> DPOConfig:
    rows = [
        {"prompt": p, "chosen": c, "rejected": r}
        for p, c, r in (("a", "bc", "d"), ("bc", "e", "fgh"), ("d", "a", "b"), ("e", "cc", "dd"))
    ]
    given = {"model": {"path": world.path}, "data": world.rows("pairs.jsonl", rows)}
    return DPOConfig(**(given | {"run": world.run(), "optimizer": FAST} | options))


def online(world: World, **options: Any) -> dict[str, Any]:
    pairs = {"data": world.prompts, "rewards": world.reward("letters"), "steps": 1}
    return {"data": None, "online": pairs | {"sampling": {"max_tokens": 8}}} | options


def evaluated(world: World) -> dict[str, Any]:
    data = {"data": world.prompts, "max_tokens": 5, "samples": 2}
    return {"evaluation": data | {"rewards": world.reward("letters")}}


@pytest.mark.parametrize(
    ("train", "configured", "copies"),
    [
        (grpo.train, lambda w: grpo_config(w, iterations=2), 0),
        (grpo.train, lambda w: grpo_config(w, beta=0.1), 1),
        (grpo.train, lambda w: grpo_config(w, **evaluated(w)), 1),
        (ppo.train, ppo_config, 0),
        (ppo.train, lambda w: ppo_config(w, beta=0.1), 1),
        (dpo.train, dpo_config, 0),
        (dpo.train, lambda w: dpo_config(w, **evaluated(w)), 1),
        (dpo.train, lambda w: dpo_config(w, **online(w)), 1),
        (dpo.train, lambda w: dpo_config(w, **online(w, reference_free=True)), 0),
    ],
    ids=[
        "grpo", "grpo kl", "grpo evaluated", "ppo", "ppo kl", "dpo", "dpo evaluated", "dpo online",
        "dpo online reference-free",
    ],
)  # fmt: skip
def test_model_is_copied_only_for_an_enabled_reference(
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    train: Callable[[Any], Path],
    configured: Callable[[World], Any],
    copies: int,
) -> None:
    copied: list[Policy] = []
    copy = references.frozen_copy
    monkeypatch.setattr(references, "frozen_copy", lambda p: copied.append(p) or copy(p))
    train(configured(world))
    assert len(copied) == copies


def test_evaluation_without_a_kl_term_measures_kl_to_the_initial_policy(world: World) -> None:
    run = grpo.train(grpo_config(world, optimizer=FAST, steps_per_iteration=3, **evaluated(world)))
    first, last = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert first["kl"] == 0.0
    assert last["kl"] > 0.0


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_policy_before_its_first_step_scores_pairs_like_the_reference(
    world: World, lora: dict[str, int] | None
) -> None:
    policy = Policy.load(ModelConfig(path=world.path, lora=lora))
    config = dpo_config(world)
    source = dpo.Offline(config)
    given = source.data
    source.prepare(policy, Reference(policy, enabled=False))
    expected = dpo.with_reference(
        config, given, partial(score_logprobs, Reference(policy))
    ).ref_logprobs_T
    assert source.data.ref_logprobs_T is not None and expected is not None
    assert torch.equal(source.data.ref_logprobs_T, expected)


# --- groups without a gradient --------------------------------------------------------------------

SOME = """
def some(prompts, responses):
    return [float(r.count("a")) if p in ("a", "ef.gh") else 1.0
            for p, r in zip(prompts, responses)]

def none(responses):
    return [0.5] * len(responses)

def steps(prompts, responses):
    return [
        [((i, min(i + 3, len(r))), r[i : i + 3].count("a") - 0.3 if p == "a" else 0.0)
         for i in range(0, len(r), 3)]
        for p, r in zip(prompts, responses)
    ]
"""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose model computes everything in float64."""
    world = World(tmp_path_factory.mktemp("exact"), "gpt2")
    source(world.directory / "rewards.py", SOME)
    return world


def both_ways(
    world: World, monkeypatch: pytest.MonkeyPatch, *rewards: str, **options: Any
) -> list[tuple[Path, list[list[Tensor]]]]:
    """Return directory and gradients of a run, and of the same run without skipped passes."""
    captured, found = Captured(monkeypatch), []
    for skipping in (True, False):
        with monkeypatch.context() as patch:
            if not skipping:
                patch.setattr(Experience, "without_gradient", lambda _: [])
            given = world.on_policy(*rewards, model={"path": world.path, "dtype": "float64"})
            given |= {"beta": 0.0, "steps_per_iteration": 2, "optimizer": FAST}
            run = grpo.train(GRPOConfig(**(given | options)))
        found.append((run, captured.take()))
    return found


def assert_same_run(found: list[tuple[Path, list[list[Tensor]]]]) -> None:
    (mine, gradients), (theirs, expected) = found
    assert len(gradients) == len(expected)
    for one, other in zip(gradients, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    weights, others = (load_file(run / "final" / "model.safetensors") for run in (mine, theirs))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-10)
    for line, other in zip(metrics_of(mine), metrics_of(theirs), strict=True):
        for name in ("loss", "gradient_norm", "optimizer_steps", "reward/mean"):
            assert line[name] == pytest.approx(other[name], rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"surrogate": "gspo"},
        {"surrogate": "cispo", "importance_sampling_cap": 1.0},
        {"aggregation": "token_mean"},
        {"aggregation": "fixed_length"},
        {"mask_truncated": True, "aggregation": "token_mean"},
        {"scale": "none", "advantage": "leave_one_out"},
        {"supervision": "process"},
    ],
    ids=str,
)
def test_skipping_groups_without_gradient_changes_nothing(
    exact: World, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    reward = "steps" if options.get("supervision") == "process" else "some"
    epochs = {"epochs": 2, "minibatches": 2, "sampler_tolerance": 0.0}
    found = both_ways(exact, monkeypatch, reward, **epochs, **options)
    assert_same_run(found)
    assert any(float(g.abs().max()) > 1e-3 for step in found[0][1] for g in step)
    for line, whole in zip(*(metrics_of(run) for run, _ in found), strict=True):
        assert 0.25 <= line["group/skipped"] < 1 and whole["group/skipped"] == 0
        assert line["tokens/trained"] < whole["tokens/trained"]


@pytest.mark.parametrize("minibatches", [1, 4])
def test_optimizer_applies_its_moments_if_no_group_has_a_gradient(
    exact: World, monkeypatch: pytest.MonkeyPatch, minibatches: int
) -> None:
    options = {"minibatches": minibatches, "optimizer": {**FAST, "weight_decay": 0.1}}
    moving = {"prompts_per_step": 2, "minibatches": min(minibatches, 2)}
    found = both_ways(exact, monkeypatch, "none", **options)
    assert_same_run(found)
    assert len(found[0][1]) == 2 * minibatches
    assert all(not g.any() for step in found[0][1] for g in step)
    start = load_file(Path(exact.path) / "model.safetensors")
    moved = load_file(found[0][0] / "final" / "model.safetensors")
    assert any(not torch.equal(moved[name], start[name].double()) for name in moved)
    found = both_ways(exact, monkeypatch, "some", **(options | moving), steps_per_iteration=4)
    assert_same_run(found)
    empty = [not any(g.any() for g in step) for step in found[0][1]]
    assert True in empty[1:] and False in empty


def test_skipped_groups_use_no_tokens_of_micro_batches(exact: World) -> None:
    config = grpo_config(exact, rewards=exact.reward("some"), tokens_per_micro_batch=40)
    parts = parts_of(config)
    rollouts = rollout_batches(config, parts).of_step(1, config.dynamic_sampling)
    experience = grpo_learner(config, parts).prepare(rollouts, 1)
    (minibatch,) = grpo_learner(config, parts).plan(experience, 1)
    kept = sorted(r for part in minibatch.micro_batches for r in part)
    useful = [
        n
        for n, row in enumerate(experience.advantages_T.split(rollouts.lengths_N.tolist()))
        if bool(row.any())
    ]
    assert kept == useful
    assert minibatch.responses == list(range(12))
    parts_alone = experience.select(kept).split(40)
    assert [[kept[i] for i in part] for part in parts_alone] == minibatch.micro_batches


def test_kl_term_gives_every_group_a_gradient(exact: World, passes: Counter[str]) -> None:
    config = grpo_config(exact, rewards=exact.reward("none"), beta=0.1, minibatches=4)
    (line,) = metrics_of(grpo.train(config))
    assert line["group/skipped"] == 0 and line["group/equal_rewards"] == 1
    assert line["tokens/trained"] == line["tokens/generated"]


def test_whole_batch_without_gradient_costs_one_short_pass(
    exact: World, passes: Counter[str]
) -> None:
    config = grpo_config(exact, rewards=exact.reward("none"), epochs=3)
    (line,) = metrics_of(grpo.train(config))
    assert line["group/skipped"] == 0.75
    assert line["tokens/trained"] == 3 * line["length/min"]
    assert (passes["actor"], passes["actor learning"]) == (0, 3)


def test_nan_advantage_is_never_skipped() -> None:
    data, _, values_T = ragged()
    advantages_T = torch.zeros_like(values_T)
    advantages_T[-1] = float("nan")
    assert replace(data, advantages_T=advantages_T).without_gradient() == [0, 1, 2]


def test_response_without_trained_tokens_has_no_gradient() -> None:
    data, _, _ = ragged()
    loss_mask_T = torch.ones(18, dtype=torch.bool)
    loss_mask_T[2:6] = False
    assert replace(data, loss_mask_T=loss_mask_T).without_gradient() == [1]


def test_cheapest_response_is_kept_if_all_would_be_skipped() -> None:
    groups = [Group([1] * 5, [[1], [1, 2]]), Group([1], [[1] * 3, [1] * 4])]
    options = {
        "epochs": 1,
        "max_tokens": 100,
        "seed": 0,
        "step": 0,
        "without_gradient": [0, 1, 2, 3],
    }
    (step,) = plan_updates(Grouped(groups), minibatches=1, **options)
    assert (step.responses, step.micro_batches) == ([0, 1, 2, 3], [[2]])
    steps = plan_updates(Grouped(groups), minibatches=2, **options | {"without_gradient": [0, 1]})
    assert sorted(step.micro_batches for step in steps) == [[[0]], [[2, 3]]]
