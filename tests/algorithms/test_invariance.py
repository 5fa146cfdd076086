"""Gradients do not depend on how an optimizer step is cut, packed, ordered or accumulated."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equations import AGGREGATIONS
from helpers.loops import grpo_learner, ppo_learner, rollout_batches
from helpers.tiny_models import STILL, Captured, World, assert_same_gradients, perturb
from torch import Tensor

from trivium.algorithms import dpo, grpo, ppo, reward_model, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.data.batch import Grouped
from trivium.hf.loading import trained_parameters
from trivium.models.critic import SharedCritic
from trivium.training.experience import MicroBatches
from trivium.training.setup import build_components

BUDGETS = (1, 37, 100_000)
LONGER = {"max_tokens": 16}
Train = Callable[[int], None]

DEMONSTRATIONS = [
    {"prompt": "abc", "completion": "de"},
    {"prompt": "b", "completion": "fghij.a"},
    {"prompt": "aaaa", "completion": "c"},
    {"prompt": "ij", "completion": "abcdefgh"},
    {"prompt": "c", "completion": "ca"},
]
PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "efgh"},
    {"prompt": "b", "chosen": "fghij.a", "rejected": "f"},
    {"prompt": "aaaa", "chosen": "c", "rejected": "cd"},
    {"prompt": "ij", "chosen": "abcdefgh", "rejected": "a.a.a."},
]
STEPS = [
    {"prompt": "abc", "completions": ["de", "f", "ghi"], "labels": [1, 0.5, 0]},
    {"prompt": "b", "completions": ["f"], "labels": [0]},
    {"prompt": "aaaa", "completions": ["c", "cccccc"], "labels": [1, 1]},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def assert_gradients_do_not_depend_on_the_cut(captured: Captured, train: Train) -> None:
    found = []
    for budget in BUDGETS:
        train(budget)
        found.append(captured.take())
    for other in found[1:]:
        assert_same_gradients(other, found[0])


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    return Captured(monkeypatch)


# --- through the whole loop, for every size of micro-batch --------------------------------------


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "fixed_length"])
def test_sft_gradient_does_not_depend_on_micro_batches(
    world: World, captured: Captured, aggregation: str
) -> None:
    data = world.rows("demonstrations.jsonl", DEMONSTRATIONS) | {"max_response_tokens": 20}

    def train(budget: int) -> None:
        sft.train(
            SFTConfig(
                model={"path": world.path}, data=data, run=world.run(), optimizer=STILL,
                steps=2, examples_per_step=4, tokens_per_micro_batch=budget,
                aggregation=aggregation,
            )
        )  # fmt: skip

    assert_gradients_do_not_depend_on_the_cut(captured, train)


@pytest.mark.parametrize("kind", ["pairs", "steps"])
def test_reward_model_gradient_does_not_depend_on_micro_batches(
    world: World, captured: Captured, kind: str
) -> None:
    data = {
        "pairs": world.rows("pairs.jsonl", PAIRS),
        "steps": world.rows("steps.jsonl", STEPS) | {"separator": "."},
    }[kind]

    def train(budget: int) -> None:
        reward_model.train(
            RewardModelConfig(
                model={"path": world.reward_model()}, run=world.run(), optimizer=STILL,
                held_out_share=0.0, examples_per_step=3, tokens_per_micro_batch=budget,
                **{kind: data},
            )
        )  # fmt: skip

    assert_gradients_do_not_depend_on_the_cut(captured, train)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {}),
        # IPO's gradient is a small difference of margins, which float32 knows to six digits.
        ("float64", {"loss": "ipo"}),
        ("float32", {"length_normalized": True, "reference_free": True, "target_margin": 0.3}),
        ("float32", {"sft_coefficient": 0.7, "label_smoothing": 0.1}),
    ],
    ids=["dpo", "ipo", "simpo", "sft"],
)
def test_dpo_gradient_does_not_depend_on_micro_batches(
    world: World, captured: Captured, dtype: str, options: dict[str, Any]
) -> None:
    data = world.rows("pairs.jsonl", PAIRS)
    model = {"path": world.path, "dtype": dtype}

    def train(budget: int) -> None:
        dpo.train(
            DPOConfig(
                model=model, data=data, run=world.run(), optimizer=STILL,
                epochs=1.5, pairs_per_step=3, tokens_per_micro_batch=budget, **options,
            )
        )  # fmt: skip

    assert_gradients_do_not_depend_on_the_cut(captured, train)


@pytest.mark.parametrize(
    ("rewards", "options"),
    [
        (("letters",), {}),
        (("letters", "pairs"), {"supervision": "process"}),
        (("letters",), {"aggregation": "token_mean", "mask_truncated": True, "sampling": LONGER}),
        (("letters",), {"aggregation": "fixed_length", "scale": "none", "beta": 0.0}),
        (("letters",), {"surrogate": "gspo"}),
        (("letters",), {"surrogate": "cispo", "importance_sampling_cap": 1.0}),
        (("letters",), {"kl_correction": True, "kl": "k1"}),
        (("letters",), {"epochs": 1, "minibatches": 1}),
    ],
    ids=["outcome", "process", "dapo", "dr-grpo", "gspo", "cispo", "corrected", "on-policy"],
)
def test_grpo_gradient_does_not_depend_on_micro_batches(
    world: World, captured: Captured, rewards: tuple[str, ...], options: dict[str, Any]
) -> None:
    shared = {"epochs": 2, "minibatches": 2, "steps_per_iteration": 1, **options}

    def train(budget: int) -> None:
        given = world.on_policy(*rewards, tokens_per_micro_batch=budget, **shared)
        grpo.train(GRPOConfig(**given))

    assert_gradients_do_not_depend_on_the_cut(captured, train)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_ppo_gradient_does_not_depend_on_micro_batches(
    world: World, captured: Captured, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic: dict[str, Any] = {"kind": kind, "optimizer": STILL, "clip": 0.2}
    if kind == "separate":
        critic["model"] = {"path": world.reward_model()}
    start = SharedCritic.__init__

    def begin(critic: SharedCritic, *rest: Any) -> None:
        start(critic, *rest)
        perturb(critic.head, seed=1, spread=0.5)

    monkeypatch.setattr(SharedCritic, "__init__", begin)

    def train(budget: int) -> None:
        given = world.on_policy("letters", "pairs", tokens_per_micro_batch=budget)
        ppo.train(
            PPOConfig(
                **given, steps=1, epochs=2, minibatches=2, critic=critic, beta=0.1,
                entropy_coef=0.01, bootstrap_truncated=True,
            )
        )  # fmt: skip

    assert_gradients_do_not_depend_on_the_cut(captured, train)


# --- in any packing and order -------------------------------------------------------------------


def cuts(responses: int, seed: int) -> MicroBatches:
    """All responses in random parts of random sizes, each in ascending order."""
    rng = random.Random(seed)
    order = rng.sample(range(responses), responses)
    parts = []
    while order:
        size = rng.randint(1, 5)
        parts.append(sorted(order[:size]))
        order = order[size:]
    return parts


def gradients(
    parameters: Sequence[torch.nn.Parameter], losses: Sequence[Callable[[], tuple[Tensor, Any]]]
) -> list[list[Tensor]]:
    for parameter in parameters:
        parameter.grad = None
    for loss in losses:
        loss()[0].backward()
    return [[torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]]


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "fixed_length"])
def test_grpo_gradient_does_not_depend_on_packing(world: World, aggregation: str) -> None:
    config = GRPOConfig(
        **world.on_policy("letters", "pairs", aggregation=aggregation, supervision="process")
    )
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    rollouts = rollout_batches(config, parts).of_step(0, config.dynamic_sampling)
    experience = grpo_learner(config, parts).prepare(rollouts, 0)
    parameters = trained_parameters(parts.policy.model)

    def gradient(micro_batches: MicroBatches) -> list[list[Tensor]]:
        work = experience.split_with_token_weights(
            micro_batches, AGGREGATIONS[config.aggregation], 8
        )
        losses = [lambda part=part: grpo_learner(config, parts).loss(part) for part in work]
        return gradients(parameters, losses)

    whole = gradient([list(range(12))])
    for seed in range(4):
        assert_same_gradients(gradient(cuts(12, seed)), whole)


def test_ppo_gradient_does_not_depend_on_packing(world: World) -> None:
    critic_config = {"model": {"path": world.reward_model()}}
    config = PPOConfig(
        **world.on_policy("letters", "pairs"), critic=critic_config, minibatches=1, epochs=1
    )
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    critic = ppo.make_critic(config.critic, config.model, parts.policy)
    rollouts = rollout_batches(config, parts).roll_out(1 - 1)
    steps = ppo_learner(config, parts, critic).schedule.plan(Grouped(rollouts.groups), 1)
    experience = ppo_learner(config, parts, critic).prepare(rollouts, steps, 0.1)
    parameters = [*trained_parameters(parts.policy.model), *critic.parameters()]

    def gradient(micro_batches: MicroBatches) -> list[list[Tensor]]:
        work = experience.split_with_token_weights(
            micro_batches, AGGREGATIONS[config.aggregation], 8
        )
        losses = [
            lambda part=part: ppo_learner(config, parts, critic).joint_loss(part, True)
            for part in work
        ]
        return gradients(parameters, losses)

    whole = gradient([list(range(12))])
    for seed in range(4):
        assert_same_gradients(gradient(cuts(12, seed)), whole)


@pytest.mark.parametrize("method", ["sft", "reward-model", "dpo"])
def test_gradient_does_not_depend_on_the_order_of_the_data(
    world: World, captured: Captured, method: str
) -> None:
    def train(order: list[int]) -> None:
        model, run = {"path": world.path}, world.run()
        if method == "sft":
            data = world.rows("order.jsonl", [DEMONSTRATIONS[i] for i in order])
            sft.train(
                SFTConfig(
                    model=model, data=data, run=run, optimizer=STILL, steps=1,
                    tokens_per_micro_batch=30,
                )
            )  # fmt: skip
            return
        data = world.rows("order.jsonl", [PAIRS[i] for i in order])
        if method == "dpo":
            dpo.train(
                DPOConfig(
                    model=model, data=data, run=run, optimizer=STILL, tokens_per_micro_batch=30
                )
            )
            return
        reward_model.train(
            RewardModelConfig(
                model={"path": world.reward_model()}, pairs=data, run=run, optimizer=STILL,
                held_out_share=0.0, tokens_per_micro_batch=30,
            )
        )  # fmt: skip

    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        train(order)
        found.append(captured.take())
    for other in found[1:]:
        assert_same_gradients(other, found[0])


def test_groups_may_be_divided_between_micro_batches(tmp_path: Path) -> None:
    world = World(tmp_path)
    config = GRPOConfig(**world.on_policy(tokens_per_micro_batch=1, steps_per_iteration=1))
    parts = build_components(config.model, config.data, config.rewards, None, config.sampling)
    rollouts = rollout_batches(config, parts).of_step(0, config.dynamic_sampling)
    (minibatch,) = grpo_learner(config, parts).plan(
        grpo_learner(config, parts).prepare(rollouts, 0), 0
    )
    assert [len(part) for part in minibatch.micro_batches] == [1] * 12
