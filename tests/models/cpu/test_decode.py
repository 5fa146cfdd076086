"""The decode model computes what the backbone computes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from helpers.tiny_models import family, letters_tokenizer, random_groups, random_lm
from torch import Tensor, nn

from trivium.data.batch import Batch
from trivium.models import flops
from trivium.models.attention import packed_forward
from trivium.models.cpu.decode import DecodeModel, decode_specs
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
