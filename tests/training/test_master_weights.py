"""Half-precision weights learn what float32 weights learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.errors import ConfigurationError
from trivium.training.master_weights import (
    MasterWeights,
    StochasticRounding,
    round_evenly,
    round_stochastically,
)
from trivium.training.micro_batch import MicroBatch
from trivium.training.optimizer import Optimizer
from trivium.training.optimizer_config import OptimizerConfig
from trivium.training.weight_sample import WeightSample

SINGLE = Grouped([Group([1], [[1]])])
CONFIG = OptimizerConfig(learning_rate=1e-3, max_grad_norm=100.0)
STOCHASTIC = CONFIG.model_copy(update={"half_precision": "stochastic_rounding"})


def weight(*values: float, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values).to(dtype))


def work_of(*losses: Callable[[], Tensor]) -> list[MicroBatch]:
    def of(loss: Callable[[], Tensor]) -> MicroBatch:
        return MicroBatch(SINGLE, lambda part: (loss(), {}))

    return [of(loss) for loss in losses]


def test_weights_follow_float32_copies_that_take_the_steps_of_adamw() -> None:
    w, slope = weight(1.0, -2.0, 0.5), torch.tensor([1.0, -1.0, 2.0])
    copy = nn.Parameter(w.detach().float())
    adamw = torch.optim.AdamW([copy], lr=1e-3, weight_decay=0.0)
    optimizer = Optimizer([(CONFIG, [w])], 10)
    for _ in range(10):
        optimizer.step(work_of(lambda: (slope.bfloat16() * w).sum()))
        copy.grad = slope.clone()
        adamw.step()
        assert torch.equal(optimizer.masters.of[w], copy)
        assert torch.equal(w, round_evenly(copy))


def test_updates_below_one_unit_in_the_last_place_move_as_many_weights() -> None:
    w = weight(*[1.0] * 10_000)  # The next smaller number is 1 - 1/256.
    optimizer = Optimizer([(CONFIG.model_copy(update={"learning_rate": 1e-4}), [w])], 30)
    for step in range(1, 31):
        optimizer.step(work_of(lambda: w.sum()))
        # Of n multiples of the golden ratio, any part of (0, 1] has its share up to about 3/n.
        assert float(w.detach().double().mean()) == pytest.approx(1 - 1e-4 * step, abs=3e-6)
    assert set(w.tolist()) == {1.0, 1 - 1 / 256}
    assert optimizer.masters.of[w].tolist() == pytest.approx([1 - 30e-4] * 10_000, abs=1e-6)


def test_weights_that_move_one_way_never_move_back() -> None:
    w = weight(*torch.linspace(-2, 2, 999).tolist())
    optimizer = Optimizer([(CONFIG.model_copy(update={"learning_rate": 1e-4}), [w])], 30)
    for _ in range(30):
        before = w.detach().clone()
        optimizer.step(work_of(lambda: w.sum()))
        assert bool((w <= before).all())


def test_gradients_of_micro_batches_are_added_up_in_float32() -> None:
    w = weight(1.0)
    optimizer = Optimizer([(CONFIG, [w])], 1)
    # 1 + 2⁻⁹ is no bfloat16 number: added up in bfloat16, the second gradient would be lost.
    result = optimizer.step(work_of(lambda: w.sum(), lambda: 2**-9 * w.sum()))
    assert result.gradient_norm == 1 + 2**-9
    assert w.grad is None


def test_full_precision_weights_are_their_own_masters() -> None:
    w = weight(1.0, dtype=torch.float32)
    masters = MasterWeights([w])
    assert masters.of[w] is w and masters.state_dict() == []
    w.sum().backward()
    assert w.grad is not None


def test_a_second_optimizer_of_the_same_weights_gets_their_gradients() -> None:
    w = weight(1.0)
    first, second = (Optimizer([(CONFIG, [w])], 1) for _ in range(2))
    result = second.step(work_of(lambda: 3 * w.sum()))
    assert result.gradient_norm == 3
    assert first.masters.of[w].grad is None


def test_state_holds_the_copies_to_the_last_bit() -> None:
    def trained(state: dict[str, object] | None) -> tuple[Optimizer, nn.Parameter]:
        w = weight(1.0, -2.0)
        optimizer = Optimizer([(CONFIG, [w])], 10)
        if state is not None:
            optimizer.load_state_dict(state)
            optimizer.masters.round_()
        return optimizer, w

    def steps(optimizer: Optimizer, w: nn.Parameter) -> None:
        for _ in range(3):
            optimizer.step(work_of(lambda: (w * torch.tensor([1.0, 3.0])).sum()))

    optimizer, w = trained(None)
    steps(optimizer, w)
    other, again = trained(optimizer.state_dict())
    steps(optimizer, w)
    steps(other, again)
    assert torch.equal(optimizer.masters.of[w], other.masters.of[again])
    assert torch.equal(w, again)


# --- even rounding --------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_even_rounding_keeps_means_and_takes_neighbors(sign: int) -> None:
    generator = torch.Generator().manual_seed(1)
    low = torch.linspace(0.5, 0.99, 200_000).bfloat16().float()  # Units in the last place: 1/256.
    x = sign * (low + torch.rand(len(low), generator=generator) / 256)
    rounded = round_evenly(x).double()
    away = (rounded - x.double()) * sign
    assert bool((away.abs() < 1 / 256).all())
    # The standard deviation of the mean error is below 1/(256 · 2 √200000) = 4.4e-6.
    assert float(away.mean()) == pytest.approx(0, abs=2e-5)


def test_even_rounding_of_any_shape_depends_on_the_number_and_its_index_alone() -> None:
    x = torch.rand(3, 70_000, generator=torch.Generator().manual_seed(0)) + 1
    assert torch.equal(round_evenly(x).view(-1), round_evenly(x.view(-1)))
    assert torch.equal(round_evenly(x.view(-1)[:5]), round_evenly(x.view(-1))[:5])
    assert torch.equal(round_evenly(x.t()), round_evenly(x.t().contiguous()))
    # Indices that differ by the period of the thresholds have the same threshold.
    same = torch.full((70_000,), 1 + 0.3 / 128)
    assert torch.equal(round_evenly(same)[: 70_000 - 65_536], round_evenly(same)[65_536:])


def test_even_rounding_leaves_bfloat16_numbers_as_they_are() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -3.140625, 1e-38, float("inf"), -float("inf")])
    assert torch.equal(round_evenly(x.bfloat16().float()), x.bfloat16())


# --- stochastic rounding --------------------------------------------------------------------------


def test_rounding_is_up_or_down_with_the_probability_of_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    for low, high, share in ((1.0, 1 + 1 / 128, 0.25), (-1.0, -1 - 1 / 128, 0.75)):
        x = torch.full((100_000,), low + share * (high - low))
        rounded = round_stochastically(x, generator)
        assert rounded.dtype == torch.bfloat16
        assert set(rounded.float().unique().tolist()) == {low, high}
        # The standard deviation of the share is below 0.5/√100000 = 0.0016.
        assert float((rounded == high).float().mean()) == pytest.approx(share, abs=0.008)


def test_bfloat16_numbers_are_not_rounded() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -3.140625, 1e-38, float("inf")])
    rounded = round_stochastically(x, torch.Generator().manual_seed(0))
    assert torch.equal(rounded.float(), x.bfloat16().float())


@pytest.mark.parametrize(
    ("kind", "theirs", "rates"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.99)}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.99)}),
        ("rmsprop", torch.optim.RMSprop, {"alpha": 0.9}),
    ],
)
def test_update_before_rounding_is_that_of_pytorch(
    kind: str, theirs: Callable[..., torch.optim.Optimizer], rates: dict[str, Any]
) -> None:
    settings = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1, **rates}
    mine, plain = (weight(1.0, -2.0, 0.5, dtype=torch.float32) for _ in range(2))
    pairs = [
        (mine, StochasticRounding([{"params": [mine], **settings}], kind)),
        (plain, theirs([plain], **settings)),
    ]
    for step in range(5):
        for w, optimizer in pairs:
            w.grad = torch.tensor([1.0, step - 2.0, 0.0])
            optimizer.step()
    torch.testing.assert_close(mine, plain, atol=1e-7, rtol=1e-6)


def test_stochastically_rounded_weights_move_as_far_on_average() -> None:
    w = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    config = STOCHASTIC.model_copy(update={"learning_rate": 1e-4})
    optimizer = Optimizer([(config, [w])], 30)
    for _ in range(30):
        result = optimizer.step(work_of(lambda: w.float().sum() / 100))
        # Few weights change in a step: that is no lost update.
        assert "weights/changed_share" not in result.weights
        assert result.weights["weights/update_norm"] > 0
    assert optimizer.masters.of == {}
    # One rounding has a standard deviation below 1/256; 30 of 10,000 weights below 0.0003.
    assert float(w.detach().float().mean()) == pytest.approx(1 - 30e-4, abs=0.0012)


def test_rounding_depends_on_the_number_of_the_step_alone() -> None:
    results = []
    for _ in range(2):
        torch.rand(3)  # The process's own random numbers do not matter.
        w = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
        optimizer = Optimizer([(STOCHASTIC, [w])], 3)
        for _ in range(3):
            optimizer.step(work_of(lambda w=w: w.float().sum()))
        results.append(w)
    assert torch.equal(*results)


def test_stochastic_rounding_of_full_precision_weights_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no trained weight is bfloat16"):
        Optimizer([(STOCHASTIC, [weight(1.0, dtype=torch.float32)])], 1)
    with pytest.raises(ConfigurationError, match="not for every optimizer"):
        Optimizer([(STOCHASTIC, [weight(1.0)]), (CONFIG, [weight(1.0)])], 1)


# --- measures -------------------------------------------------------------------------------------


def test_measures_of_a_step_are_those_of_all_weights() -> None:
    a, b = nn.Parameter(torch.ones(4, 8)), nn.Parameter(2 * torch.ones(8))
    frozen = nn.Parameter(torch.ones(100))
    a.grad, b.grad = torch.ones(4, 8), torch.ones(8)
    a.grad[0] = 0  # Weights without a gradient cannot be expected to change.
    sample = WeightSample([a, b, frozen])
    with torch.no_grad():
        a[1:3] += 0.5
        b[:4] -= 1
    found = sample.metrics()
    assert found["weights/changed_share"] == pytest.approx((16 + 4) / (24 + 8))
    moved, size = 16 * 0.25 + 4, 32 + 8 * 4
    assert found["weights/update_norm"] == pytest.approx(moved**0.5)
    assert found["weights/relative_update"] == pytest.approx((moved / size) ** 0.5)


def test_a_step_without_gradients_has_no_measures() -> None:
    w = nn.Parameter(torch.ones(3))
    assert WeightSample([w]).metrics() == {}
    w.grad = torch.zeros(3)
    assert WeightSample([w]).metrics() == {}


@pytest.mark.parametrize(("rate", "share"), [(1e-6, 0.0), (1e-1, 1.0)])
def test_updates_that_are_lost_in_rounding_are_counted(rate: float, share: float) -> None:
    w = weight(1.0, 2.0)
    w.grad = torch.ones(2, dtype=torch.bfloat16)
    sample = WeightSample([w])
    with torch.no_grad():
        w -= rate
    assert sample.metrics()["weights/changed_share"] == share


def test_large_tensors_are_sampled() -> None:
    w = nn.Parameter(torch.zeros(100_000))
    w.grad = torch.ones(100_000)
    sample = WeightSample([w])
    with torch.no_grad():
        w[:50_000] += 1
    assert len(sample.before[0]) <= 1024
    assert sample.metrics()["weights/changed_share"] == pytest.approx(0.5, abs=0.01)
