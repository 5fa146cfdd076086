"""Replaced norms and MLPs equal the modules of transformers: values and gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from trivium.data.batch import Batch
from trivium.models.attention import hidden_states, states_at
from trivium.models.cpu.gated_mlp import gated_forward, is_gated, replace_gated_mlps
from trivium.models.cpu.linear import linear_forward, replace_linears
from trivium.models.cpu.norms import is_rms_norm, replace_norms
from trivium.models.cpu.replace import is_replaced
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel

REPLACED = ["llama", "qwen2", "qwen3", "mistral", "smollm3"]
pytestmark = [pytest.mark.fast_path, pytest.mark.usefixtures("each_product")]


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


def mlp(activation: str = "silu", *, bias: bool = True) -> LlamaMLP:
    torch.manual_seed(0)
    config = family("llama", hidden_act=activation, mlp_bias=bias)
    return LlamaMLP(config).double()  # type: ignore[arg-type]


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
    assert is_rms_norm(fast)
    return fast


# --- norms ----------------------------------------------------------------------------------------


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
    assert not is_rms_norm(norm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_similar_module_with_another_result_is_not_replaced(dtype: torch.dtype) -> None:
    class ShiftedRMSNorm(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    class HalfMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    half = HalfMLP(family("llama"))  # type: ignore[arg-type]
    for module in (ShiftedRMSNorm(rows(8)).to(dtype), half.to(dtype)):
        replace_norms(module)
        replace_gated_mlps(module)
        assert "forward" not in vars(module)


def test_module_without_floating_point_weights_is_not_replaced() -> None:
    class BareRMSNorm(nn.Module):
        variance_epsilon = 1e-6

    class PackedMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called with an unsupported type")

    packed = PackedMLP(family("llama"))  # type: ignore[arg-type]
    for projection in (packed.gate_proj, packed.up_proj, packed.down_proj):
        projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    for module in (BareRMSNorm(), packed):
        replace_norms(module)
        replace_gated_mlps(module)
        assert "forward" not in vars(module)


# --- gated MLPs -----------------------------------------------------------------------------------


def replaced_mlp(plain: nn.Module) -> nn.Module:
    fast = copy.deepcopy(plain)
    replace_linears(fast)
    replace_gated_mlps(fast)
    assert is_replaced(fast, gated_forward)
    return fast


@pytest.mark.parametrize("count", [1, 7, 200])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu", "linear"])
def test_mlp_and_its_gradients_equal_transformers(activation: str, bias: bool, count: int) -> None:
    plain = mlp(activation, bias=bias)
    x = rows(1, count, 32)
    assert_close(values_and_gradients(replaced_mlp(plain), x), values_and_gradients(plain, x))


def test_mlp_in_float32_equals_transformers_up_to_rounding() -> None:
    plain = mlp().float()
    x = rows(1, 300, 32).float()
    assert_close(values_and_gradients(replaced_mlp(plain), x), values_and_gradients(plain, x), 1e-4)


def test_mlp_with_frozen_weights_has_the_same_gradients() -> None:
    plain = mlp().requires_grad_(False)
    plain.up_proj.requires_grad_(True)
    x = rows(1, 5, 32)
    assert_close(values_and_gradients(replaced_mlp(plain), x), values_and_gradients(plain, x))


def test_mlp_with_adapters_has_the_same_gradients() -> None:
    plain = mlp(bias=False)
    for name in ("gate_proj", "down_proj"):
        layer = peft.tuners.lora.Linear(getattr(plain, name), "default", peft.LoraConfig(), r=4)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        setattr(plain, name, layer.double())
    x = rows(1, 5, 32)
    assert_close(values_and_gradients(replaced_mlp(plain), x), values_and_gradients(plain, x))


def test_mlp_under_autocast_uses_torch() -> None:
    plain = mlp().float()
    x = rows(1, 5, 32).float()
    results = []
    for module in (replaced_mlp(plain), plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        results.append([out, *torch.autograd.grad(out.float().sum(), list(module.parameters()))])
    assert_close(*results, 0)


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


def test_norms_keep_input_and_scale_and_mlps_keep_input_and_two_products() -> None:
    assert kept(replaced_norm(PlainRMSNorm(rows(8))), rows(1, 6, 8)) == 6 * 8 + 6
    assert kept(replaced_mlp(mlp()), rows(1, 6, 32)) == 6 * (32 + 2 * 64)


# --- models ---------------------------------------------------------------------------------------


def policy_of(name: str, dtype: str = "float32") -> Policy:
    return Policy(random_lm(family(name), dtype=dtype), letters_tokenizer())


@pytest.mark.parametrize("name", REPLACED)
def test_models_with_replaced_norms_and_mlps_are_saved_as_usual(name: str, tmp_path: Path) -> None:
    policy = policy_of(name)
    layer: Any = policy.backbone.layers[0]  # type: ignore[index]
    assert is_gated(layer.mlp) and "forward" in vars(layer.mlp)
    assert is_rms_norm(layer.input_layernorm)
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    groups = random_groups(50, *RAGGED)
    with torch.no_grad():
        found = policy.logprobs(Batch.of(groups))
    torch.testing.assert_close(found, plain_logprobs(plain, groups), atol=1e-5, rtol=0)


def watch_rows(mlp: Any) -> list[int]:
    """Record how many rows an MLP computes in each forward pass."""
    counts: list[int] = []

    def record(activation: object, inputs: tuple[Tensor], output: Tensor) -> None:
        # The backward pass recomputes the activation with gradients.
        if not torch.is_grad_enabled():
            counts.append(len(inputs[0]))

    mlp.act_fn.register_forward_hook(record)
    return counts


def watched_rows(policy: Policy) -> tuple[list[int], list[int]]:
    """Record the rows of the first and the last layer's MLP."""
    layers: Any = policy.backbone.layers
    return watch_rows(layers[0].mlp), watch_rows(layers[-1].mlp)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_last_mlp_computes_output_positions_with_the_same_gradients(
    checkpointing: bool,
) -> None:
    policy = policy_of("llama", "float64")
    if checkpointing:
        policy.model.activation_checkpointing_enable()
        policy.model.train()
    batch = Batch.of(random_groups(50, *RAGGED))
    trained = list(policy.model.parameters())

    def gradients(states: Tensor) -> list[Tensor | None]:
        weights = rows(*states.shape)
        loss = (states * weights).sum()
        return list(torch.autograd.grad(loss, trained, allow_unused=True))

    at = batch.logit_positions_T
    whole = hidden_states(policy.backbone, batch)[at]
    expected = [whole.detach(), *gradients(whole)]
    first, last = watched_rows(policy)
    part = states_at(policy.backbone, batch, at)
    found = [part.detach(), *gradients(part)]
    passes = 2 if checkpointing else 1
    assert first == [len(batch.tokens_L)] * passes
    assert last == [len(set(at.tolist()))] * passes
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_last_mlp_computes_all_if_most_positions_are_output() -> None:
    policy = policy_of("llama", "float64")
    batch = Batch.of(random_groups(50, [10], [[10]]))
    whole = hidden_states(policy.backbone, batch)
    _, last = watched_rows(policy)
    for most, count in ((16, 16), (17, 20)):
        at = torch.arange(most)
        found = states_at(policy.backbone, batch, at)
        torch.testing.assert_close(found, whole[at], atol=1e-12, rtol=0)
        assert last.pop() == count


def test_last_mlp_computes_all_without_output_positions() -> None:
    policy = policy_of("llama")
    batch = Batch.of(random_groups(50, *RAGGED))
    _, last = watched_rows(policy)
    policy.logprobs(batch)
    hidden_states(policy.backbone, batch)
    assert last == [len(set(batch.logit_positions_T.tolist())), len(batch.tokens_L)]


def test_reward_model_computes_last_tokens_in_the_last_mlp() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(family("llama", num_labels=1))
    scorer = RewardModel(model, letters_tokenizer())
    batch = Batch.of(random_groups(50, *RAGGED))
    counts = watch_rows(model.base_model.layers[-1].mlp)
    scores = scorer.scores_at(batch, batch.last_tokens_N)
    assert counts == [len(batch.lengths_N)]
    states = hidden_states(model.base_model, batch)[batch.last_tokens_N]
    torch.testing.assert_close(scores, model.score(states)[:, 0], atol=1e-6, rtol=0)


def test_projections_outside_of_the_fused_functions_use_the_faster_product() -> None:
    policy = policy_of("llama")
    layer: Any = policy.backbone.layers[0]  # type: ignore[index]
    assert is_replaced(layer.mlp.down_proj, linear_forward)
