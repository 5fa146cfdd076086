"""Micro-batches that do not fit in memory are split, with the same gradient and a warning."""

from __future__ import annotations

import logging
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import STILL, Captured, World, assert_same_gradients, metrics_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trivium.algorithms import dpo, grpo, ppo, reward_model, sft
from trivium.data import oom
from trivium.data.batch import Batch, Group, Grouped
from trivium.data.oom import is_out_of_memory, score_all
from trivium.errors import TrainingError
from trivium.models import group_model
from trivium.training.micro_batch import MicroBatch, measure
from trivium.training.optimizer import Optimizer, OptimizerConfig, StepResult

CPU = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"
ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError(CPU),
    lambda: MemoryError(),
]


@pytest.fixture(autouse=True)
def _no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom, "_warned", [])
    # A collection of a test session's heap takes half a second.
    monkeypatch.setattr(oom.gc, "collect", lambda: 0)


# --- splitting ----------------------------------------------------------------------------------

sizes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5)


@given(sizes, st.booleans())
def test_halves_keep_the_order_and_are_as_even_as_possible(
    lengths: list[list[int]], whole_groups: bool
) -> None:
    data = Grouped([Group([1, 2], [[0] * n for n in group]) for group in lengths])
    flat = [n for group in lengths for n in group]
    ends = [sum(len(g) for g in lengths[:i]) for i in range(1, len(lengths))]
    cuts = ends if whole_groups else list(range(1, len(flat)))
    halves = data.halves(whole_groups=whole_groups)
    if not cuts:
        assert halves is None
        return
    assert halves is not None
    assert [*halves[0], *halves[1]] == list(range(len(flat)))
    assert len(halves[0]) in cuts
    gap = {cut: abs(sum(flat[:cut]) - sum(flat[cut:])) for cut in cuts}
    assert gap[len(halves[0])] == min(gap.values())


def test_tokens_count_each_prompt_once() -> None:
    assert Grouped([Group([1, 2, 3], [[4], [5, 6]]), Group([1], [[2]])]).tokens == 8


# --- one step -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Numbers(Grouped):
    """Groups with a number per token."""

    x_T: Tensor


def numbers(*lengths: Sequence[int]) -> Numbers:
    total = sum(map(sum, lengths))
    x_T = torch.linspace(0.3, 2.0, total, dtype=torch.float64)
    return Numbers([Group([1], [[0] * n for n in group]) for group in lengths], x_T=x_T)


class Explode(torch.autograd.Function):
    """The identity, whose backward pass fails on more than ``most`` entries."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int, error: BaseException) -> Tensor:
        ctx.most, ctx.error = most, error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if len(gradients[0]) > ctx.most:
            raise ctx.error
        return gradients[0], None, None


class Toy:
    """A function of two parameters whose backward pass reaches ``late`` first, then ``early``."""

    def __init__(self, where: str, most: int, error: Callable[[], BaseException]) -> None:
        self.early = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))
        self.late = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))
        self.where, self.most, self.error = where, most, error
        self.tried: list[int] = []

    def loss(self, part: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        self.tried.append(len(part.x_T))
        if self.where == "forward" and len(part.x_T) > self.most:
            raise self.error()
        hidden_T = (self.early[0] * part.x_T).tanh() + self.early[1] * part.x_T
        if self.where == "backward":
            hidden_T = Explode.apply(hidden_T, self.most, self.error())
        loss_T = (self.late * hidden_T).square()
        return loss_T.sum() / 7, {"x_T": part.x_T}

    def step(self, work: Sequence[Numbers], **options: Any) -> tuple[StepResult, Optimizer]:
        optimizer = Optimizer(
            [(OptimizerConfig(learning_rate=0.01, max_grad_norm=1e9), [self.early, self.late])], 5
        )
        return optimizer.step([MicroBatch(p, self.loss, **options) for p in work]), optimizer

    def state_dict(self) -> list[Tensor]:
        assert self.early.grad is not None and self.late.grad is not None
        return [self.early.grad, self.late.grad, self.early.detach(), self.late.detach()]


WORK = [numbers([2], [1]), numbers([3, 4], [5, 2]), numbers([1]), numbers([6], [3], [2])]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("most", [6, 10, 11, 14])
def test_gradient_equals_that_of_a_step_that_fits(
    where: str, most: int, error: Callable[[], BaseException]
) -> None:
    whole = Toy(where, 1000, error)
    expected, _ = whole.step(WORK)
    toy = Toy(where, most, error)
    found, optimizer = toy.step(WORK)
    for mine, theirs in zip(toy.state_dict(), whole.state_dict(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-12)
    assert torch.equal(found.observed["x_T"], expected.observed["x_T"])
    assert optimizer.steps == 1
    assert {int(state["step"]) for state in optimizer.by_kind["adamw"].state.values()} == {1}
    # 14 tokens do not fit; with a limit below 11, neither do 11; below 7, nor the halves of 14.
    assert (expected.splits, found.splits) == (0, {6: 4, 10: 2, 11: 1, 14: 0}[most])


def test_gradient_of_a_failed_backward_pass_is_dropped() -> None:
    toy = Toy("backward", 3, ERRORS[0])
    loss, _ = toy.loss(WORK[1])
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    assert toy.late.grad is not None and float(toy.late.grad.abs()) > 0.1


def test_only_a_failed_backward_pass_restarts_the_step() -> None:
    tried = {}
    for where in ("forward", "backward"):
        toy = Toy(where, 8, ERRORS[0])
        toy.step(WORK)
        tried[where] = toy.tried
    # The 14 tokens are split into 7 and 7; the last 11, smaller than all failures, are not split.
    assert tried["forward"] == [3, 14, 7, 7, 1, 11, 6, 5]
    assert tried["backward"] == [3, 14, 3, 7, 7, 1, 11, 3, 7, 7, 1, 6, 5]


def test_a_size_that_failed_is_not_tried_again_in_the_step() -> None:
    toy = Toy("backward", 8, ERRORS[0])
    same = numbers([4], [5])
    result, optimizer = toy.step([same] * 5)
    assert toy.tried == [9] + [4, 5] * 5
    assert result.splits == 5
    optimizer.step([MicroBatch(same, toy.loss)])
    assert toy.tried[11:] == [9, 4, 5], "the next step starts from the configured size"


def test_whole_groups_are_never_split() -> None:
    seen: list[list[int]] = []

    def loss(part: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        if len(part.groups) > 1:
            raise MemoryError
        seen.append(part.sizes_G.tolist())
        return (x * part.x_T).sum(), {}

    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    pairs = numbers([2, 9], [3, 1], [4, 4])
    config = OptimizerConfig(max_grad_norm=1e9)
    Optimizer([(config, [x])], 1).step([MicroBatch(pairs, loss, whole_groups=True)])
    assert seen == [[2], [2], [2]]
    torch.testing.assert_close(x.grad, pairs.x_T.sum()[None])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_single_response_that_does_not_fit_ends_the_run_without_an_update(where: str) -> None:
    toy = Toy(where, 5, ERRORS[0])
    with pytest.raises(TrainingError) as error:
        toy.step(WORK)
    message = str(error.value)
    assert "a prompt of 1 tokens with a response of 6 tokens does not fit" in message
    assert "Tried to allocate 2.00 GiB" in message
    assert "max_tokens" in message and "gradient_checkpointing" in message
    assert (toy.early.tolist(), toy.late.tolist()) == ([0.7, -0.4], [1.3])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_tensors_of_a_failed_pass_are_freed_before_its_halves_are_tried(where: str) -> None:
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    toy = Toy(where, 8, ERRORS[0])

    def loss(part: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        alive.append(sum(ref() is not None for ref in kept))
        hidden_T = toy.early[0] * part.x_T
        kept.append(weakref.ref(hidden_T))
        total, _ = toy.loss(part)
        return total + hidden_T.exp().sum(), {}

    Optimizer([(OptimizerConfig(), [toy.early, toy.late])], 1).step([MicroBatch(WORK[1], loss)])
    assert alive == [0, 0, 0]


def test_long_response_is_still_tried_after_a_shorter_micro_batch_failed() -> None:
    failed = []

    def loss(part: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        if len(part.lengths_N) > 1:
            failed.append(part.tokens)
            raise MemoryError
        return (x * part.x_T).sum(), {}

    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    work = [numbers([2], [2]), numbers([50])]
    result = Optimizer([(OptimizerConfig(), [x])], 1).step([MicroBatch(p, loss) for p in work])
    assert (failed, result.splits) == ([6], 1)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")]
)
def test_other_errors_pass_through(error: Exception) -> None:
    assert not is_out_of_memory(error)

    def loss(part: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        raise error

    x = nn.Parameter(torch.tensor([1.0]))
    with pytest.raises(type(error), match=str(error)):
        Optimizer([(OptimizerConfig(), [x])], 1).step([MicroBatch(WORK[0], loss)])


def test_out_of_memory_in_the_optimizer_says_which_weights_may_have_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = Toy("forward", 1000, ERRORS[0])

    def fail(*arguments: Any) -> None:
        raise RuntimeError(CPU)

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(TrainingError, match=r"changed the weights at its step 0 .*last checkpoint"):
        toy.step(WORK)


def test_split_is_logged_once_for_each_smaller_size(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        Toy("forward", 6, ERRORS[0]).step(WORK)
    sizes = [record.args[0] for record in caplog.records if record.args]
    assert sizes == [16, 8]
    assert "Set tokens_per_micro_batch below 16" in caplog.records[0].getMessage()


REAL = """
import resource, torch
from torch import nn
from trivium.training.micro_batch import MicroBatch
from trivium.training.optimizer import Optimizer, OptimizerConfig
from trivium.data.batch import Group, Grouped

class Hungry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return n * x

    @staticmethod
    def backward(ctx, gradient):
        torch.ones(ctx.n << 25, dtype=torch.uint8)  # 32 MiB for each response
        return ctx.n * gradient, None

def loss(part):
    return Hungry.apply(x, len(part.lengths_N)).sum(), {}

x = nn.Parameter(torch.ones(1))
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (80 << 20), resource.RLIM_INFINITY))
work = [MicroBatch(Grouped([Group([1], [[1]] * n)]), loss) for n in (1, 8, 5)]
result = Optimizer([(OptimizerConfig(max_grad_norm=99.0), [x])], 1).step(work)
print(result.loss, float(x.grad), result.splits)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited as on Linux")
def test_real_out_of_memory_is_recognized() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", REAL], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    # Two responses fit: 8 are split into 4 times 2; 5 exceed the failed 4: 2 and 3, then 1 and 2.
    assert ran.stdout.split() == ["14.0", "14.0", "5"], ran.stderr


# --- without gradients --------------------------------------------------------------------------


def test_scores_of_split_parts_are_the_same() -> None:
    data = Grouped([Group([9], [[1, 2], [3]]), Group([8], [[4, 5, 6]]), Group([7], [[2], [9, 9]])])

    def score(batch: Batch) -> tuple[Tensor, Tensor]:
        if len(batch.lengths_N) > most:
            raise MemoryError
        values_T = batch.targets_T.double().sin()
        return values_T, batch.token_positions_T * 0 + values_T

    most = 9
    parts = [[1, 2, 4], [0, 3]]
    expected = score_all(data, parts, score)
    most = 1
    for mine, theirs in zip(score_all(data, parts, score), expected, strict=True):
        assert torch.equal(mine, theirs)
    most = 0
    with pytest.raises(TrainingError, match=r"prompt of 1 tokens with a response of [12] tokens"):
        score_all(data, parts, score)


def test_held_out_losses_of_split_parts_add_up() -> None:
    with torch.no_grad():
        expected = sum(float(Toy("forward", 99, ERRORS[0]).loss(part)[0]) for part in WORK)
    toy = Toy("forward", 6, ERRORS[0])
    found = list(measure([MicroBatch(part, toy.loss) for part in WORK]))
    assert sum(loss for loss, _ in found) == pytest.approx(expected, rel=1e-12)
    assert torch.cat([seen["x_T"] for _, seen in found]).equal(torch.cat([p.x_T for p in WORK]))


# --- training loops -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    # GPT-2 computes everything in float64; norms of other families compute in float32.
    return World(tmp_path_factory.mktemp("world"), "gpt2")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    return Captured(monkeypatch)


PAIRS = [
    {"prompt": "abc", "chosen": "de", "rejected": "efgh"},
    {"prompt": "b", "chosen": "fghij.a", "rejected": "f"},
    {"prompt": "aaaa", "chosen": "c", "rejected": "cd"},
]
STEPS = [
    {"prompt": "abc", "completions": ["de", "f", "ghi"], "labels": [1, 0.5, 0]},
    {"prompt": "b", "completions": ["f", "gg"], "labels": [0, 1]},
    {"prompt": "aaaa", "completions": ["c", "cccccc"], "labels": [1, 1]},
]


def run_sft(world: World) -> Path:
    data = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    return sft.train(
        sft.SFTConfig(
            model=model(world.path), data=world.rows("sft.jsonl", data), run=world.run(),
            validation=world.rows("sft.jsonl", data), optimizer=STILL,
        )
    )  # fmt: skip


def run_reward_model(world: World, **data: Any) -> Path:
    return reward_model.train(
        reward_model.RewardModelConfig(
            model=model(world.reward_model()), run=world.run(), optimizer=STILL,
            held_out_share=0.0, **data,
        )
    )  # fmt: skip


def run_dpo(world: World) -> Path:
    return dpo.train(
        dpo.DPOConfig(
            model=model(world.path), data=world.rows("pairs.jsonl", PAIRS), run=world.run(),
            optimizer=STILL, reference_cache=False,
        )
    )  # fmt: skip


def run_ppo(world: World) -> Path:
    critic = {"model": model(world.reward_model()), "optimizer": STILL}
    text = {"data": world.rows("text.jsonl", [{"prompt": "ab", "completion": "cd"}])}
    given = world.on_policy("letters", "pairs", model=model(world.path), beta=0.1)
    return ppo.train(
        ppo.PPOConfig(**given, critic=critic, steps=1, bootstrap_truncated=True, pretraining=text)
    )


def run_grpo(world: World) -> Path:
    given = world.on_policy("letters", "pairs", model=model(world.path), beta=0.1, epochs=2)
    return grpo.train(
        grpo.GRPOConfig(
            **given, steps_per_iteration=1, supervision="process", surrogate="gspo",
        )
    )  # fmt: skip


def model(path: str) -> dict[str, str]:
    return {"path": path, "dtype": "float64"}


METHODS = {
    "sft": run_sft,
    "pairs": lambda w: run_reward_model(w, pairs=w.rows("pairs.jsonl", PAIRS)),
    "steps": lambda w: run_reward_model(w, steps=w.rows("steps.jsonl", STEPS)),
    "dpo": run_dpo,
    "ppo": run_ppo,
    "grpo": run_grpo,
}


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Make forward passes of more tokens fail, and every second backward pass of a few fewer."""
    failed: list[int] = []

    def limited(backbone: Any, batch: Batch, index: Tensor, *, shared: bool) -> Tensor:
        tokens = len(batch.tokens_L)
        if tokens > most:
            failed.append(tokens)
            raise torch.OutOfMemoryError("CUDA out of memory")
        hidden = attend(backbone, batch, index, shared=shared)
        if not torch.is_grad_enabled():
            return hidden
        allowed = len(hidden) if tokens <= most - 5 else 0
        return Explode.apply(hidden, allowed, torch.OutOfMemoryError("CUDA out of memory"))

    attend = group_model.states_at
    monkeypatch.setattr(group_model, "states_at", limited)
    return failed


@pytest.mark.parametrize("method", METHODS)
def test_every_method_continues_with_the_same_gradient(
    world: World, captured: Captured, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole = METHODS[method](world)
    expected = captured.take()
    failed = limit_memory(monkeypatch, 19)
    halved = METHODS[method](world)
    assert failed
    assert_same_gradients(captured.take(), expected, atol=1e-12)
    before, after = metrics_of(whole), metrics_of(halved)
    for mine, theirs in zip(after, before, strict=True):
        assert mine.pop("memory/splits") >= 1
        for numbers in (mine, theirs):
            # Rounding decides which margins of 0 are positive, and which weights an update of the
            # size of a rounding error changes.
            numbers.pop("implicit_reward/accuracy", None)
            numbers.pop("weights/changed_share")
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_splitting_is_an_alarm_and_costs_no_model_flops(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trivium.runs.store import read_events, read_metrics

    whole = run_sft(world)
    assert limit_memory(monkeypatch, 24) == [], "the backward pass alone fails"
    halved = run_sft(world)
    alarms = [e for e in read_events(halved) if e["kind"] == "alarm"]
    assert [alarm["monitor"] for alarm in alarms] == ["out_of_memory"]
    assert "tokens_per_micro_batch" in alarms[0]["remedy"]
    assert read_metrics(halved)[0]["flops"] == read_metrics(whole)[0]["flops"]
    assert not [e for e in read_events(whole) if e["kind"] == "alarm"]
