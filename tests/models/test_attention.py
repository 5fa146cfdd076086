"""Shared prompts give the same log-probs and gradients as separate rows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import (
    RAGGED,
    SEPARATE,
    SHARING,
    checkpoint,
    family,
    letters_tokenizer,
    plain_logprobs,
    random_groups,
    random_lm,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.hf.model_config import ModelConfig
from trivium.models import equivalence
from trivium.models.attention import RAGGED as RAGGED_NAME
from trivium.models.attention import UnsupportedAttentionError, separate_rows, states_at
from trivium.models.equivalence import use_ragged_attention
from trivium.models.policy import Policy

GROUPS = random_groups(50, *RAGGED)
LONG = random_groups(50, [5, 9], [[24, 3], [20]], seed=1)


def policy_of(name: str) -> tuple[Policy, str]:
    """Return a policy with random weights, and its model's own attention implementation."""
    model = random_lm(family(name))
    own = model.config._attn_implementation
    return Policy(model, letters_tokenizer()), own


def logprobs_and_gradients(policy: Policy, groups: list[Group]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probs, and gradients of a sum in which every token has its own weight."""
    policy.model.zero_grad()
    logprobs_T = policy.score(Batch.of(groups)).logprobs_T
    weights_T = torch.linspace(-1, 1, len(logprobs_T)) / len(logprobs_T)
    (weights_T * logprobs_T).sum().backward()
    gradients = {
        name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None
    }
    return logprobs_T.detach(), gradients


def in_separate_rows(policy: Policy, own: str) -> Policy:
    """Switch the policy to its model's own attention, with one padded row per response."""
    policy.model.set_attn_implementation(own)
    policy.shared = False
    return policy


@pytest.mark.parametrize("name", SHARING)
def test_shared_prompt_equals_separate_rows_in_logprobs_and_gradients(name: str) -> None:
    policy, own = policy_of(name)
    assert policy.shared
    shared_T, shared_gradients = logprobs_and_gradients(policy, GROUPS)
    rows_T, rows_gradients = logprobs_and_gradients(in_separate_rows(policy, own), GROUPS)
    torch.testing.assert_close(shared_T, rows_T, atol=1e-5, rtol=0)
    assert shared_gradients.keys() == rows_gradients.keys()
    assert max(float(g.abs().max()) for g in rows_gradients.values()) > 0.01
    for parameter, gradient in rows_gradients.items():
        torch.testing.assert_close(shared_gradients[parameter], gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [*SHARING, *SEPARATE])
@pytest.mark.parametrize("groups", [GROUPS, LONG], ids=["ragged", "long"])
def test_logprobs_equal_plain_transformers(name: str, groups: list[Group]) -> None:
    policy, own = policy_of(name)
    ours_T = policy.score(Batch.of(groups)).logprobs_T.detach()
    in_separate_rows(policy, own)
    torch.testing.assert_close(ours_T, plain_logprobs(policy.model, groups), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SEPARATE)
def test_family_that_cannot_share_falls_back_with_one_warning(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    equivalence._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="trivium"):
        policies = [policy_of(name)[0] for _ in range(2)]
    assert not any(policy.shared for policy in policies)
    assert all(policy.model.config._attn_implementation != RAGGED_NAME for policy in policies)
    (message,) = [record.getMessage() for record in caplog.records]
    assert type(policies[0].model).__name__ in message
    assert "separate rows" in message


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_hidden_states_including_prompts_equal_separate_rows(name: str) -> None:
    policy, own = policy_of(name)
    batch = Batch.of(GROUPS)
    everywhere = torch.arange(len(batch.tokens_L))
    ours_LD = states_at(policy.backbone, batch, everywhere, shared=policy.shared).detach()
    in_separate_rows(policy, own)
    rows_LD = separate_rows(policy.backbone, batch).detach()
    assert len(ours_LD) == sum(len(g.prompt) + sum(map(len, g.responses)) for g in GROUPS)
    torch.testing.assert_close(ours_LD, rows_LD, atol=1e-5, rtol=1e-5)
    alone_LD = policy.backbone(
        input_ids=torch.tensor([GROUPS[2].prompt + GROUPS[2].responses[1]])
    ).last_hidden_state[0]
    start = int(batch.prompt_starts_G[2])
    torch.testing.assert_close(ours_LD[start : start + 12], alone_LD[:12], atol=1e-5, rtol=1e-5)


def test_response_does_not_depend_on_its_siblings_or_other_groups() -> None:
    policy, _ = policy_of("mistral")
    alone = Group(GROUPS[0].prompt, [GROUPS[0].responses[1]])
    together_T = policy.score(Batch.of(GROUPS)).logprobs_T[3:10]
    alone_T = policy.score(Batch.of([alone])).logprobs_T
    torch.testing.assert_close(together_T, alone_T, atol=1e-6, rtol=0)


def test_gradient_of_one_response_does_not_reach_its_siblings_tokens() -> None:
    policy, _ = policy_of("llama")
    embedding = policy.backbone.get_input_embeddings()
    group = Group([1, 2], [[3, 4], [5, 6]])
    policy.score(Batch.of([group])).logprobs_T[:2].sum().backward()
    touched = embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == [1, 2, 3]


@pytest.mark.parametrize("window", [1, 2, 5, 40, None])
def test_sliding_window_of_any_size_equals_plain_transformers(window: int | None) -> None:
    model = random_lm(family("mistral", sliding_window=window))
    plain_T = plain_logprobs(model, LONG)
    policy = Policy(model, letters_tokenizer())
    assert policy.shared
    torch.testing.assert_close(policy.score(Batch.of(LONG)).logprobs_T, plain_T, atol=1e-5, rtol=0)


def test_prompt_lengths_from_1_to_12_equal_plain_transformers() -> None:
    model = random_lm(family("llama"))
    groups = random_groups(50, range(1, 13), [[n % 4 + 1, 2] for n in range(12)], seed=2)
    plain_T = plain_logprobs(model, groups)
    ours_T = Policy(model, letters_tokenizer()).score(Batch.of(groups)).logprobs_T
    torch.testing.assert_close(ours_T, plain_T, atol=1e-5, rtol=0)


def test_ragged_attention_without_a_layout_is_an_error() -> None:
    model = random_lm(family("llama"))
    assert use_ragged_attention(model)
    with pytest.raises(UnsupportedAttentionError, match="no layout"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_attention_that_is_not_causal_is_not_shared() -> None:
    model = random_lm(family("llama"))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert not use_ragged_attention(model)


def test_model_with_attention_dropout_is_not_shared() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            attention_dropout=0.5,
        )
    ).train()
    assert not use_ragged_attention(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_that_mixes_segments_outside_attention_is_not_shared(dtype: str) -> None:
    model = random_lm(family("llama"), dtype=dtype)

    def leak(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output + 2 * output.roll(1, dims=1)

    model.model.layers[0].mlp.register_forward_hook(leak)
    assert not use_ragged_attention(model)


def stories(shared_dir: Path) -> tuple[PreTrainedModel, Policy]:
    path = str(shared_dir / "checkpoints" / "stories260k")
    return AutoModelForCausalLM.from_pretrained(path), Policy.load(ModelConfig(path=path))


def test_logprobs_on_a_real_checkpoint_equal_plain_transformers(shared_dir: Path) -> None:
    plain, policy = stories(shared_dir)
    texts = {
        "Once upon a time": [", there was a little girl.", " Tim saw a big red ball. He ran."],
        "Lily": [" was sad because her toy was lost in the deep dark wood.", "!", " and Ben"],
    }
    groups = [
        Group(
            policy.tokenizer(prompt).input_ids,
            [policy.tokenizer(r, add_special_tokens=False).input_ids for r in responses],
        )
        for prompt, responses in texts.items()
    ]
    assert policy.shared
    torch.testing.assert_close(
        policy.score(Batch.of(groups)).logprobs_T, plain_logprobs(plain, groups), atol=1e-5, rtol=0
    )


def test_shared_layout_survives_saving_and_loading(tmp_path: Path) -> None:
    policy = Policy.load(ModelConfig(path=checkpoint(tmp_path / "a")))
    policy.save(tmp_path / "b")
    again = Policy.load(ModelConfig(path=str(tmp_path / "b")))
    groups = random_groups(13, *RAGGED)
    assert again.shared
    assert torch.equal(
        policy.score(Batch.of(groups)).logprobs_T, again.score(Batch.of(groups)).logprobs_T
    )
