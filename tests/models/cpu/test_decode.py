"""The decode model computes what the backbone computes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from helpers.tiny_models import family, letters_tokenizer, random_groups, random_lm
from torch import Tensor, nn
from transformers import LlamaConfig, Ministral3Config
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from trivium.data.batch import Batch
from trivium.models import flops
from trivium.models.attention import packed_forward
from trivium.models.cpu.decode import (
    FIXED,
    TABLE_MARGIN,
    DecodeModel,
    Norm,
    RotationTable,
    _joined,
    _rotated,
    decode_specs,
    is_known,
)
from trivium.models.group_layout import GroupLayout
from trivium.models.policy import Policy

KNOWN = ["llama", "qwen2", "qwen2-window", "qwen3", "mistral"]
OTHERS = ["gemma", "gemma2", "gemma3", "phi3", "gpt2", "olmo2", "cohere"]
pytestmark = [pytest.mark.fast_path, pytest.mark.usefixtures("each_product")]


def policy_of(name: str) -> Policy:
    return Policy(random_lm(family(name)), letters_tokenizer())


def adapted(layer: nn.Linear) -> nn.Module:
    return peft.tuners.lora.Linear(layer, "default", peft.LoraConfig(), r=4)


@pytest.mark.parametrize("name", KNOWN)
def test_decode_model_equals_the_backbone(name: str) -> None:
    policy = policy_of(name)
    specs = decode_specs(policy.backbone)
    assert specs is not None
    batch = Batch.of(random_groups(50, [9, 3, 14], [[4, 2], [7, 7, 20], [1]]))
    with torch.no_grad():
        args = (batch.tokens_L, batch.positions_L, GroupLayout(batch))
        expected = packed_forward(policy.backbone, *args)
        found = DecodeModel(policy.backbone, specs)(*args)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", KNOWN)
def test_half_precision_models_share_prompts_and_use_the_decode_model(name: str) -> None:
    model = random_lm(family(name, num_hidden_layers=8, hidden_size=64)).to(torch.bfloat16)
    policy = Policy(model, letters_tokenizer())
    assert policy.shared and isinstance(policy.decode_model(), DecodeModel)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_use_their_own_forward_pass(name: str) -> None:
    policy = policy_of(name)
    assert decode_specs(policy.backbone) is None
    assert not isinstance(policy.decode_model(), DecodeModel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_similar_family_with_different_scaling_uses_its_own_forward_pass(dtype: str) -> None:
    for options in ({"residual_multiplier": 0.5}, {"embedding_multiplier": 3.0}):
        model = random_lm(family("granite", **options), dtype=dtype)
        assert decode_specs(Policy(model, letters_tokenizer()).backbone) is None


def test_decode_model_that_fails_or_differs_is_disabled_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy, right = policy_of("llama"), DecodeModel.__call__

    def fails(*args: Any) -> Tensor:
        raise RuntimeError("no such product")

    assert decode_specs(policy.backbone) is not None and not caplog.messages
    for wrong, why in ((fails, "it failed: no such product"), (lambda *x: right(*x) + 1, "differ")):
        monkeypatch.setattr(DecodeModel, "__call__", wrong)
        assert decode_specs(policy.backbone) is None
        assert why in caplog.messages[-1] and "slower" in caplog.messages[-1]


def test_models_with_adapters_use_their_own_forward_pass() -> None:
    policy = policy_of("llama")
    policy.backbone.layers[1].self_attn.v_proj = adapted(nn.Linear(32, 16))  # type: ignore[union-attr,index]
    assert decode_specs(policy.backbone) is None


def test_decode_model_has_the_current_weights() -> None:
    policy = policy_of("llama")
    batch = Batch.of(random_groups(50, [5], [[4, 2]]))
    args = (batch.tokens_L, batch.positions_L, GroupLayout(batch))
    with torch.no_grad():
        before = policy.decode_model()(*args)
        for parameter in policy.model.parameters():
            parameter += 0.1
        found = policy.decode_model()(*args)
        expected = packed_forward(policy.backbone, *args)
    assert not torch.allclose(before, found, atol=0.01)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_flops_of_the_comparison_do_not_count() -> None:
    policy = policy_of("llama")
    before = flops.total()
    policy.decode_model()
    assert flops.total() == before


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
    policy = Policy(random_lm(config), letters_tokenizer())
    assert policy.shared and decode_specs(policy.backbone) is None


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
def test_model_with_a_layer_that_computes_something_else_uses_its_own_forward_pass(
    dtype: str,
) -> None:
    model = random_lm(family("llama"), dtype=dtype)
    halved = halved_attention(LlamaAttention.__module__)
    model.model.layers[1].self_attn.__class__ = halved  # type: ignore[index,union-attr]
    assert decode_specs(Policy(model, letters_tokenizer()).backbone) is None


# --- parts ----------------------------------------------------------------------------------------


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_heads_are_rotated_as_in_transformers_at_every_position(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]}
    if kind != "default":
        rope["original_max_position_embeddings"] = 32
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, max_position_embeddings=128, rope_parameters=rope
    )
    theirs, mine = LlamaRotaryEmbedding(config), LlamaRotaryEmbedding(config)
    computed: list[int] = []
    mine.register_forward_hook(lambda m, inputs, out: computed.append(inputs[1].numel()))
    rotations, x_LD = RotationTable(mine), torch.zeros(3, 32)
    heads_LHW = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    for at in ([0, 1, 2], [5, 5, 258], [259, 0, 7], [7, 298, 299]):
        position_L = torch.tensor(at)
        cos, sin = theirs(x_LD[None], position_L[None])
        query = heads_LHW.transpose(0, 1)[None]
        expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
        found = _rotated(heads_LHW, rotations(position_L, x_LD))
        torch.testing.assert_close(found, expected[0].transpose(0, 1), atol=1e-6, rtol=0)
    margin = TABLE_MARGIN
    assert computed == ([3 + margin, 260 + margin] if kind in FIXED else [3, 3, 3, 3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_is_that_of_its_definition(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(6, eps=0.01).to(dtype)
    module.weight.data = torch.linspace(-1, 2, 6).to(dtype)
    x = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.01).sqrt()
    exact *= module.weight.double()
    found = Norm(module)(x)
    eps = torch.finfo(dtype).eps
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, atol=4 * eps, rtol=4 * eps)


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
def test_joined_layers_equal_their_layers(biases: tuple[bool, bool]) -> None:
    layers = [nn.Linear(8, n, bias=b) for n, b in zip((6, 4), biases, strict=True)]
    x_LD = torch.randn(5, 8)
    expected = torch.cat([layer(x_LD) for layer in layers], 1)
    torch.testing.assert_close(_joined(layers)(x_LD), expected, atol=1e-6, rtol=0)
