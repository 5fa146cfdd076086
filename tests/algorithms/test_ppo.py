"""PPO's stages and loop on a tiny model: what is rewarded, what stays fixed, what moves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loops import ppo_learner, rollout_batches
from helpers.tiny_models import (
    STILL,
    Captured,
    World,
    assert_same_parameter_gradients,
    letters_tokenizer,
    metrics_of,
    perturb,
    plain_logprobs,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trivium.algorithms import ppo
from trivium.algorithms.kl_coefficient import KLCoefficient
from trivium.algorithms.ppo import PPOExperience
from trivium.algorithms.ppo_config import AdaptiveKLConfig, PPOConfig
from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.errors import ConfigurationError, TrainingError
from trivium.hf.loading import trained_parameters
from trivium.maths.aggregation import sequence_mean
from trivium.maths.kl import adapted_coefficient
from trivium.models.policy import Policy
from trivium.training.optimizer import StepResult
from trivium.training.setup import build_components

FAST = {"learning_rate": 0.01}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def config_of(world: World, *rewards: str, **options: Any) -> PPOConfig:
    critic = {"model": {"path": world.reward_model()}, "optimizer": STILL}
    given = world.on_policy(*rewards) | {"critic": critic, "steps": 1}
    return PPOConfig(**(given | options))


class Fixture:
    """A configuration with its loaded parts, up to a prepared rollout batch."""

    def __init__(self, world: World, *rewards: str, moved: bool = True, **options: Any) -> None:
        self.world = world
        self.config = config_of(world, *rewards, **options)
        self.parts = build_components(
            self.config.model, self.config.data, self.config.rewards, None,
            self.config.sampling,
        )  # fmt: skip
        if moved:
            perturb(self.parts.policy.model, seed=21, spread=0.05)
        self.critic = ppo.make_critic(self.config.critic, self.config.model, self.parts.policy)
        self.rollouts = rollout_batches(self.config, self.parts).roll_out(1 - 1)
        self.steps = ppo_learner(self.config, self.parts, self.critic).schedule.plan(
            Grouped(self.rollouts.groups), 1
        )

    def prepare(self) -> PPOExperience:
        return ppo_learner(self.config, self.parts, self.critic).prepare(
            self.rollouts, self.steps, self.config.beta
        )

    def plain_values(self) -> list[list[float]]:
        """V before each response token and after the last, by plain transformers."""
        plain = AutoModelForSequenceClassification.from_pretrained(self.world.reward_model())
        found = []
        for group in self.rollouts.groups:
            for response in group.responses:
                ids = torch.tensor([group.prompt + response])
                with torch.no_grad():
                    values = plain.score(plain.model(ids).last_hidden_state)[0, :, 0]
                found.append(values[len(group.prompt) - 1 :].tolist())
        return found

    def rewards_by_hand(self) -> list[list[float]]:
        """r_t, written out."""
        plain = AutoModelForCausalLM.from_pretrained(self.world.path)
        ref_T = plain_logprobs(plain, self.rollouts.groups)
        old_T = torch.tensor([x for r in self.rollouts.flat for x in r.logprobs])
        kl = (-self.config.beta * (old_T - ref_T)).split(self.rollouts.lengths_N.tolist())
        rewards = []
        names = [c.function.split(":")[1] for c in self.config.rewards]
        for response, row in zip(self.rollouts.flat, kl, strict=True):
            row, text = row.tolist(), response.text
            if "letters" in names:
                row[-1] += text.count("a") - text.count("b") + 0.25 * text.count("c")
            if "pairs" in names:
                for i in range(0, len(text), 2):
                    at = i + 1 if i + 2 < len(text) else -1
                    row[at] += text[i : i + 2].count("a") - 0.3
            rewards.append(row)
        return rewards


def gae_by_hand(
    rewards: list[float], values: list[float], gamma: float, gae_lambda: float
) -> list[float]:
    """``values`` holds one more entry than ``rewards``: the value after the last token."""
    advantages, later = [], 0.0
    for t in reversed(range(len(rewards))):
        later = rewards[t] + gamma * values[t + 1] - values[t] + gamma * gae_lambda * later
        advantages.append(later)
    return advantages[::-1]


# --- stage 2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("rewards", [("letters",), ("pairs",), ("letters", "pairs")])
def test_advantages_and_targets_are_those_written_out_by_hand(
    world: World, rewards: tuple[str, ...], bootstrap: bool
) -> None:
    bench = Fixture(
        world, *rewards, beta=0.3, gamma=0.9, gae_lambda=0.8, whiten_advantages=False,
        bootstrap_truncated=bootstrap, tokens_per_micro_batch=40,
    )  # fmt: skip
    truncated = bench.rollouts.truncated_N.tolist()
    assert {True, False} == set(truncated)
    experience = bench.prepare()
    advantages, targets = [], []
    rows = zip(bench.rewards_by_hand(), bench.plain_values(), truncated, strict=True)
    for reward, values, cut in rows:
        ends = values[-1] if cut and bootstrap else 0.0
        found = gae_by_hand(reward, [*values[:-1], ends], 0.9, 0.8)
        advantages += found
        targets += [a + v for a, v in zip(found, values[:-1], strict=True)]
    torch.testing.assert_close(experience.advantages_T, torch.tensor(advantages), atol=1e-4, rtol=0)
    torch.testing.assert_close(experience.targets_T, torch.tensor(targets), atol=1e-4, rtol=0)


def test_monte_carlo_target_is_the_score_whatever_the_critic_says(world: World) -> None:
    bench = Fixture(world, beta=0.0, gae_lambda=1.0)
    targets = bench.prepare().targets_T.split(bench.rollouts.lengths_N.tolist())
    for target, outcome in zip(targets, bench.rollouts.outcomes_N, strict=True):
        torch.testing.assert_close(target, outcome.expand(len(target)), atol=1e-5, rtol=0)


def test_one_step_target_is_the_next_value_until_the_last_token(world: World) -> None:
    bench = Fixture(world, beta=0.0, gae_lambda=0.0)
    experience = bench.prepare()
    lengths = bench.rollouts.lengths_N.tolist()
    rows = zip(
        experience.targets_T.split(lengths),
        experience.old_values_T.split(lengths),
        bench.rollouts.outcomes_N,
        strict=True,
    )
    for target, value, outcome in rows:
        expected = torch.cat([value[1:], outcome[None]])
        torch.testing.assert_close(target, expected, atol=1e-5, rtol=0)


def test_whitening_shifts_and_scales_advantages_and_leaves_targets_alone(world: World) -> None:
    plain = Fixture(world, whiten_advantages=False).prepare()
    white = Fixture(world).prepare()
    assert torch.equal(white.targets_T, plain.targets_T)
    a_T = plain.advantages_T
    expected_T = (a_T - a_T.mean()) / a_T.std(correction=0)
    torch.testing.assert_close(white.advantages_T, expected_T, atol=1e-5, rtol=0)


def test_process_rewards_fall_on_their_steps_last_tokens_and_the_last_on_the_eos(
    world: World,
) -> None:
    bench = Fixture(world, "pairs")
    found = bench.rollouts.step_rewards(
        bench.parts.policy.tokenizer, torch.zeros(sum(bench.rollouts.lengths_N))
    )
    assert found is not None
    for response, row in zip(
        bench.rollouts.flat, found.split(bench.rollouts.lengths_N.tolist()), strict=True
    ):
        expected = [0.0] * len(response.tokens)
        for i in range(0, len(response.text), 2):
            at = i + 1 if i + 2 < len(response.text) else -1
            expected[at] = response.text[i : i + 2].count("a") - 0.3
        assert row.tolist() == pytest.approx(expected, abs=1e-6)


def test_experience_carries_no_gradient(world: World) -> None:
    experience = Fixture(world).prepare()
    for name in ("advantages_T", "targets_T", "old_logprobs_T", "ref_logprobs_T", "old_values_T"):
        assert not getattr(experience, name).requires_grad


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05])
def test_loss_and_gradient_are_those_written_out_by_hand(world: World, clip: float | None) -> None:
    critic = {"model": {"path": world.reward_model()}, "coefficient": 0.7, "clip": clip}
    bench = Fixture(
        world, critic=critic, entropy_coef=0.2, clip_low=0.03, clip_high=0.05,
        minibatches=1, epochs=1,
    )  # fmt: skip
    experience = bench.prepare()
    perturb(bench.parts.policy.model, seed=5, spread=0.01)
    perturb(bench.critic.model.model, seed=6, spread=0.01)  # type: ignore[attr-defined]
    (part,) = experience.split_with_token_weights([list(range(12))], sequence_mean)
    total, _ = ppo_learner(bench.config, bench.parts, bench.critic).joint_loss(part, True)
    total.backward()

    actor = AutoModelForCausalLM.from_pretrained(world.path)
    perturb(actor, seed=21, spread=0.05)
    perturb(actor, seed=5, spread=0.01)
    critic_model = AutoModelForSequenceClassification.from_pretrained(world.reward_model())
    perturb(critic_model, seed=6, spread=0.01)
    logprobs, entropy, values = scores_by_hand(actor, critic_model, bench.rollouts.groups)
    ratio = (logprobs - experience.old_logprobs_T).exp()
    assert float((ratio - 1).abs().max().detach()) > 0.05
    a = experience.advantages_T
    surrogate = torch.minimum(ratio * a, ratio.clamp(0.97, 1.05) * a)
    error = (values - experience.targets_T) ** 2
    if clip is not None:
        old = experience.old_values_T
        near = torch.minimum(torch.maximum(values, old - clip), old + clip)
        error = torch.maximum(error, (near - experience.targets_T) ** 2)
    per_token = -surrogate - 0.2 * entropy + 0.7 * error
    means = [row.mean() for row in per_token.split(bench.rollouts.lengths_N.tolist())]
    expected = torch.stack(means).mean()
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    assert_same_parameter_gradients(bench.parts.policy.model, actor, atol=5e-5)
    assert_same_parameter_gradients(bench.critic.model.model, critic_model, atol=5e-5)  # type: ignore[attr-defined]


def scores_by_hand(
    actor: Any, critic: Any, groups: Sequence[Group]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and value at each response token, one sequence at a time."""
    logprobs, entropies, values = [], [], []
    for group in groups:
        for response in group.responses:
            ids, at = torch.tensor([group.prompt + response]), len(group.prompt) - 1
            log_p = actor(input_ids=ids).logits[0, at:-1].log_softmax(-1)
            logprobs.append(log_p.gather(1, torch.tensor(response)[:, None])[:, 0])
            entropies.append(-(log_p.exp() * log_p).sum(-1))
            values.append(critic.score(critic.model(ids).last_hidden_state)[0, at:-1, 0])
    return torch.cat(logprobs), torch.cat(entropies), torch.cat(values)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_actor_and_critic_in_turn_are_the_loss_of_both(world: World, kind: str) -> None:
    apart = {"model": {"path": world.reward_model()}} if kind == "separate" else {"kind": "shared"}
    bench = Fixture(world, critic={**apart, "coefficient": 0.7}, entropy_coef=0.2)
    experience = bench.prepare()
    perturb(bench.parts.policy.model, seed=5, spread=0.01)
    (part,) = experience.split_with_token_weights([list(range(12))], sequence_mean)
    learned = ppo_learner(bench.config, bench.parts, bench.critic).losses(with_actor=True)
    assert len(learned) == (2 if kind == "separate" else 1)
    trained = trained_parameters(bench.parts.policy.model)
    parameters = {id(p): p for p in (*trained, *bench.critic.parameters())}

    def gradients(totals: list[Tensor]) -> list[Tensor]:
        for total in totals:
            total.backward()
        found = [p.grad for p in parameters.values()]
        for p in parameters.values():
            p.grad = None
        assert all(gradient is not None for gradient in found)
        return found  # type: ignore[return-value]

    in_turn = [of_part(part) for of_part in learned]
    total, seen = ppo_learner(bench.config, bench.parts, bench.critic).joint_loss(part, True)
    torch.testing.assert_close(sum(x for x, _ in in_turn), total)
    observed = {name: tensor for _, x in in_turn for name, tensor in x.items()}
    assert observed.keys() == seen.keys()
    assert all(torch.equal(observed[name], seen[name]) for name in seen)
    for mine, theirs in zip(gradients([x for x, _ in in_turn]), gradients([total]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-7, rtol=1e-5)


def test_while_the_actor_waits_its_loss_is_not_learned(world: World) -> None:
    bench = Fixture(world, critic={"model": {"path": world.reward_model()}})
    (part,) = bench.prepare().split_with_token_weights([list(range(12))], sequence_mean)
    (of_both,) = ppo_learner(bench.config, bench.parts, bench.critic).losses(with_actor=False)
    total, seen = of_both(part)
    total.backward()
    assert {"logprobs_T", "entropy_T", "value_loss_T"} <= seen.keys()
    assert all(p.grad is not None for p in bench.critic.parameters())
    assert all(p.grad is None for p in bench.parts.policy.model.parameters())


# --- through the loop ---------------------------------------------------------------------------


def test_experience_is_computed_once_and_stays_as_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[tuple[PPOExperience, dict[str, Tensor]]] = []
    seen: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
    prepare, losses = ppo.Learner.prepare, ppo.Learner.losses
    names = ("advantages_T", "targets_T", "old_logprobs_T", "ref_logprobs_T", "old_values_T")

    def prepare_and_keep(*arguments: Any) -> PPOExperience:
        experience = prepare(*arguments)
        prepared.append((experience, {n: getattr(experience, n).clone() for n in names}))
        return experience

    def losses_and_note(*arguments: Any) -> Any:
        of_actor, of_critic = losses(*arguments)
        return [partial(noted, of_actor), of_critic]

    def noted(of_actor: Any, part: Any) -> Any:
        total, found = of_actor(part)
        # In the first step, π_old's log-probs are those that the step finds.
        given = {n: getattr(part, n) for n in names} | {"old_logprobs_T": found["old_logprobs_T"]}
        fixed = [given[n].split(part.lengths_N.tolist()) for n in names]
        flat = [(*g.prompt, -1, *r) for g in part.groups for r in g.responses]
        for key, *rows in zip(flat, *fixed, strict=True):
            seen.setdefault(key, []).append(tuple(row.clone() for row in rows))
        return total, found

    monkeypatch.setattr(ppo.Learner, "prepare", prepare_and_keep)
    monkeypatch.setattr(ppo.Learner, "losses", losses_and_note)
    given = {"optimizer": FAST, "epochs": 3, "minibatches": 2, "tokens_per_micro_batch": 40}
    run = ppo.train(config_of(world, **given))
    ((experience, then),) = prepared
    for name, tensor in then.items():
        assert torch.equal(getattr(experience, name), tensor)
    assert len(seen) > 8
    for rows in seen.values():
        assert len(rows) % 3 == 0
        for row in rows[1:]:
            assert all(torch.equal(a, b) for a, b in zip(row, rows[0], strict=True))
    assert metrics_of(run)[0]["optimizer_steps"] == 6


def weights(run: Path, name: str = "final") -> dict[str, Tensor]:
    return load_file(run / name / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_critic_warm_up_leaves_the_actor_bit_identical(world: World) -> None:
    critic = {"model": {"path": world.reward_model()}, "optimizer": FAST, "warmup_steps": 2}
    start = load_file(Path(world.path) / "model.safetensors")
    critic_start = load_file(Path(world.reward_model()) / "model.safetensors")
    optimizer = {**FAST, "weight_decay": 0.1}
    run = ppo.train(config_of(world, critic=critic, optimizer=optimizer, steps=2))
    assert same(weights(run), start)
    assert not same(weights(run, "critic"), critic_start)
    run = ppo.train(config_of(world, critic=critic, optimizer=optimizer, steps=3))
    assert not same(weights(run), start)


def test_adaptive_coefficient_reads_the_kl_per_response() -> None:
    beta = KLCoefficient(0.2, AdaptiveKLConfig(target=2.0, horizon=100))
    # The target is one of whole responses. Per token the KL is far below it, and would lower β.
    beta.adapt({"kl/k1": 0.01, "kl/k3": 0.02, "kl/response": 2.2, "policy/kl_old": 5.0}, 50)
    assert beta.value == pytest.approx(0.2 * (1 + 0.1 * 50 / 100), rel=1e-12)
    fixed = KLCoefficient(0.2, None)
    fixed.adapt({"kl/response": 100.0}, 50)
    assert fixed.value == 0.2


def test_adaptive_coefficient_is_fed_each_batchs_kl_and_used_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    prepare = ppo.Learner.prepare

    def prepare_and_note(*arguments: Any) -> PPOExperience:
        used.append(arguments[-1])
        return prepare(*arguments)

    monkeypatch.setattr(ppo.Learner, "prepare", prepare_and_note)
    adaptive = {"target": 0.5, "horizon": 60}
    run = ppo.train(config_of(world, adaptive_kl=adaptive, optimizer=FAST, steps=4, beta=0.2))
    lines = metrics_of(run)
    assert used == [line["kl/beta"] for line in lines]
    expected = [0.2]
    for line in lines[:-1]:
        expected.append(adapted_coefficient(expected[-1], line["kl/response"], 0.5, 12, 60))
    assert used == pytest.approx(expected, rel=1e-12)
    assert used[1] == pytest.approx(0.2 * (1 - 0.2 * 12 / 60))
    assert len(set(used)) == 4


def test_updates_of_a_batch_end_once_the_policy_has_moved_far(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[list[float]] = []
    update = ppo.Learner.update

    def update_and_note(*arguments: Any) -> list[StepResult]:
        results = update(*arguments)
        seen = [r.observed for r in results]
        moved.append([float((o["old_logprobs_T"] - o["logprobs_T"]).mean()) for o in seen])
        return results

    monkeypatch.setattr(ppo.Learner, "update", update_and_note)
    given = {"optimizer": {"learning_rate": 0.001}, "epochs": 8, "minibatches": 2}
    ppo.train(config_of(world, **given))
    (whole,) = moved
    assert len(whole) == 16
    # A limit that this step passes, and none before it.
    last = next(i for i in range(4, 16) if whole[i] > max(whole[:i]))
    limit = (max(whole[:last]) + whole[last]) / 2
    ppo.train(config_of(world, **given, target_kl=limit))
    assert moved[1] == whole[: last + 1]


def test_pretraining_mix_adds_its_coefficient_times_the_gradient_of_the_texts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = Captured(monkeypatch)
    texts = [("ab", "cdef"), ("g", "hi"), ("j", "a.b.c.")]
    data = world.rows("texts.jsonl", [{"prompt": p, "completion": c} for p, c in texts])
    given = {"epochs": 1, "minibatches": 1}
    ppo.train(config_of(world, **given))
    mix = {"data": data, "coefficient": 3.0, "examples_per_step": 3}
    for budget in (1, 1000):
        run = ppo.train(config_of(world, **given, pretraining=mix, tokens_per_micro_batch=budget))
    without, *with_mix = captured.take()

    plain = AutoModelForCausalLM.from_pretrained(world.path)
    tokenizer, total, count = letters_tokenizer(), torch.zeros(()), 0
    for prompt, completion in texts:
        ids = tokenizer.encode(prompt + completion + "<eos>")
        log_p = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(len(prompt), len(ids)):
            total, count = total - log_p[at - 1, ids[at]], count + 1
    (total / count).backward()
    matrices = [p.grad for p in plain.parameters() if p.dim() >= 2]
    vectors = [p.grad for p in plain.parameters() if p.dim() < 2]
    nll = [*matrices, *vectors]
    assert metrics_of(run)[0]["pretraining/nll"] == pytest.approx(
        float(total.detach()) / count, abs=1e-4
    )
    for both in with_mix:
        for a, b, extra in zip(both[: len(nll)], without[: len(nll)], nll, strict=True):
            torch.testing.assert_close(a - b, 3.0 * extra, atol=1e-5, rtol=0)
        for a, b in zip(both[len(nll) :], without[len(nll) :], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_loss_that_is_not_finite_ends_the_run_and_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def huge(responses):\n    return [1e38] * len(responses)\n"
    )
    kept: list[Policy] = []
    gathered = ppo.build_components

    def assemble_and_keep(*arguments: Any, **options: Any) -> Any:
        parts = gathered(*arguments, **options)
        kept.append(parts.policy)
        return parts

    monkeypatch.setattr(ppo, "build_components", assemble_and_keep)
    config = config_of(world, "huge", optimizer=FAST)
    with pytest.raises(TrainingError, match="optimizer step 0 the loss is"):
        ppo.train(config)
    start = load_file(Path(world.path) / "model.safetensors")
    assert same(dict(kept[0].model.state_dict()), start)
    assert config.run.directory is not None
    assert not (config.run.directory / "final").exists()


def test_reward_rises_when_the_reward_is_simple(world: World) -> None:
    critic = {"optimizer": {"learning_rate": 0.003}}
    run = ppo.train(
        config_of(
            world, critic=critic, optimizer={"learning_rate": 0.003}, steps=12, beta=0.02,
            responses_per_prompt=16,
        )
    )  # fmt: skip
    rewards = [line["reward/mean"] for line in metrics_of(run)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1.0


def test_critic_of_another_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    other = World(tmp_path, letters="abcdefghijklm.\n")
    with pytest.raises(ConfigurationError, match=r"critic\.model\.path is .*vocabulary"):
        Fixture(world, critic={"model": {"path": other.path}})


def test_reward_model_is_trained_further_every_so_many_steps(world: World) -> None:
    labeler = world.reward("letters")[0]
    rewards = [{"function": "reward_model", "arguments": {"path": world.reward_model()}}]
    reward_update = {"labeler": labeler, "every": 2, "optimizer": FAST}
    given = {"steps": 4, "rewards": rewards}
    without = metrics_of(ppo.train(config_of(world, **given)))
    run = ppo.train(config_of(world, **given, reward_update=reward_update))
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    updates = [e for e in events if e["kind"] == "reward_update"]
    assert len(updates) == 2
    assert all(e["fresh"] > 0 for e in updates)
    assert all(0 < e["labels"] <= e["fresh"] + e["replayed"] for e in updates)
    pairs = zip(metrics_of(run), without, strict=True)
    assert [a["reward/mean"] == b["reward/mean"] for a, b in pairs] == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": {"temperature": 0.0}}, "explores nothing"),
        ({"minibatches": 5}, "more than the 4 prompts"),
        ({"adaptive_kl": {"target": 1.0}, "beta": 0.0}, "adaptive_kl scales it"),
        ({"critic": {"kind": "shared", "model": {"path": "x"}}}, "leave critic.model out"),
        ({"critic": {"kind": "shared", "warmup_steps": 1}}, "use kind: separate"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    world: World, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(world, **options)


def test_run_leaves_an_actor_and_a_critic_that_plain_transformers_loads(world: World) -> None:
    run = ppo.train(config_of(world, optimizer=FAST))
    actor = AutoModelForCausalLM.from_pretrained(run / "final")
    critic = AutoModelForSequenceClassification.from_pretrained(run / "critic")
    assert not same(dict(actor.state_dict()), load_file(Path(world.path) / "model.safetensors"))
    assert critic.config.num_labels == 1


def test_sampler_and_trainer_agree_and_the_difference_is_reported(world: World) -> None:
    run = ppo.train(config_of(world))
    assert 0 <= metrics_of(run)[0]["policy/sampler_difference"] < 1e-5
