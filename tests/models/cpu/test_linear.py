"""The faster matrix product equals PyTorch's, and meets few row counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tiny_models import family, letters_tokenizer, random_groups, random_lm
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.data.batch import Batch
from trivium.models import flops
from trivium.models.cpu import CpuKernels
from trivium.models.cpu import linear as linear_module
from trivium.models.cpu.linear import (
    linear,
    linear_forward,
    matmul_backend,
    pad_rows,
    replace_linears,
)
from trivium.models.logprobs import Head, token_logprobs
from trivium.models.policy import Policy

pytestmark = pytest.mark.fast_path


@pytest.fixture(autouse=True)
def onednn() -> Iterator[None]:
    """Use oneDNN, whichever product is faster here."""
    before = matmul_backend.name
    matmul_backend.use("onednn")
    yield
    matmul_backend.use(before)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [16, 40])
@pytest.mark.parametrize("shape", [(300, 24), (2, 200, 24), (1, 24), (0, 24)])
def test_linear_and_its_gradients_equal_torch(
    shape: tuple[int, ...], width: int, bias: bool
) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, width, bias=bias), torch.randn(shape, requires_grad=True)
    found, expected = linear(x, layer.weight, layer.bias), layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    gradient = torch.randn(expected.shape)
    leaves = [x, *layer.parameters()]
    mine = torch.autograd.grad(found, leaves, gradient)
    theirs = torch.autograd.grad(expected, leaves, gradient)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_frozen_weight_gets_no_gradient_and_its_input_does() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).requires_grad_(False)
    x = torch.randn(200, 24, requires_grad=True)
    linear(x, layer.weight, layer.bias).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(200, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_use_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_uses_torch() -> None:
    x, weight = torch.randn(300, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_all_linear_layers_of_a_model_are_replaced_and_keep_class_and_names() -> None:
    model = random_lm(family("llama"))
    names = set(model.state_dict())
    replace_linears(model)
    layers = [x for x in model.modules() if isinstance(x, nn.Linear)]
    assert all(type(x) is nn.Linear for x in layers)
    assert all(vars(x)["forward"].__func__ is linear_forward for x in layers)
    assert layers and set(model.state_dict()) == names


def test_backend_is_measured_and_can_be_set() -> None:
    fresh = type(matmul_backend)()
    assert fresh.name in ("torch", "onednn")
    fresh.use("torch")
    assert not fresh.supports(1000, torch.ones(1))
    fresh.use("onednn")
    assert fresh.supports(1000, torch.ones(1))


@pytest.mark.parametrize(
    ("seconds", "name"), [([3.0, 1.0], "onednn"), ([1.0, 1.0], "torch"), ([1.0, 3.0], "torch")]
)
def test_onednn_is_used_if_it_is_clearly_faster(
    seconds: list[float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_seconds", lambda *works: seconds)
    assert linear_module._faster() == name


def test_measurements_alternate() -> None:
    done: list[str] = []
    seconds = linear_module._seconds(lambda: done.append("a"), lambda: done.append("b"))
    assert len(seconds) == 2 and done == ["a", "b"] * linear_module.NUM_PROBES


def test_padding_is_small_and_leads_to_few_row_counts() -> None:
    for octave in range(7, 13):
        met = set()
        for rows in range(1 << octave, 2 << octave):
            padded = len(pad_rows(torch.empty(rows, 1)))
            assert 0 <= padded - rows < max(16, rows / 32)
            met.add(padded)
        assert len(met) <= 33


def test_padding_is_zeros() -> None:
    x_LD = torch.ones(131, 2)
    padded = pad_rows(x_LD)
    assert torch.equal(padded[:131], x_LD) and not padded[131:].any()


def scores_and_gradients(policy: Policy, batch: Batch) -> tuple[list[Tensor], float]:
    """Return log-probs, entropies, their gradients by all weights, and the FLOPs."""
    with flops.apart() as counted:
        scores = policy.score(batch)
        generator = torch.Generator().manual_seed(0)
        by_logprobs, by_entropy = torch.rand(2, len(scores.logprobs_T), generator=generator)
        loss = (by_logprobs * scores.logprobs_T - by_entropy * scores.entropy_T).mean()
        gradients = torch.autograd.grad(loss, list(policy.model.parameters()))
    found = [scores.logprobs_T.detach(), scores.entropy_T.detach(), *gradients]
    return found, counted.flops


def wide_policy(name: str, dtype: str = "float32") -> Policy:
    options = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 1024}
    return Policy(random_lm(family(name, 200, **options), dtype=dtype), letters_tokenizer())


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
@pytest.mark.parametrize("prompt", [96, 5])
def test_padded_batches_give_the_same_gradients(name: str, prompt: int) -> None:
    policy = wide_policy(name)
    batch = Batch.of(random_groups(200, [prompt, 3], [[100, 113], [2]]))
    found, cost = scores_and_gradients(policy, batch)
    matmul_backend.use("torch")
    expected, plain_cost = scores_and_gradients(policy, batch)
    assert cost == plain_cost
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-3)


def test_padding_adds_nothing_to_the_gradients_of_a_head_with_bias() -> None:
    torch.manual_seed(0)
    shapes = (131, 128), (200, 128), (200,)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    targets_T = torch.randint(200, (131,))
    found = []
    for name in ("onednn", "torch"):
        matmul_backend.use(name)
        head = Head(*leaves[1:], kernels=CpuKernels(last_layer=1))
        chosen_T, entropy_T = token_logprobs(leaves[0], head, targets_T)
        assert entropy_T is not None
        loss = (chosen_T * torch.arange(131)).mean() + entropy_T.mean()
        found.append(torch.autograd.grad(loss, leaves))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


def test_batches_of_similar_lengths_use_the_same_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, onednn = wide_policy("llama"), linear_module.onednn_linear
    met: set[tuple[torch.Size, torch.Size]] = set()

    def recorded(a_LD: Tensor, b_ED: Tensor, *others: Any) -> Tensor:
        met.add((a_LD.shape, b_ED.shape))
        return onednn(a_LD, b_ED, *others)

    monkeypatch.setattr(linear_module, "onednn_linear", recorded)
    scores_and_gradients(policy, Batch.of(random_groups(200, [96], [[209]])))
    first = set(met)
    for length in range(210, 225):
        scores_and_gradients(policy, Batch.of(random_groups(200, [96], [[length]])))
    assert met == first
    # Tokens, response tokens, and widths of layers in products of weight gradients.
    assert {rows for (rows, _), _ in met} == {320, 224, 128, 64}
