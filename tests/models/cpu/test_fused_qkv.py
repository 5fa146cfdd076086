"""The fused QKV projection equals transformers: values and gradients."""

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
from transformers import AutoModelForCausalLM, LlamaConfig, Ministral3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from trivium.data.batch import Batch
from trivium.models.cpu import accelerate_for_cpu, fused_qkv, rotary
from trivium.models.cpu.fused_qkv import _FusedQKV, is_known
from trivium.models.cpu.replace import restore_forward
from trivium.models.cpu.rotary import FIXED, RotaryEmbedding, RotaryTable, interleave_pairs
from trivium.models.layout import AttentionSpec
from trivium.models.policy import Policy

FUSED = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral"]
OTHERS = ["gemma", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite", "cohere", "gpt2"]
pytestmark = [pytest.mark.fast_path, pytest.mark.usefixtures("each_product")]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy_of(name: str, dtype: str = "float64", **options: Any) -> Policy:
    """Return a policy whose biases and norms are not zero or one."""
    model = random_lm(family(name, **options), dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter += random_tensor(len(parameter), seed=i).to(parameter) / 3
    return Policy(model, letters_tokenizer())


def layers_of(policy: Policy) -> list[Any]:
    return [layer.self_attn for layer in policy.backbone.layers]  # type: ignore[union-attr]


def as_in_transformers(policy: Policy) -> Policy:
    """Return a copy of the policy whose attention layers compute as in transformers."""
    other = copy.deepcopy(policy)
    for layer in layers_of(other):
        assert is_fused(layer)
        restore_forward(layer)
    return other


def is_fused(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


def values_and_gradients(policy: Policy) -> list[Tensor]:
    scores = policy.score(Batch.of(random_groups(50, *RAGGED)))
    weight_T = random_tensor(len(scores.logprobs_T), seed=1).to(scores.logprobs_T)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    loss = (weight_T * scores.logprobs_T).sum()
    return [scores.logprobs_T.detach(), *torch.autograd.grad(loss, trained)]


def assert_same(policy: Policy, atol: float = 1e-12) -> None:
    found, expected = (
        values_and_gradients(policy),
        values_and_gradients(as_in_transformers(policy)),
    )
    assert any(bool(x.any()) for x in expected[1:])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


# --- projections --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients_equal_transformers(name: str) -> None:
    assert_same(policy_of(name))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_float32_equals_transformers_up_to_rounding(name: str) -> None:
    wide = policy_of(name, "float32", hidden_size=256, head_dim=64, num_key_value_heads=2)
    assert_same(wide, 1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_known_families_use_the_fused_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = policy_of(name, "float32"), list[object]()
    apply = _FusedQKV.apply
    monkeypatch.setattr(_FusedQKV, "apply", lambda *args: calls.append(1) or apply(*args))
    values_and_gradients(policy)
    assert len(calls) == len(layers_of(policy))


def test_gradients_with_frozen_weights_equal_transformers() -> None:
    mlp = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    for kept in ("k_proj.weight", "v_proj.bias", *mlp):
        policy = policy_of("qwen2")
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(name.endswith(kept))
        assert_same(policy)


def test_layers_with_some_biases_equal_transformers() -> None:
    policy = policy_of("qwen2")
    for layer in layers_of(policy):
        layer.k_proj.bias = None
    assert_same(policy)


def test_gradient_checkpointing_changes_nothing() -> None:
    policy = policy_of("llama")
    expected = values_and_gradients(policy)
    policy.model.activation_checkpointing_enable()
    policy.model.train()
    for mine, theirs in zip(values_and_gradients(policy), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_gradients_of_adapters_equal_transformers() -> None:
    policy = policy_of("llama")
    for layer in layers_of(policy):
        adapted = peft.tuners.lora.Linear(layer.v_proj, "default", peft.LoraConfig(), r=4)
        nn.init.normal_(adapted.lora_B["default"].weight, std=0.1)
        layer.v_proj = adapted.double()
    assert_same(policy)


class ReturnsQueries:
    """A layout whose attention returns the queries."""

    output_positions = None

    def attend(self, layer: int, query_LHD: Tensor, *args: Tensor, spec: AttentionSpec) -> Tensor:
        return query_LHD.contiguous()


def test_autocast_uses_transformers() -> None:
    policy = policy_of("llama", "float32")
    x, turns = (
        random_tensor(1, 5, 32).float(),
        (random_tensor(1, 5, 8).float(), random_tensor(1, 5, 8, seed=1).float()),
    )
    found = []
    for layer in (layers_of(policy)[0], layers_of(as_in_transformers(policy))[0]):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(layer(x, turns, attention_mask=None, layout=ReturnsQueries())[0])
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)


def test_other_devices_use_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers_of(policy_of("llama", "float32"))[0].to("meta")
    called: list[Tensor] = []
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, x, *a, **k: called.append(x))
    x, turns = torch.empty(1, 5, 32, device="meta"), torch.empty(1, 5, 8, device="meta")
    layer(x, (turns, turns), layout=ReturnsQueries())
    assert called == [x]


def test_queries_keys_and_values_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("qwen2")
    calls: list[tuple[int, ...]] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(tuple(weight.shape))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(fused_qkv, "linear", recorded)
    policy.logprobs(Batch.of(random_groups(50, *RAGGED)))
    assert calls == [(32 + 16 + 16, 32)] * 2


def test_models_with_fused_layers_are_saved_as_usual(tmp_path: Path) -> None:
    policy = policy_of("qwen2", "float32")
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    groups = random_groups(50, *RAGGED)
    with torch.no_grad():
        found = policy.logprobs(Batch.of(groups))
    torch.testing.assert_close(found, plain_logprobs(plain, groups), atol=1e-5, rtol=0)


# --- which layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_classes_are_not_replaced(name: str) -> None:
    policy = Policy(random_lm(family(name)), letters_tokenizer())
    attentions = [m for m in policy.model.modules() if type(m).__name__.endswith("Attention")]
    assert attentions and not any(is_fused(layer) for layer in attentions)


def test_family_that_scales_queries_at_far_positions_uses_its_own_forward_pass() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 5.0}
    config = Ministral3Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        sliding_window=None,
        rope_parameters=rope | {"original_max_position_embeddings": 16},
        bos_token_id=None,
        eos_token_id=0,
    )
    model = random_lm(config)
    policy = Policy(model, letters_tokenizer())
    groups = random_groups(50, [30], [[12, 5]])
    with torch.no_grad():
        found = policy.logprobs(Batch.of(groups))
    assert not is_fused(layers_of(policy)[0]) and policy._decoder is None
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, plain_logprobs(model, groups), atol=1e-5, rtol=0)


class HalvedAttention(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out / 2, weights


def halved_attention(module: str) -> type[nn.Module]:
    """Return a class named like a known one, with another result."""
    return type("LlamaAttention", (HalvedAttention,), {"__module__": module})


def test_class_derived_from_a_known_class_or_named_like_one_is_not_known() -> None:
    config: Any = family("llama")
    assert is_known(LlamaAttention(config, 0))
    assert not is_known(HalvedAttention(config, 0))
    assert not is_known(halved_attention(__name__)(config, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_layer_is_replaced_if_one_computes_something_else(dtype: str) -> None:
    model = random_lm(family("llama"), dtype=dtype)
    halved = halved_attention(LlamaAttention.__module__)
    model.model.layers[1].self_attn.__class__ = halved  # type: ignore[index,union-attr]
    policy = Policy(model, letters_tokenizer())
    assert not any(is_fused(layer) for layer in layers_of(policy))


def test_accelerating_twice_changes_nothing() -> None:
    policy = policy_of("llama")
    before = [vars(module).get("forward") for module in policy.model.modules()]
    accelerate_for_cpu(policy.model)
    assert [vars(module).get("forward") for module in policy.model.modules()] == before


# --- rotations ----------------------------------------------------------------------------------


def test_coordinates_of_a_plane_are_adjacent_in_rotated_heads() -> None:
    assert interleave_pairs(6, 2, 1).tolist() == [
        *(0, 3, 1, 4, 2, 5),
        *(6, 9, 7, 10, 8, 11),
        *(12, 13, 14, 15, 16, 17),
    ]


def test_rotation_equals_its_definition_and_its_transpose_is_adjoint() -> None:
    angle, x, y = (random_tensor(*s, seed=i) for i, s in enumerate([(5, 3), (5, 2, 6), (5, 2, 6)]))
    cos, sin = (2 * torch.cat([f(angle)] * 2, 1) for f in (torch.cos, torch.sin))
    rotation, order = RotaryEmbedding.of(cos, sin), interleave_pairs(6)
    expected = torch.empty_like(x)
    for i in range(6):
        other = x[:, :, (i + 3) % 6] * (-1 if i < 3 else 1)
        expected[:, :, i] = x[:, :, i] * cos[:, None, i] + other * sin[:, None, i]
    x, expected = x[..., order], expected[..., order]
    torch.testing.assert_close(rotation(x), expected, atol=1e-14, rtol=0)
    there, back = (rotation(x) * y).sum(), (x * rotation.transposed()(y)).sum()
    torch.testing.assert_close(there, back, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_heads_are_rotated_in_place_in_every_type(dtype: torch.dtype) -> None:
    cos, sin = (
        torch.cat([f(random_tensor(5, 3))] * 2, 1).to(dtype) for f in (torch.cos, torch.sin)
    )
    rotation, heads_LHW = RotaryEmbedding.of(cos, sin), random_tensor(5, 4, 6, seed=1).to(dtype)
    before, part = heads_LHW.clone(), heads_LHW.narrow(1, 1, 2)
    exact = RotaryEmbedding.of(cos.double(), sin.double())(part.double())
    rotation.rotate_(part)
    assert torch.equal(part, rotation(before[:, 1:3])) and part.dtype == dtype
    one = torch.finfo(dtype).eps
    torch.testing.assert_close(part.double(), exact, atol=4 * one, rtol=4 * one)
    assert torch.equal(heads_LHW[:, ::3], before[:, ::3])


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotations_equal_the_backbones_at_every_position(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    if kind != "default":
        rope["original_max_position_embeddings"] = 32
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=128, rope_parameters=rope
    )
    theirs, mine = LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(config)
    computed: list[int] = []
    mine.register_forward_hook(lambda m, inputs, out: computed.append(inputs[1].numel()))
    rotations, x = RotaryTable(mine), torch.zeros(3, 32)
    for at in ([0, 1, 2], [5, 5, 258], [259, 0, 7], [7, 298, 299]):
        position_L = torch.tensor(at)
        cos, sin = theirs(x[None], position_L[None])
        found, expected = rotations(position_L, max(at) + 1, x), RotaryEmbedding.of(cos[0], sin[0])
        assert torch.equal(found.factor_L1P, expected.factor_L1P)
    margin = rotary.TABLE_MARGIN
    assert computed == ([3 + margin, 260 + margin] if kind in FIXED else [3, 3, 3, 3])
