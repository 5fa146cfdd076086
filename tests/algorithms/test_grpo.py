"""GRPO's stages and its three loops on a tiny model."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any

import pytest
import torch
from helpers.equations import AGGREGATIONS
from helpers.loops import grpo_learner, rollout_batches
from helpers.tiny_models import (
    STILL,
    World,
    assert_same_parameter_gradients,
    differentiable_logprobs,
    metrics_of,
    perturb,
    plain_logprobs,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from trivium.algorithms import grpo, rollout_step
from trivium.algorithms.grpo import GRPOExperience
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.reward_update import RewardUpdate, contrasts
from trivium.algorithms.supervision import Supervision
from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ConfigurationError, TrainingError
from trivium.maths.aggregation import sequence_mean
from trivium.models.reward_model import RewardModel
from trivium.rewards.reward import Scores
from trivium.rollout.rollouts import Rollouts
from trivium.training.protocols import Updates
from trivium.training.setup import OnPolicyComponents, build_components

FAST = {"learning_rate": 0.01}
PROBE = Batch.of([Group([1, 2], [[3, 4, 5]])])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def config_of(world: World, *rewards: str, **options: Any) -> GRPOConfig:
    return GRPOConfig(**(world.on_policy(*rewards) | {"steps_per_iteration": 1} | options))


class Fixture:
    """A configuration with its loaded parts and a rollout batch."""

    def __init__(self, world: World, *rewards: str, **options: Any) -> None:
        self.config = config_of(world, *rewards, **options)
        self.parts = build_components(
            self.config.model, self.config.data, self.config.rewards, None, self.config.sampling
        )
        perturb(self.parts.policy.model, seed=21, spread=0.05)
        self.rollouts = rollout_batches(self.config, self.parts).of_step(
            0, self.config.dynamic_sampling
        )

    def prepare(self) -> GRPOExperience:
        return grpo_learner(self.config, self.parts).prepare(self.rollouts, 0)


def rollouts_of(
    texts: list[list[str]], outcomes: list[float], steps: list[list[tuple[int, float]]] | None
) -> Rollouts:
    """Rollouts of one letter per token, with these scores."""
    responses = [
        [Response([ord(c) - 96 for c in t], [-1.0] * len(t), "length", t) for t in group]
        for group in texts
    ]
    prompts = [Prompt([1], "a", {}, i) for i in range(len(texts))]
    return Rollouts(prompts, responses, Scores(outcomes, steps, {}, {}), {})


# --- advantages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda r, i: (r[i] - fmean(r)) / stdev(r)),
        ({"scale": "population_std"}, lambda r, i: (r[i] - fmean(r)) / pstdev(r)),
        ({"scale": "none"}, lambda r, i: r[i] - fmean(r)),
        (
            {"scale": "none", "advantage": "leave_one_out"},
            lambda r, i: r[i] - fmean(r[:i] + r[i + 1 :]),
        ),
    ],
)
def test_outcome_advantages_are_those_of_the_group_on_every_token(
    world: World, options: dict[str, str], expected: Callable[[list[float], int], float]
) -> None:
    bench = Fixture(world, **options)
    found = bench.prepare().advantages_T.split(bench.rollouts.lengths_N.tolist())
    rewards = bench.rollouts.totals_N.view(4, 3).tolist()
    for n, row in enumerate(found):
        group = rewards[n // 3]
        value = expected(group, n % 3) if len(set(group)) > 1 else 0.0
        assert row.tolist() == pytest.approx([value] * len(row), abs=1e-5)


def test_process_advantages_are_suffix_sums_of_the_groups_normalized_steps(world: World) -> None:
    bench = Fixture(world, "pairs", supervision="process", responses_per_prompt=2)
    texts = [["aabcd", "bb"], ["a", "c"]]
    ends = [[2, 4, 5], [2], [1], [1]]
    values = [[2.0, 0.0, 1.0], [-1.0], [0.5], [0.5]]
    steps = [list(zip(e, v, strict=True)) for e, v in zip(ends, values, strict=True)]
    rollouts = rollouts_of(texts, [0.0] * 4, steps)
    found = Supervision.of(bench.config).advantages(rollouts, bench.parts.policy.tokenizer).tolist()
    pool = [2.0, 0.0, 1.0, -1.0]
    first, second, third, other = [(x - fmean(pool)) / stdev(pool) for x in pool]
    expected = [
        *[first + second + third] * 2, *[second + third] * 2, third,
        *[other] * 2,
        0.0, 0.0,
    ]  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("scale", "deviation"), [("population_std", pstdev), ("none", lambda pool: 1.0)]
)
def test_scale_divides_the_steps_of_process_supervision_too(
    world: World, scale: str, deviation: Callable[[list[float]], float]
) -> None:
    options = {"supervision": "process", "responses_per_prompt": 2, "scale": scale}
    bench = Fixture(world, "pairs", **options)
    rollouts = rollouts_of([["ab", "bb"]], [0.0] * 2, [[(2, 2.0)], [(2, -1.0)]])
    found = Supervision.of(bench.config).advantages(rollouts, bench.parts.policy.tokenizer).tolist()
    up, down = 1.5 / deviation([2.0, -1.0]), -1.5 / deviation([2.0, -1.0])
    assert found == pytest.approx([up, up, down, down], abs=1e-6)


def test_outcome_reward_beside_process_rewards_falls_on_the_last_step(world: World) -> None:
    bench = Fixture(world, "pairs", supervision="process", responses_per_prompt=2)
    # The second response has no steps: it counts as one, at its last token.
    steps = [[(2, 1.0), (3, 0.0)], []]
    rollouts = rollouts_of([["abcd", "bc"]], [3.0, -2.0], steps)
    found = Supervision.of(bench.config).advantages(rollouts, bench.parts.policy.tokenizer).tolist()
    pool = [1.0, 0.0 + 3.0, -2.0]
    first, last, other = [(x - fmean(pool)) / stdev(pool) for x in pool]
    assert found == pytest.approx([first + last] * 2 + [last, 0.0] + [other] * 2, abs=1e-6)


def test_process_supervision_without_process_rewards_is_an_error(world: World) -> None:
    with pytest.raises(ConfigurationError, match="no reward scores steps"):
        grpo.train(config_of(world, "letters", supervision="process"))


# --- the loss -----------------------------------------------------------------------------------


def surrogate(ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl": "k1", "kl_correction": True},
        {"kl": "k2"},
        {"kl_correction": True},
        {"importance_sampling_cap": 0.98},
        {"beta": 0.0},
        {"aggregation": "token_mean"},
        {"aggregation": "fixed_length"},
        {"surrogate": "gspo"},
        {"surrogate": "cispo"},
    ],
)
def test_loss_and_gradient_are_those_written_out_by_hand(
    world: World, options: dict[str, Any]
) -> None:
    given = {"beta": 0.3, "epochs": 2, "clip_low": 0.03, "clip_high": 0.06, **options}
    bench = Fixture(world, **given)
    experience = bench.prepare()
    lengths = bench.rollouts.lengths_N.tolist()
    plain = AutoModelForCausalLM.from_pretrained(world.path)
    ref_T = plain_logprobs(plain, bench.rollouts.groups)
    perturb(plain, seed=21, spread=0.05)
    sampler_T = bench.rollouts.sampler_logprobs_T
    old_T = torch.tensor([x for r in bench.rollouts.flat for x in r.logprobs])
    perturb(bench.parts.policy.model, seed=5, spread=0.02)
    (part,) = experience.split_with_token_weights(
        [list(range(12))], AGGREGATIONS[bench.config.aggregation], 8
    )
    total, _ = grpo_learner(bench.config, bench.parts).loss(part)
    total.backward()
    perturb(plain, seed=5, spread=0.02)
    new_T = differentiable_logprobs(plain, bench.rollouts.groups)

    ratio, a = (new_T - old_T).exp(), experience.advantages_T
    assert float((ratio - 1).abs().max().detach()) > 0.06
    per_token = -surrogate(ratio, a, 0.03, 0.06)
    if options.get("surrogate") == "gspo":
        means = [row.mean() for row in (new_T - old_T).split(lengths)]
        ratio_N = torch.stack(means).exp().repeat_interleave(torch.tensor(lengths))
        per_token = -surrogate(ratio_N, a, 0.03, 0.06)
    if options.get("surrogate") == "cispo":
        per_token = -ratio.detach().clamp(0.97, 1.06) * a * new_T
    log_ratio = new_T - ref_T
    kl = {"k1": log_ratio, "k2": log_ratio**2 / 2}.get(
        options.get("kl", ""), (-log_ratio).exp() - 1 + log_ratio
    )
    if options.get("kl_correction"):
        kl = kl * ratio
    per_token = per_token + bench.config.beta * kl
    if "importance_sampling_cap" in options:
        per_token = per_token * (old_T - sampler_T).exp().clamp(max=0.98)
    rows = per_token.split(lengths)
    expected = {
        "token_mean": per_token.mean(),
        "fixed_length": torch.stack([row.sum() / 8 for row in rows]).mean(),
    }.get(options.get("aggregation", ""), torch.stack([row.mean() for row in rows]).mean())
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=2e-5)
    expected.backward()
    assert_same_parameter_gradients(bench.parts.policy.model, plain, atol=5e-5)


def test_on_policy_update_makes_no_extra_forward_pass(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"policy": 0, "reference": 0}
    gathered = grpo.build_components

    def assemble_and_count(*arguments: Any, **options: Any) -> OnPolicyComponents:
        parts = gathered(*arguments, **options)
        asked = (("policy", parts.policy, "score"), ("reference", parts.reference, "logprobs"))
        for name, scorer, method in asked:
            score = getattr(scorer, method)

            def counted(batch: Any, name: str = name, score: Any = score) -> Any:
                calls[name] += 1
                return score(batch)

            monkeypatch.setattr(scorer, method, counted)
        return parts

    monkeypatch.setattr(grpo, "build_components", assemble_and_count)
    grpo.train(config_of(world))
    assert calls == {"policy": 1, "reference": 1}
    grpo.train(config_of(world, beta=0.0))
    assert calls == {"policy": 2, "reference": 1}
    grpo.train(config_of(world, epochs=2, importance_sampling_cap=2.0))
    assert calls == {"policy": 4, "reference": 2}


def test_importance_weights_correct_a_sampler_that_differs(world: World) -> None:
    bench = Fixture(world, importance_sampling_cap=1.2, beta=0.0)
    learner = grpo_learner(bench.config, bench.parts)
    (part,) = bench.prepare().split_with_token_weights([list(range(12))], sequence_mean)
    parameters = list(bench.parts.policy.model.parameters())

    def gradients(log_ratio: float) -> list[Tensor]:
        sampler_T = part.sampler_logprobs_T - log_ratio
        total, _ = learner.loss(replace(part, sampler_logprobs_T=sampler_T))
        return list(torch.autograd.grad(total, parameters))

    # Advantages are centered, so at ratio 1 the loss itself is 0 and only gradients can tell.
    plain = gradients(0.0)
    assert sum(float(g.norm()) for g in plain) > 0.1
    for log_ratio, weight in ((0.1, math.exp(0.1)), (-0.5, math.exp(-0.5)), (1.0, 1.2)):
        for mine, theirs in zip(gradients(log_ratio), plain, strict=True):
            torch.testing.assert_close(mine, weight * theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kl", [{}, {"kl": "k2"}, {"kl": "k1", "kl_correction": True}], ids=str)
def test_importance_weights_make_samples_of_another_policy_serve_both_terms(
    world: World, kl: dict[str, Any]
) -> None:
    """Enumerate a vocabulary: E_μ[c ∇loss] = E_π_old[∇loss], surrogate and KL term alike."""
    config = config_of(world, beta=0.7, importance_sampling_cap=100.0, **kl)
    objective = grpo.Objective.of(config)
    logits_V = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    mu_V, ref_V = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.5, 0.2, 0.2]], dtype=torch.float64)
    logprobs_V = logits_V.log_softmax(0)
    sampled = GRPOExperience(
        groups=[Group([1], [[v] for v in range(4)])],
        loss_mask_T=torch.ones(4, dtype=torch.bool),
        advantages_T=torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64),
        sampler_logprobs_T=mu_V.log(),
        ref_logprobs_T=ref_V.log(),
    )
    on_policy = replace(sampled, sampler_logprobs_T=logprobs_V.detach())

    def expected_gradient(probability_V: Tensor, data: GRPOExperience) -> Tensor:
        loss_V, _ = grpo.token_losses(objective, logprobs_V, logprobs_V.detach(), data)
        total = (probability_V * loss_V).sum()
        return torch.autograd.grad(total, logits_V, retain_graph=True)[0]

    found = expected_gradient(mu_V, sampled)
    right = expected_gradient(logprobs_V.detach().exp(), on_policy)
    torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    without_kl = replace(sampled, ref_logprobs_T=None)
    assert float((found - expected_gradient(mu_V, without_kl)).abs().max()) > 0.01


# --- what is learned from -----------------------------------------------------------------------


def test_truncated_responses_weigh_nothing_and_do_not_count(world: World) -> None:
    bench = Fixture(world, mask_truncated=True)
    experience = bench.prepare()
    truncated = bench.rollouts.truncated_N
    assert 0 < int(truncated.sum()) < 12
    (part,) = experience.split_with_token_weights([list(range(12))], sequence_mean)
    assert part.weights_T is not None
    sums = [float(row.sum()) for row in part.weights_T.split(bench.rollouts.lengths_N.tolist())]
    kept = int((~truncated).sum())
    assert sums == pytest.approx([0.0 if cut else 1 / kept for cut in truncated.tolist()], abs=1e-6)


def test_batch_of_truncated_responses_only_is_an_error(world: World) -> None:
    config = config_of(world, mask_truncated=True, sampling={"max_tokens": 1})
    with pytest.raises(TrainingError, match="every response was truncated, at 1 tokens"):
        grpo.train(config.model_copy(update={"prompts_per_step": 1, "responses_per_prompt": 2}))


def test_minibatch_of_truncated_responses_only_moves_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Fixture(world, mask_truncated=True, minibatches=4, epochs=1, optimizer=FAST)
    experience = bench.prepare()
    cut_G = bench.rollouts.truncated_N.view(4, 3).all(1)
    optimizer = grpo.Optimizer(
        [(bench.config.optimizer, list(bench.parts.policy.model.parameters()))], 10
    )
    updates = Updates(grpo_learner(bench.config, bench.parts).plan(experience, 0))
    results = grpo_learner(bench.config, bench.parts).update(optimizer, experience, updates)
    assert 0 < int(cut_G.sum()) < 4
    assert len(results) == 4 - int(cut_G.sum())


def test_dynamic_sampling_replaces_groups_of_equal_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def some(prompts, responses):\n"
        "    return [float(i) if p in ('a', 'ij') else 1.0\n"
        "            for i, p in enumerate(prompts)]\n"
    )
    bench = Fixture(world, "some", dynamic_sampling=3, prompts_per_step=2)
    sizes, steps = [], []
    rolled_out = rollout_step.roll_out

    def counted(*arguments: Any, **options: Any) -> Rollouts:
        steps.append(options["step"])
        return rolled_out(*arguments, **options)

    monkeypatch.setattr(rollout_step, "roll_out", counted)
    for step in range(4):
        rollouts = rollout_batches(bench.config, bench.parts).of_step(
            step, bench.config.dynamic_sampling
        )
        sizes.append(len(rollouts.prompts))
        assert all(p.text in ("a", "ij") for p in rollouts.prompts)
        assert len(rollouts.flat) == len(rollouts.scores.outcomes) == 3 * len(rollouts.prompts)
    assert sizes == [2, 2, 2, 2]
    assert len(set(steps)) == len(steps) > 4


def test_dynamic_sampling_gives_up_after_its_extra_batches(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def same(responses):\n    return [2.0] * len(responses)\n"
    )
    bench = Fixture(world, "same", dynamic_sampling=2)
    assert not bench.prepare().advantages_T.any()
    run = grpo.train(bench.config.model_copy(update={"run": config_of(world, "same").run}))
    assert metrics_of(run)[0]["group/equal_rewards"] == 1.0


def test_fewer_useful_groups_than_minibatches_still_train(tmp_path: Path) -> None:
    world = World(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def some(prompts, responses):\n"
        "    return [float(i) if p == 'a' else 1.0 for i, p in enumerate(prompts)]\n"
    )
    given = {"dynamic_sampling": 1, "minibatches": 4, "epochs": 3, "prompts_per_step": 4}
    bench = Fixture(world, "some", **given)
    experience = bench.prepare()
    assert len(bench.rollouts.prompts) in (1, 2)
    assert experience.old_logprobs_T is not None
    torch.testing.assert_close(
        experience.old_logprobs_T, bench.rollouts.sampler_logprobs_T, atol=1e-5, rtol=0
    )
    run = grpo.train(config_of(world, "some", **given))
    assert metrics_of(run)[0]["policy/sampler_difference"] < 1e-5


# --- the outer loop -----------------------------------------------------------------------------


def states(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["whole", "lora"])
def test_reference_is_refreshed_between_iterations_and_nothing_else_is(
    world: World, monkeypatch: pytest.MonkeyPatch, lora: dict[str, int] | None
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    prepare = grpo.Learner.prepare

    def prepare_and_note(learner: grpo.Learner, rollouts: Any, step: int) -> Any:
        assert learner.reference is not None
        policy_T = learner.policy.score(PROBE).logprobs_T.detach()
        seen.append((policy_T, learner.reference.logprobs(PROBE)))
        return prepare(learner, rollouts, step)

    monkeypatch.setattr(grpo.Learner, "prepare", prepare_and_note)
    given = {"iterations": 3, "steps_per_iteration": 2, "optimizer": FAST}
    model = {"path": world.path, "lora": lora}
    grpo.train(config_of(world, model=model, **given))
    policies, references = [p for p, _ in seen], [r for _, r in seen]
    assert len(seen) == 6
    assert all(not torch.equal(a, b) for a, b in pairwise(policies))
    for first in (0, 2, 4):
        assert torch.equal(references[first], policies[first])
        assert torch.equal(references[first + 1], references[first])
    assert not torch.equal(references[2], references[0])


def reward_model_run(world: World, **options: Any) -> GRPOConfig:
    given = {
        "rewards": [{"function": "reward_model", "arguments": {"path": world.reward_model()}}],
        "reward_update": {"labeler": world.reward("letters")[0], "optimizer": FAST},
        "iterations": 3,
    }
    return config_of(world, **(given | options))


def test_reward_model_learns_from_fresh_and_replayed_pairs_between_iterations(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[dict[str, Tensor]] = []
    fresh: list[int] = []
    train = RewardUpdate.train

    def train_and_note(update: RewardUpdate) -> dict[str, float]:
        models.append(states(update.model.model))
        fresh.append(len(update.fresh))
        result = train(update)
        models.append(states(update.model.model))
        return result

    monkeypatch.setattr(RewardUpdate, "train", train_and_note)
    update = {"labeler": world.reward("letters")[0], "optimizer": FAST, "replay": 0.5}
    run = grpo.train(reward_model_run(world, reward_update=update))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    updates = [e for e in events if e["kind"] == "reward_update"]
    assert len(updates) == 2
    assert [e["fresh"] for e in updates] == fresh
    assert min(fresh) > 0
    assert updates[0]["replayed"] == 0
    assert updates[1]["replayed"] == min(fresh[0], round(0.5 * fresh[1])) > 0
    before, after, later, _ = models
    assert not same(before, after)
    assert same(after, later)


def test_reward_model_learns_to_rank_as_the_judge_does(world: World) -> None:
    update = {
        "labeler": world.reward("letters")[0], "optimizer": {"learning_rate": 0.003}, "epochs": 30,
    }  # fmt: skip
    config = reward_model_run(world, reward_update=update)
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    assert config.reward_update is not None
    learner = RewardUpdate(config.reward_update, parts, seed=0)
    for step in range(4):
        learner.collect(rollout_batches(config, parts).of_step(step, config.dynamic_sampling))
    pairs = len(learner.fresh)
    assert pairs > 8
    before = learner.train()
    for step in range(4):
        learner.collect(rollout_batches(config, parts).of_step(step, config.dynamic_sampling))
    after = learner.train()
    assert before["accuracy"] < 0.9
    assert after["accuracy"] > before["accuracy"]
    assert after["loss"] < before["loss"]


def test_pair_of_a_group_is_its_best_and_its_worst_response() -> None:
    texts = [["a", "b", "c"], ["d", "e", "f"], ["g", "h", "i"]]
    rollouts = rollouts_of(texts, [0.0, 2.0, -1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 3.0], None)
    first, second = contrasts(rollouts, random.Random(0))
    assert first.group.responses == [[2], [3]]
    assert second.group.responses[0] == [9]
    assert second.group.responses[1] in ([7], [8])


def test_reward_update_needs_exactly_one_learned_reward(world: World) -> None:
    update = {"labeler": world.reward("letters")[0]}
    with pytest.raises(ValueError, match="name exactly one"):
        config_of(world, reward_update=update, iterations=2)


def test_process_reward_model_is_trained_on_the_judges_steps(world: World) -> None:
    labeler = {"function": "steps", "arguments": {"separator": ".", "without_equation": 1.0}}
    rewards = [
        {
            "function": "process_reward_model",
            "arguments": {"path": world.reward_model(), "separator": "."},
        }
    ]
    run = grpo.train(
        config_of(
            world, rewards=rewards, supervision="process", iterations=2,
            reward_update={"labeler": labeler, "optimizer": FAST},
        )
    )  # fmt: skip
    (event,) = [
        e
        for e in map(json.loads, (run / "events.jsonl").read_text().splitlines())
        if e["kind"] == "reward_update"
    ]
    assert event["fresh"] > 0
    assert 0 < event["loss"] < 5


# --- the whole loop -----------------------------------------------------------------------------


def test_reward_rises_when_the_reward_is_simple(world: World) -> None:
    run = grpo.train(
        config_of(
            world, steps_per_iteration=12, beta=0.02, responses_per_prompt=16,
            optimizer={"learning_rate": 0.003},
        )
    )  # fmt: skip
    rewards = [line["reward/mean"] for line in metrics_of(run)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0


def test_lora_run_leaves_the_base_alone_and_saves_merged_weights(world: World) -> None:
    model = {"path": world.path, "lora": {"rank": 2}}
    run = grpo.train(config_of(world, model=model, optimizer=FAST, epochs=2))
    base = load_file(Path(world.path) / "model.safetensors")
    merged = load_file(run / "final" / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("_proj" in name for name in changed)
    assert (run / "final" / "adapter" / "adapter_config.json").is_file()


def test_run_with_a_family_that_cannot_share_prompts(tmp_path: Path) -> None:
    world = World(tmp_path, "bloom")
    run = grpo.train(config_of(world, optimizer=STILL))
    (line,) = metrics_of(run)
    assert line["kl/response"] == 0.0
    assert line["optimizer_steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": {"temperature": 0.0}}, "would be equal, with advantage 0"),
        ({"minibatches": 5}, "more than the 4 groups"),
        ({"kl_correction": True, "beta": 0.0}, "set beta above 0"),
        ({"kl": "k1"}, "does not pull towards the reference"),
        ({"kl": "k2", "kl_correction": True}, "does not pull towards the reference"),
        ({"dynamic_sampling": 1, "supervision": "process"}, "supervision: outcome"),
        ({"advantage": "leave_one_out", "supervision": "process"}, "supervision: outcome"),
        ({"responses_per_prompt": 1}, "responses_per_prompt"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(world, **options)


def test_reward_update_without_a_second_iteration_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match="iterations is 1"):
        reward_model_run(world, iterations=1)


def test_reward_update_with_a_falling_rate_is_refused(world: World) -> None:
    update = {"labeler": world.reward("letters")[0], "optimizer": {"schedule": "cosine"}}
    with pytest.raises(ValueError, match="use constant"):
        reward_model_run(world, reward_update=update)


@pytest.mark.parametrize("separator", [".", "\n"])
def test_process_reward_model_is_trained_where_it_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    labeler = {"function": "steps", "arguments": {"separator": separator, "without_equation": 1.0}}
    arguments = {"path": world.reward_model(), "separator": separator}
    config = config_of(
        world, rewards=[{"function": "process_reward_model", "arguments": arguments}],
        supervision="process", iterations=2, reward_update={"labeler": labeler},
        sampling={"max_tokens": 16}, responses_per_prompt=8,
    )  # fmt: skip
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    read: dict[tuple[int, ...], list[int]] = {}
    step_scores = RewardModel.step_scores

    def noted(model: RewardModel, batch: Batch, ends: list[list[int]]) -> Tensor:
        rows = batch.targets_T.split(batch.lengths_N.tolist())
        read.update({tuple(row.tolist()): e for row, e in zip(rows, ends, strict=True)})
        return step_scores(model, batch, ends)

    monkeypatch.setattr(RewardModel, "step_scores", noted)
    assert config.reward_update is not None
    update = RewardUpdate(config.reward_update, parts, seed=0)
    update.collect(rollout_batches(config, parts).of_step(0, config.dynamic_sampling))
    labeled = {tuple(e.group.responses[0]): list(e.ends) for e in update.fresh}
    assert any(len(ends) > 1 for ends in labeled.values())
    assert labeled == {row: ends for row, ends in read.items() if ends}


def test_judge_whose_labels_are_no_probabilities_is_refused(world: World) -> None:
    rewards = [{"function": "process_reward_model", "arguments": {"path": world.reward_model()}}]
    labeler = world.reward("pairs")[0]
    with pytest.raises(ConfigurationError, match=r"labels a step -0\.3.*in \[0, 1\]"):
        grpo.train(
            config_of(
                world, rewards=rewards, supervision="process", iterations=2,
                reward_update={"labeler": labeler},
            )
        )  # fmt: skip
