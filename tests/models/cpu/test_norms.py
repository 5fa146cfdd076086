"""Replaced norms equal those of transformers: values and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    RAGGED,
    family,
    letters_tokenizer,
    plain_logprobs,
    random_groups,
    random_lm,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trivium.data.batch import Batch
from trivium.models.cpu.norms import norm_forward, replace_norms
from trivium.models.cpu.replace import is_replaced
from trivium.models.policy import Policy

REPLACED = ["llama", "qwen2", "qwen3", "mistral", "smollm3"]
pytestmark = pytest.mark.fast_path


class Plain(nn.Module):
    """Root-mean-square normalization by its definition."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.variance_epsilon = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


class PlainRMSNorm(Plain):
    """A name by which it is recognized."""


def values_and_gradients(module: nn.Module, x: Tensor, seed: int = 1) -> list[Tensor]:
    """Return the output for ``x``, and gradients by it and by all trained parameters."""
    leaf = x.detach().requires_grad_()
    out = module(leaf)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [leaf, *trained], gradient)]


def assert_close(found: list[Tensor], expected: list[Tensor], atol: float = 1e-12) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def replaced_norm(plain: nn.Module) -> nn.Module:
    fast = copy.deepcopy(plain)
    replace_norms(fast)
    assert is_replaced(fast, norm_forward)
    return fast


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 8), (3, 8), (1, 4, 2, 8), (1, 1, 8)])
def test_norm_and_its_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], frozen: bool
) -> None:
    plain = PlainRMSNorm(rows(8)).requires_grad_(not frozen)
    fast = replaced_norm(plain)
    x = rows(*shape)
    assert_close(values_and_gradients(fast, x), values_and_gradients(plain, x))


def test_norm_of_strided_rows_is_the_same() -> None:
    plain = PlainRMSNorm(rows(8))
    fast = replaced_norm(plain)
    x = rows(5, 3, 16)[:, :, ::2].transpose(0, 1)
    assert_close(values_and_gradients(fast, x), values_and_gradients(plain, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    plain = LlamaRMSNorm(64, 1e-6).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(1 + rows(64) / 5)
    fast = replaced_norm(plain)
    x = rows(1, 10, 64).to(dtype)
    one = torch.finfo(dtype).eps
    found, expected = values_and_gradients(fast, x), values_and_gradients(plain, x)
    assert float((found[0] == expected[0]).double().mean()) > (0.98 if one > 1e-3 else 0.5)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, atol=8 * one, rtol=8 * one)


def test_norm_that_transformers_computes_in_lower_precision_is_not_replaced() -> None:
    norm = LlamaRMSNorm(8).double()
    replace_norms(norm)
    assert not is_replaced(norm, norm_forward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_similar_module_with_another_result_is_not_replaced(dtype: torch.dtype) -> None:
    class ShiftedRMSNorm(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    module = ShiftedRMSNorm(rows(8)).to(dtype)
    replace_norms(module)
    assert "forward" not in vars(module)


def test_module_without_floating_point_weights_is_not_replaced() -> None:
    class BareRMSNorm(nn.Module):
        variance_epsilon = 1e-6

    module = BareRMSNorm()
    replace_norms(module)
    assert "forward" not in vars(module)


def kept(module: nn.Module, x: Tensor) -> int:
    """Return how many numbers autograd keeps for the backward pass, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda x: x):
        out = module(x.requires_grad_())
    assert out.requires_grad
    return sum(sizes.values())


def test_norms_keep_input_and_scale() -> None:
    assert kept(replaced_norm(PlainRMSNorm(rows(8))), rows(1, 6, 8)) == 6 * 8 + 6


@pytest.mark.parametrize("name", REPLACED)
def test_models_with_replaced_norms_are_saved_as_usual(name: str, tmp_path: Path) -> None:
    policy = Policy(random_lm(family(name)), letters_tokenizer())
    layer: Any = policy.backbone.layers[0]  # type: ignore[index]
    assert is_replaced(layer.input_layernorm, norm_forward)
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    groups = random_groups(50, *RAGGED)
    with torch.no_grad():
        found = policy.logprobs(Batch.of(groups))
    torch.testing.assert_close(found, plain_logprobs(plain, groups), atol=1e-5, rtol=0)
