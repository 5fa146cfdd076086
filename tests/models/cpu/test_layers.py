"""Norms and MLPs that keep less are what they stand in for, and leave out what no one reads."""

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
from trivium.models.cpu.layers import GatedMLP, RMSNorm, swap_norms_and_mlps
from trivium.models.cpu.linear import Linear, use_fast_linears
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel

EXCHANGED = ["llama", "qwen2", "qwen3", "mistral", "smollm3"]
pytestmark = pytest.mark.usefixtures("each_product")


class Plain(nn.Module):
    """Root-mean-square normalization, as its definition says."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.variance_epsilon = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


class PlainRMSNorm(Plain):
    """A name by which it is known to be one."""


def mlp(activation: str = "silu", *, bias: bool = True) -> LlamaMLP:
    torch.manual_seed(0)
    config = family("llama", hidden_act=activation, mlp_bias=bias)
    return LlamaMLP(config).double()  # type: ignore[arg-type]


def values_and_gradients(module: nn.Module, x: Tensor, seed: int = 1) -> list[Tensor]:
    """The output for ``x``, and gradients by it and by all parameters that learn."""
    leaf = x.detach().requires_grad_()
    out = module(leaf)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    learned = [p for p in module.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, [leaf, *learned], gradient)]


def assert_close(found: list[Tensor], expected: list[Tensor], atol: float = 1e-12) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(1, 5, 8), (3, 8), (1, 4, 2, 8), (1, 1, 8)])
def test_norm_and_its_gradients_are_those_of_the_definition(
    shape: tuple[int, ...], frozen: bool
) -> None:
    plain = PlainRMSNorm(rows(8)).requires_grad_(not frozen)
    lean = copy.deepcopy(plain)
    swap_norms_and_mlps(lean, lean)
    assert type(lean) is RMSNorm
    x = rows(*shape)
    assert_close(values_and_gradients(lean, x), values_and_gradients(plain, x))


def test_norm_of_rows_that_do_not_lie_end_to_end_is_the_same() -> None:
    plain = PlainRMSNorm(rows(8))
    lean = copy.deepcopy(plain)
    swap_norms_and_mlps(lean, lean)
    x = rows(5, 3, 16)[:, :, ::2].transpose(0, 1)
    assert_close(values_and_gradients(lean, x), values_and_gradients(plain, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rounds_where_transformers_does(dtype: torch.dtype) -> None:
    plain = LlamaRMSNorm(64, 1e-6).to(dtype)
    with torch.no_grad():
        plain.weight.copy_(1 + rows(64) / 5)
    lean = copy.deepcopy(plain)
    swap_norms_and_mlps(lean, lean)
    assert type(lean) is RMSNorm
    x = rows(1, 10, 64).to(dtype)
    one = torch.finfo(dtype).eps
    found, expected = values_and_gradients(lean, x), values_and_gradients(plain, x)
    assert float((found[0] == expected[0]).double().mean()) > (0.98 if one > 1e-3 else 0.5)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, atol=8 * one, rtol=8 * one)


def test_norm_that_transformers_computes_in_less_than_the_model_stays_as_it_is() -> None:
    norm = LlamaRMSNorm(8).double()
    swap_norms_and_mlps(norm, norm)
    assert type(norm) is LlamaRMSNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_module_that_looks_alike_but_computes_otherwise_stays_as_it_is(dtype: torch.dtype) -> None:
    class ShiftedRMSNorm(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    class HalfMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    half = HalfMLP(family("llama"))  # type: ignore[arg-type]
    for module in (ShiftedRMSNorm(rows(8)).to(dtype), half.to(dtype)):
        kind = type(module)
        swap_norms_and_mlps(module, module)
        assert type(module) is kind


def test_module_without_weights_or_with_weights_that_are_no_plain_numbers_stays_as_it_is() -> None:
    class BareRMSNorm(nn.Module):
        variance_epsilon = 1e-6

    class PackedMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called with numbers of a type that it does not take")

    packed = PackedMLP(family("llama"))  # type: ignore[arg-type]
    for projection in (packed.gate_proj, packed.up_proj, packed.down_proj):
        projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    for module in (BareRMSNorm(), packed):
        kind = type(module)
        swap_norms_and_mlps(module, module)
        assert type(module) is kind


# --- gated MLPs -----------------------------------------------------------------------------------


def exchanged(plain: nn.Module) -> nn.Module:
    lean = copy.deepcopy(plain)
    use_fast_linears(lean)
    swap_norms_and_mlps(lean, lean)
    assert type(lean) is GatedMLP
    return lean


@pytest.mark.parametrize("count", [1, 7, 200])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu", "linear"])
def test_mlp_and_its_gradients_are_those_of_the_plain_one(
    activation: str, bias: bool, count: int
) -> None:
    plain = mlp(activation, bias=bias)
    x = rows(1, count, 32)
    assert_close(values_and_gradients(exchanged(plain), x), values_and_gradients(plain, x))


def test_mlp_in_float32_is_the_plain_one_but_for_rounding() -> None:
    plain = mlp().float()
    x = rows(1, 300, 32).float()
    assert_close(values_and_gradients(exchanged(plain), x), values_and_gradients(plain, x), 1e-4)


def test_mlp_with_frozen_weights_passes_the_gradient_on() -> None:
    plain = mlp().requires_grad_(False)
    plain.up_proj.requires_grad_(True)
    x = rows(1, 5, 32)
    assert_close(values_and_gradients(exchanged(plain), x), values_and_gradients(plain, x))


def test_mlp_with_adapters_teaches_them_the_same() -> None:
    plain = mlp(bias=False)
    for name in ("gate_proj", "down_proj"):
        layer = peft.tuners.lora.Linear(getattr(plain, name), "default", peft.LoraConfig(), r=4)
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
        setattr(plain, name, layer.double())
    x = rows(1, 5, 32)
    assert_close(values_and_gradients(exchanged(plain), x), values_and_gradients(plain, x))


def test_mlp_under_autocast_is_left_to_torch() -> None:
    plain = mlp().float()
    x = rows(1, 5, 32).float()
    results = []
    for module in (exchanged(plain), plain):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        results.append([out, *torch.autograd.grad(out.float().sum(), list(module.parameters()))])
    assert_close(*results, 0)


def kept(module: nn.Module, x: Tensor) -> int:
    """Numbers that autograd keeps for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = module(x.requires_grad_())
    assert out.requires_grad
    return sum(sizes.values())


def test_backward_pass_is_left_input_and_scale_of_norms_and_two_products_of_mlps() -> None:
    norm = PlainRMSNorm(rows(8))
    swap_norms_and_mlps(norm, norm)
    assert kept(norm, rows(1, 6, 8)) == 6 * 8 + 6
    assert kept(exchanged(mlp()), rows(1, 6, 32)) == 6 * (32 + 2 * 64)


# --- models ---------------------------------------------------------------------------------------


def policy_of(name: str, dtype: str = "float32") -> Policy:
    return Policy(random_lm(family(name), dtype=dtype), letters_tokenizer())


@pytest.mark.parametrize("name", EXCHANGED)
def test_norms_and_mlps_of_known_families_are_exchanged_and_saved_as_they_were(
    name: str, tmp_path: Path
) -> None:
    policy = policy_of(name)
    layer: Any = policy.backbone.layers[0]  # type: ignore[index]
    assert type(layer.mlp) is GatedMLP and type(layer.input_layernorm) is RMSNorm
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    groups = random_groups(50, *RAGGED)
    with torch.no_grad():
        found = policy.logprobs(Batch.of(groups))
    torch.testing.assert_close(found, plain_logprobs(plain, groups), atol=1e-5, rtol=0)


def watch_rows(mlp: Any) -> list[int]:
    """How many rows an MLP computes, pass after pass."""
    counts: list[int] = []

    def note(activation: object, inputs: tuple[Tensor], output: Tensor) -> None:
        # What the backward pass computes again has gradients.
        if not torch.is_grad_enabled():
            counts.append(len(inputs[0]))

    mlp.act_fn.register_forward_hook(note)
    return counts


def watched_rows(policy: Policy) -> tuple[list[int], list[int]]:
    """Those of the first and the last layer's MLP."""
    layers: Any = policy.backbone.layers
    return watch_rows(layers[0].mlp), watch_rows(layers[-1].mlp)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_last_mlp_computes_what_is_read_once_and_gradients_are_the_same(
    checkpointing: bool,
) -> None:
    policy = policy_of("llama", "float64")
    if checkpointing:
        policy.model.activation_checkpointing_enable()
        policy.model.train()
    batch = Batch.of(random_groups(50, *RAGGED))
    learned = list(policy.model.parameters())

    def gradients(states: Tensor) -> list[Tensor | None]:
        weights = rows(*states.shape)
        loss = (states * weights).sum()
        return list(torch.autograd.grad(loss, learned, allow_unused=True))

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


def test_last_mlp_computes_all_where_most_is_read() -> None:
    policy = policy_of("llama", "float64")
    batch = Batch.of(random_groups(50, [10], [[10]]))
    whole = hidden_states(policy.backbone, batch)
    _, last = watched_rows(policy)
    for most, count in ((16, 16), (17, 20)):
        at = torch.arange(most)
        found = states_at(policy.backbone, batch, at)
        torch.testing.assert_close(found, whole[at], atol=1e-12, rtol=0)
        assert last.pop() == count


def test_passes_that_read_everything_compute_everything() -> None:
    policy = policy_of("llama")
    batch = Batch.of(random_groups(50, *RAGGED))
    _, last = watched_rows(policy)
    policy.logprobs(batch)
    hidden_states(policy.backbone, batch)
    assert last == [len(set(batch.logit_positions_T.tolist())), len(batch.tokens_L)]


def test_reward_model_reads_ends_alone() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(family("llama", num_labels=1))
    scorer = RewardModel(model, letters_tokenizer())
    batch = Batch.of(random_groups(50, *RAGGED))
    counts = watch_rows(model.base_model.layers[-1].mlp)
    scores = scorer.scores_at(batch, batch.last_tokens_N)
    assert counts == [len(batch.lengths_N)]
    states = hidden_states(model.base_model, batch)[batch.last_tokens_N]
    torch.testing.assert_close(scores, model.score(states)[:, 0], atol=1e-6, rtol=0)


def test_exchanged_modules_use_the_fast_linears_that_were_there_before() -> None:
    policy = policy_of("llama")
    layer: Any = policy.backbone.layers[0]  # type: ignore[index]
    assert type(layer.mlp.down_proj) is Linear
