"""One optimizer step, and the plan of the steps that reuse a rollout batch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_groups
from torch import Tensor, nn

from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.data.oom import score_all
from trivium.errors import TrainingError
from trivium.maths.aggregation import token_mean
from trivium.serialization import Serializer, deserialize
from trivium.training.experience import (
    Minibatch,
    WeightedGroups,
    epoch_batch,
    first_epoch_micro_batches,
    num_steps,
    plan_updates,
)
from trivium.training.micro_batch import MicroBatch
from trivium.training.optimizer import Optimizer, lr_multiplier
from trivium.training.optimizer_config import OptimizerConfig

SINGLE = Grouped([Group([1], [[1]])])


def work_of(loss: Callable[[], Tensor], **observed: list[float]) -> MicroBatch:
    seen = {name: torch.tensor(x) for name, x in observed.items()}
    return MicroBatch(SINGLE, lambda part: (loss(), seen))


def vector(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: 1.0, 5: 1.0, 99: 1.0}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 9: 1.0}),
        ({"schedule": "linear"}, {0: 1.0, 1: 0.9, 5: 0.5, 9: 0.1, 10: 0.0, 12: 0.0}),
        (
            {"schedule": "linear", "warmup_steps": 2, "min_lr_ratio": 0.1},
            {0: 0.5, 1: 1.0, 2: 1.0, 4: 0.775, 6: 0.55, 10: 0.1, 11: 0.1},
        ),
        (
            {"schedule": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1},
            {1: 1.0, 2: 1.0, 4: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 6: 0.55, 10: 0.1, 20: 0.1},
        ),
        ({"schedule": "cosine", "warmup_steps": 10}, {4: 0.5, 9: 1.0, 10: 1.0}),
        ({"warmup_ratio": 0.4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0}),
        ({"warmup_ratio": 0.31}, {0: 0.25, 3: 1.0}),
        ({"warmup_steps": 4, "warmup_start_ratio": 0.1}, {0: 0.1, 1: 0.4, 2: 0.7, 3: 1.0, 4: 1.0}),
        ({"warmup_steps": 3, "warmup_start_ratio": 0.0}, {0: 0.0, 1: 0.5, 2: 1.0}),
        ({"warmup_steps": 1, "warmup_start_ratio": 0.1}, {0: 0.1, 1: 1.0}),
        ({"warmup_steps": 3, "warmup_start_ratio": 1.0}, {0: 1.0, 1: 1.0, 2: 1.0}),
        (
            {"schedule": "linear", "warmup_ratio": 0.2, "min_lr_ratio": 0.1},
            {0: 0.5, 1: 1.0, 2: 1.0, 6: 0.55, 10: 0.1},
        ),
    ],
)
def test_learning_rate_follows_its_schedule(options: dict, expected: dict[int, float]) -> None:
    config = OptimizerConfig(**options)
    found = {step: lr_multiplier(config, step, 10) for step in expected}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("share", "total", "steps"),
    [(0.03, 100, 3), (0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (0.1, 5, 1), (0.0, 5, 0)],
)
def test_share_of_the_steps_is_rounded_up_and_not_by_binary_fractions(
    share: float, total: int, steps: int
) -> None:
    assert OptimizerConfig(warmup_ratio=share).warmup_length(total) == steps


def test_instructgpts_warm_up_is_ten_steps_from_a_tenth_of_the_peak() -> None:
    # Ouyang et al. 2022, appendix C.4; a tenth is also the first of ten equal parts.
    given = OptimizerConfig(warmup_steps=10, warmup_start_ratio=0.1)
    default = OptimizerConfig(warmup_steps=10)
    rates = [lr_multiplier(given, step, 100) for step in range(12)]
    assert rates == pytest.approx([0.1 * k for k in range(1, 11)] + [1.0, 1.0])
    assert rates == pytest.approx([lr_multiplier(default, step, 100) for step in range(12)])


def test_step_uses_and_reports_the_rate_of_its_number() -> None:
    config = OptimizerConfig(learning_rate=0.1, schedule="linear", warmup_steps=2)
    x = vector(1.0)
    optimizer = Optimizer([(config, [x])], total_steps=4)
    rates, moves = [], []
    for _ in range(4):
        before = float(x.detach())
        rates.append(optimizer.step([work_of(lambda: 2.0 * x.sum())]).learning_rate)
        moves.append(before - float(x.detach()))
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05])
    # With a constant gradient, Adam's move is the learning rate.
    assert moves == pytest.approx(rates, rel=1e-6)


# --- one step -----------------------------------------------------------------------------------


def test_gradients_of_micro_batches_add_up_and_old_ones_are_forgotten() -> None:
    x = vector(1.0, 2.0)
    optimizer = Optimizer([(OptimizerConfig(max_grad_norm=100.0), [x])], 10)
    for _ in range(2):
        result = optimizer.step([work_of(lambda: 3 * x[0]), work_of(lambda: 4 * x[1] + 5 * x[0])])
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.tensor([8.0, 4.0], dtype=torch.float64))
        assert result.gradient_norm == pytest.approx(math.sqrt(80))


def test_loss_and_observations_are_those_of_all_micro_batches() -> None:
    x = vector(0.5)
    optimizer = Optimizer([(OptimizerConfig(), [x])], 10)
    result = optimizer.step(
        [
            work_of(lambda: x.sum(), seen=[1.0, 2.0]),
            work_of(lambda: 2 * x.sum(), seen=[3.0], more=[4.0]),
        ]
    )
    assert result.loss == pytest.approx(1.5)
    assert {k: v.tolist() for k, v in result.observed.items()} == {
        "seen": [1.0, 2.0, 3.0],
        "more": [4.0],
    }


def test_large_gradients_are_scaled_to_the_norm_and_small_ones_left_alone() -> None:
    x = vector(0.0, 0.0)
    optimizer = Optimizer([(OptimizerConfig(max_grad_norm=1.0), [x])], 10)
    result = optimizer.step([work_of(lambda: 3 * x[0] + 4 * x[1])])
    assert result.gradient_norm == pytest.approx(5.0)
    torch.testing.assert_close(
        x.grad, torch.tensor([0.6, 0.8], dtype=torch.float64), rtol=1e-5, atol=0
    )
    optimizer.step([work_of(lambda: 0.3 * x[0] + 0.4 * x[1])])
    torch.testing.assert_close(x.grad, torch.tensor([0.3, 0.4], dtype=torch.float64))


def test_each_set_of_parameters_has_its_own_rate_and_clipping() -> None:
    actor, critic = vector(0.0), vector(0.0)
    sets = [
        (OptimizerConfig(learning_rate=0.1, max_grad_norm=1.0), [actor]),
        (OptimizerConfig(learning_rate=0.01, max_grad_norm=50.0), [critic]),
    ]
    result = Optimizer(sets, 10).step([work_of(lambda: 3 * actor.sum() - 40 * critic.sum())])
    assert result.gradient_norm == pytest.approx(3.0)
    assert float(actor.grad) == pytest.approx(1.0, rel=1e-5)
    assert float(critic.grad) == pytest.approx(-40.0)
    assert float(actor.detach()) == pytest.approx(-0.1, rel=1e-6)
    assert float(critic.detach()) == pytest.approx(0.01, rel=1e-6)


def test_weight_decay_shrinks_matrices_only() -> None:
    matrix, bias = nn.Parameter(torch.full((2, 3), 2.0)), nn.Parameter(torch.full((3,), 2.0))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    optimizer = Optimizer([(config, [matrix, bias])], 10)
    optimizer.step([work_of(lambda: 0.0 * (matrix.sum() + bias.sum()))])
    torch.testing.assert_close(matrix.detach(), torch.full((2, 3), 2.0 * (1 - 0.1 * 0.5)))
    assert torch.equal(bias.detach(), torch.full((3,), 2.0))


# --- kinds --------------------------------------------------------------------------------------


def by_hand(kind: str, w: float, slopes: list[float], decay: float) -> list[float]:
    """A matrix weight after each gradient, by the kinds' equations in float64."""
    rate, first, second, weights = 0.01, 0.0, 0.0, []
    for t, slope in enumerate(slopes, start=1):
        g = slope if kind == "adamw" else slope + decay * w
        if kind == "rmsprop":
            second = 0.9 * second + 0.1 * g**2
            w -= rate * g / (math.sqrt(second) + 1e-8)
        else:
            first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2
            step = (first / (1 - 0.8**t)) / (math.sqrt(second / (1 - 0.95**t)) + 1e-8)
            w = w * (1 - rate * decay * (kind == "adamw")) - rate * step
        weights.append(w)
    return weights


def of_kind(kind: str, **options: Any) -> OptimizerConfig:
    rates = {"alpha": 0.9} if kind == "rmsprop" else {"betas": (0.8, 0.95)}
    given = {"kind": kind, "learning_rate": 0.01, "max_grad_norm": 1e9, "weight_decay": 0.3}
    return OptimizerConfig(**(given | rates | options))


KINDS = ("adamw", "adam", "rmsprop")
SLOPES = [0.5, -2.0, 1.0, 0.25, 3.0]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_take_the_steps_of_their_equations(kind: str) -> None:
    x = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer, found = Optimizer([(of_kind(kind), [x])], 10), []
    for slope in SLOPES:
        optimizer.step([work_of(lambda slope=slope: slope * x.sum())])
        found.append(float(x.detach()))
    assert found == pytest.approx(by_hand(kind, 2.0, SLOPES, 0.3), rel=1e-12)


def test_each_set_of_parameters_may_have_its_own_kind() -> None:
    x, y = (nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64)) for _ in range(2))
    sets = [(of_kind("rmsprop"), [x]), (of_kind("adamw", learning_rate=0.005), [y])]
    optimizer = Optimizer(sets, 10)
    for slope in SLOPES:
        result = optimizer.step([work_of(lambda slope=slope: slope * (x.sum() + y.sum()))])
    assert float(x.detach()) == pytest.approx(by_hand("rmsprop", 2.0, SLOPES, 0.3)[-1])
    assert result.learning_rate == 0.01
    assert optimizer.by_kind["adamw"].param_groups[0]["lr"] == 0.005
    assert set(optimizer.state_dict()["moments"]) == {"rmsprop", "adamw"}


@pytest.mark.parametrize("half_precision", ["master_weights", "stochastic_rounding", None])
@pytest.mark.parametrize("kind", KINDS)
def test_state_of_every_kind_resumes_with_the_same_bits(
    kind: str, half_precision: str | None
) -> None:
    options = {} if half_precision is None else {"half_precision": half_precision}
    config = of_kind(kind, schedule="cosine", warmup_ratio=0.3, min_lr_ratio=0.1, **options)
    dtype = torch.float32 if half_precision is None else torch.bfloat16

    def start(weights: Tensor, state: dict[str, Any] | None) -> tuple[Optimizer, nn.Parameter]:
        x = nn.Parameter(weights.clone())
        optimizer = Optimizer([(config, [x])], 10)
        if state is not None:
            optimizer.load_state_dict(deserialize(*state["packed"]))
        return optimizer, x

    def train(optimizer: Optimizer, x: nn.Parameter, steps: range) -> None:
        for step in steps:
            slope = torch.linspace(-1, 1, 12).view(3, 4) + 0.1 * step
            optimizer.step([work_of(lambda slope=slope: (slope * x.float()).sum())])

    initial = torch.linspace(0.5, 2.0, 12).view(3, 4).to(dtype)
    optimizer, x = start(initial, None)
    train(optimizer, x, range(4))
    serializer = Serializer()
    tree = serializer.pack(optimizer.state_dict(), "optimizer")
    saved = {name: tensor.clone() for name, tensor in serializer.tensors.items()}
    resumed, y = start(x.detach(), {"packed": (json.loads(json.dumps(tree)), saved.__getitem__)})
    for one, weights in ((optimizer, x), (resumed, y)):
        train(one, weights, range(4, 10))
    assert torch.equal(x, y)
    assert not torch.equal(x, initial)
    copies = (o.masters.state_dict() for o in (optimizer, resumed))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*copies, strict=True))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: x.sum() * torch.nan,
        lambda x, y: x.sum() * torch.inf,
        lambda x, y: (x.sum() - 1.0).abs().sqrt() + y.sum(),
        lambda x, y: x.sum() + (y.sum() - 1.0).abs().sqrt(),
    ],
    ids=["nan loss", "infinite loss", "infinite gradient", "infinite gradient of the second set"],
)
def test_step_that_is_not_finite_raises_and_moves_nothing(
    loss: Callable[[Tensor, Tensor], Tensor],
) -> None:
    x, y = vector(1.0), vector(1.0)
    config = OptimizerConfig(weight_decay=0.1)
    optimizer = Optimizer([(config, [x]), (config, [y])], 10)
    with pytest.raises(TrainingError, match="optimizer step 0 the loss is"):
        optimizer.step([work_of(lambda: x.sum()), work_of(lambda: loss(x, y))])
    assert (float(x.detach()), float(y.detach())) == (1.0, 1.0)
    assert optimizer.steps == 0
    assert not optimizer.state_of(x) and not optimizer.state_of(y)


def test_step_without_micro_batches_is_an_error() -> None:
    with pytest.raises(TrainingError, match="nothing to learn"):
        Optimizer([(OptimizerConfig(), [vector(1.0)])], 10).step([])


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"max_grad_norm": 0.0}, {"warmup_steps": -1}, {"min_lr_ratio": 1.5},
     {"weight_decay": -0.1}, {"warmup_ratio": 1.0}, {"warmup_start_ratio": 1.1}, {"alpha": 1.0},
     {"kind": "sgd"}],
)  # fmt: skip
def test_optimizer_settings_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimizerConfig(**options)


# --- plans --------------------------------------------------------------------------------------

DATA = Grouped(random_groups(9, [3, 1, 4, 2, 5], [[2, 9], [3], [1, 1, 6], [4, 4], [7]]))
GROUP_OF = [0, 0, 1, 2, 2, 2, 3, 3, 4]


def plan(**options: int) -> list[Minibatch]:
    given = {"epochs": 3, "minibatches": 2, "max_tokens": 20, "seed": 0, "step": 0}
    return plan_updates(DATA, **(given | options))


def test_every_response_comes_once_per_epoch_and_groups_stay_in_one_minibatch() -> None:
    steps = plan()
    assert len(steps) == 6
    for first in range(0, 6, 2):
        epoch = [
            sorted(r for part in step.micro_batches for r in part)
            for step in steps[first : first + 2]
        ]
        assert sorted(epoch[0] + epoch[1]) == list(range(9))
        assert not {GROUP_OF[r] for r in epoch[0]} & {GROUP_OF[r] for r in epoch[1]}


def test_minibatches_are_reshuffled_in_each_epoch_by_seed_and_step_alone() -> None:
    def groups(steps: list[Minibatch]) -> list[frozenset[int]]:
        return [frozenset(GROUP_OF[r] for r in step.responses) for step in steps]

    usual = plan(epochs=8)
    assert usual == plan(epochs=8)
    assert len(set(groups(usual)[::2])) > 2
    assert groups(plan(epochs=8, max_tokens=1)) == groups(usual)
    assert groups(plan(epochs=8, seed=1)) != groups(usual)
    assert groups(plan(epochs=8, step=1)) != groups(usual)


def test_micro_batches_keep_to_the_token_limit() -> None:
    for limit in (1, 12, 20, 1000):
        for step in plan(max_tokens=limit):
            for part in step.micro_batches:
                cut = DATA.select(part)
                tokens = sum(len(g.prompt) + sum(map(len, g.responses)) for g in cut.groups)
                assert tokens <= limit or len(part) == 1
    assert all(len(step.micro_batches) == 1 for step in plan(max_tokens=1000))


@pytest.mark.parametrize("minibatches", [1, 2, 4, 9])
@pytest.mark.parametrize("epochs", [1, 3])
def test_first_epoch_holds_every_response_once_even_with_fewer_groups_than_minibatches(
    minibatches: int, epochs: int
) -> None:
    few = Grouped(DATA.groups[:3])
    steps = plan_updates(few, epochs=epochs, minibatches=minibatches, max_tokens=10, seed=0, step=0)
    parts = first_epoch_micro_batches(steps, 6)
    assert sorted(r for part in parts for r in part) == list(range(6))
    assert parts == [part for step in steps for part in step.micro_batches][: len(parts)]


def test_scores_come_back_in_the_order_of_the_data() -> None:
    (targets_T,) = score_all(DATA, [[4, 8], [0], [1, 3, 5, 7], [2, 6]], lambda b: (b.targets_T,))
    assert targets_T.tolist() == [t for g in DATA.groups for r in g.responses for t in r]


def test_weights_are_those_of_the_whole_step_in_every_part() -> None:
    total = int(DATA.lengths_N.sum())
    loss_mask_T = torch.ones(total, dtype=torch.bool)
    loss_mask_T[[0, 3, 12]] = False
    data = WeightedGroups(DATA.groups, loss_mask_T=loss_mask_T)
    chosen = [1, 2, 4, 5, 8]
    parts = data.split_with_token_weights([[4, 8], [1], [2, 5]], token_mean)
    assert [len(p.lengths_N) for p in parts] == [2, 1, 2]
    counted = int(data.select(chosen).loss_mask_T.sum())
    for part in parts:
        expected = part.loss_mask_T.float() / counted
        torch.testing.assert_close(part.weights_T, expected)


def test_epochs_of_items_visit_each_once_in_a_new_order() -> None:
    seen = [i for step in range(10) for i in epoch_batch(5, 2, step, seed=3)]
    epochs = [seen[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = [i for step in range(10) for i in epoch_batch(5, 2, step, seed=4)]
    assert other != seen
    assert Counter(other) == Counter(seen)


def test_batch_larger_than_the_data_is_the_data() -> None:
    assert sorted(epoch_batch(3, 8, 0, seed=0)) == [0, 1, 2]
    assert sorted(epoch_batch(3, 8, 1, seed=0)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("epochs", "count", "size", "steps"),
    [(1.0, 10, 4, 3), (2.0, 10, 4, 5), (0.5, 10, 4, 2), (3.0, 4, 100, 3), (1.0, 1, 1, 1)],
)
def test_steps_of_so_many_epochs(epochs: float, count: int, size: int, steps: int) -> None:
    assert num_steps(epochs, count, size) == steps
