"""Queries, keys and values as one product are what transformers computes, and its gradients too."""

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
from trivium.models.attention import AttentionSpec
from trivium.models.cpu import heads, rotary
from trivium.models.cpu.heads import JoinedHeads, _Heads, is_known, use_joined_heads
from trivium.models.cpu.rotary import FIXED, RotaryEmbedding, RotaryTable, interleave_pairs
from trivium.models.policy import Policy

JOINED = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral"]
NOT_JOINED = ["gemma", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite", "cohere", "gpt2"]
pytestmark = pytest.mark.usefixtures("each_product")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def policy_of(name: str, dtype: str = "float64", **options: Any) -> Policy:
    """With weights of all sizes, biases and norms that are not what they begin as."""
    model = random_lm(family(name, **options), dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter += drawn(len(parameter), seed=i).to(parameter) / 3
    return Policy(model, letters_tokenizer())


def layers_of(policy: Policy) -> list[Any]:
    return [layer.self_attn for layer in policy.backbone.layers]  # type: ignore[union-attr]


def as_transformers_does(policy: Policy) -> Policy:
    """A copy of the policy whose attention layers are those of transformers."""
    other = copy.deepcopy(policy)
    for layer in layers_of(other):
        assert isinstance(layer, JoinedHeads)
        layer.__class__ = type(layer).__mro__[2]
    return other


def values_and_gradients(policy: Policy) -> list[Tensor]:
    scores = policy.score(Batch.of(random_groups(50, *RAGGED)))
    weight_T = drawn(len(scores.logprobs_T), seed=1).to(scores.logprobs_T)
    learned = [p for p in policy.model.parameters() if p.requires_grad]
    loss = (weight_T * scores.logprobs_T).sum()
    return [scores.logprobs_T.detach(), *torch.autograd.grad(loss, learned)]


def assert_same(policy: Policy, atol: float = 1e-12) -> None:
    found, expected = (
        values_and_gradients(policy),
        values_and_gradients(as_transformers_does(policy)),
    )
    assert any(bool(x.any()) for x in expected[1:])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


# --- heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOINED)
def test_values_and_gradients_are_those_of_transformers(name: str) -> None:
    assert_same(policy_of(name))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_float32_differs_by_rounding_alone(name: str) -> None:
    wide = policy_of(name, "float32", hidden_size=256, head_dim=64, num_key_value_heads=2)
    assert_same(wide, 1e-4)


@pytest.mark.parametrize("name", JOINED)
def test_known_families_compute_heads_as_one_product(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, calls = policy_of(name, "float32"), list[object]()
    apply = _Heads.apply
    monkeypatch.setattr(_Heads, "apply", lambda *given: calls.append(1) or apply(*given))
    values_and_gradients(policy)
    assert len(calls) == len(layers_of(policy))


def test_frozen_weights_get_no_gradient_and_pass_it_on() -> None:
    mlp = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    for kept in ("k_proj.weight", "v_proj.bias", *mlp):
        policy = policy_of("qwen2")
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(name.endswith(kept))
        assert_same(policy)


def test_layers_of_which_some_have_a_bias_keep_their_own() -> None:
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


def test_adapters_learn_what_they_do_in_transformers() -> None:
    policy = policy_of("llama")
    for layer in layers_of(policy):
        adapted = peft.tuners.lora.Linear(layer.v_proj, "default", peft.LoraConfig(), r=4)
        nn.init.normal_(adapted.lora_B["default"].weight, std=0.1)
        layer.v_proj = adapted.double()
    assert_same(policy)


class ReturnsQueries:
    """A layout in which tokens attend to nothing."""

    read = None

    def attend(self, layer: int, query_LHD: Tensor, *args: Tensor, spec: AttentionSpec) -> Tensor:
        return query_LHD.contiguous()


def test_autocast_is_left_to_torch() -> None:
    policy = policy_of("llama", "float32")
    x, turns = drawn(1, 5, 32).float(), (drawn(1, 5, 8).float(), drawn(1, 5, 8, seed=1).float())
    found = []
    for layer in (layers_of(policy)[0], layers_of(as_transformers_does(policy))[0]):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(layer(x, turns, attention_mask=None, layout=ReturnsQueries())[0])
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)


def test_other_devices_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layers_of(policy_of("llama", "float32"))[0].to("meta")
    called: list[Tensor] = []
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, x, *a, **k: called.append(x))
    x, turns = torch.empty(1, 5, 32, device="meta"), torch.empty(1, 5, 8, device="meta")
    layer(x, (turns, turns), layout=ReturnsQueries())
    assert called == [x]


def test_one_function_makes_queries_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("qwen2")
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(tuple(weight.shape))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(heads, "linear", counted)
    policy.logprobs(Batch.of(random_groups(50, *RAGGED)))
    assert calls == [(32 + 16 + 16, 32)] * 2


def test_exchanged_layers_are_saved_as_they_were(tmp_path: Path) -> None:
    policy = policy_of("qwen2", "float32")
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    groups = random_groups(50, *RAGGED)
    with torch.no_grad():
        found = policy.logprobs(Batch.of(groups))
    torch.testing.assert_close(found, plain_logprobs(plain, groups), atol=1e-5, rtol=0)


# --- which layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NOT_JOINED)
def test_layers_of_classes_that_were_not_read_stay_as_they_are(name: str) -> None:
    policy = Policy(random_lm(family(name)), letters_tokenizer())
    assert not any(isinstance(module, JoinedHeads) for module in policy.model.modules())


def test_family_that_scales_queries_far_from_the_start_keeps_its_own_passes() -> None:
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
    assert not isinstance(layers_of(policy)[0], JoinedHeads)
    assert policy._decode_specs is None
    model.set_attn_implementation("eager")
    torch.testing.assert_close(found, plain_logprobs(model, groups), atol=1e-5, rtol=0)


class HalvedAttention(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out / 2, weights


def halved_attention(module: str) -> type[nn.Module]:
    """A class by the name of one that was read, which computes otherwise."""
    return type("LlamaAttention", (HalvedAttention,), {"__module__": module})


def test_layer_derived_from_a_known_class_or_named_like_one_is_not_known() -> None:
    config: Any = family("llama")
    assert is_known(LlamaAttention(config, 0))
    assert not is_known(HalvedAttention(config, 0))
    assert not is_known(halved_attention(__name__)(config, 0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_layers_stay_as_they_are_where_one_computes_otherwise(dtype: str) -> None:
    model = random_lm(family("llama"), dtype=dtype)
    halved = halved_attention(LlamaAttention.__module__)
    model.model.layers[1].self_attn.__class__ = halved  # type: ignore[index,union-attr]
    policy = Policy(model, letters_tokenizer())
    assert [type(layer) for layer in layers_of(policy)] == [LlamaAttention, halved]


def test_exchanging_twice_is_exchanging_once() -> None:
    policy = policy_of("llama")
    before = [type(layer) for layer in layers_of(policy)]
    use_joined_heads(policy.backbone)
    assert [type(layer) for layer in layers_of(policy)] == before


# --- rotations ----------------------------------------------------------------------------------


def test_coordinates_of_a_plane_lie_beside_each_other_in_heads_that_are_turned() -> None:
    assert interleave_pairs(6, 2, 1).tolist() == [
        *(0, 3, 1, 4, 2, 5),
        *(6, 9, 7, 10, 8, 11),
        *(12, 13, 14, 15, 16, 17),
    ]


def test_rotation_is_its_definition_and_its_transpose_turns_back() -> None:
    angle, x, y = (drawn(*s, seed=i) for i, s in enumerate([(5, 3), (5, 2, 6), (5, 2, 6)]))
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
def test_heads_are_turned_where_they_lie_in_every_type(dtype: torch.dtype) -> None:
    cos, sin = (torch.cat([f(drawn(5, 3))] * 2, 1).to(dtype) for f in (torch.cos, torch.sin))
    rotation, heads_LHW = RotaryEmbedding.of(cos, sin), drawn(5, 4, 6, seed=1).to(dtype)
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
def test_rotations_are_those_of_the_backbone_at_every_position(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    if kind != "default":
        rope["original_max_position_embeddings"] = 32
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=128, rope_parameters=rope
    )
    theirs, mine = LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(config)
    asked: list[int] = []
    mine.register_forward_hook(lambda m, inputs, out: asked.append(inputs[1].numel()))
    rotations, x = RotaryTable(mine), torch.zeros(3, 32)
    for at in ([0, 1, 2], [5, 5, 258], [259, 0, 7], [7, 298, 299]):
        position_L = torch.tensor(at)
        cos, sin = theirs(x[None], position_L[None])
        found, expected = rotations(position_L, max(at) + 1, x), RotaryEmbedding.of(cos[0], sin[0])
        assert torch.equal(found.factor_L1P, expected.factor_L1P)
    ahead = rotary.AHEAD
    assert asked == ([3 + ahead, 260 + ahead] if kind in FIXED else [3, 3, 3, 3])
