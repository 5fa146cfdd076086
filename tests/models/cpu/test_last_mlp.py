"""The last layer's MLP computes the positions that are used, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import RAGGED, family, letters_tokenizer, random_groups, random_lm
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from trivium.data.batch import Batch
from trivium.hf.adapters import add_adapters
from trivium.hf.model_config import LoraConfig
from trivium.models.attention import packed_forward, states_at
from trivium.models.group_layout import GroupLayout
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel

pytestmark = pytest.mark.fast_path


def policy_of(name: str, dtype: str = "float32") -> Policy:
    return Policy(random_lm(family(name), dtype=dtype), letters_tokenizer())


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def everywhere(backbone: Any, batch: Batch) -> Tensor:
    """Return the hidden states of all tokens; the reference layout names no output positions."""
    return packed_forward(backbone, batch.tokens_L, batch.positions_L, GroupLayout(batch))


def watch_rows(mlp: Any) -> list[int]:
    """Record how many rows an MLP computes in each forward pass."""
    counts: list[int] = []
    mlp.act_fn.register_forward_hook(lambda _, inputs, out: counts.append(out.shape[1]))
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
    whole = everywhere(policy.backbone, batch)[at]
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
    whole = everywhere(policy.backbone, batch)
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
    everywhere(policy.backbone, batch)
    assert last == [len(set(batch.logit_positions_T.tolist())), len(batch.tokens_L)]


def test_reward_model_computes_last_tokens_in_the_last_mlp() -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(family("llama", num_labels=1))
    scorer = RewardModel(model, letters_tokenizer())
    batch = Batch.of(random_groups(50, *RAGGED))
    counts = watch_rows(model.base_model.layers[-1].mlp)
    scores = scorer.scores_at(batch, batch.last_tokens_N)
    assert counts == [len(batch.lengths_N)]
    states = everywhere(model.base_model, batch)[batch.last_tokens_N]
    torch.testing.assert_close(scores, model.score(states)[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "phi3", "granite"])
def test_layers_of_other_classes_are_not_replaced(name: str) -> None:
    policy = policy_of(name)
    layers: Any = getattr(policy.backbone, "layers", None) or policy.backbone.h
    assert "forward" not in vars(layers[-1].mlp)


def test_adapters_in_the_last_mlp_get_the_same_gradients() -> None:
    model = random_lm(family("llama"), dtype="float64")
    lora = LoraConfig(rank=2, targets=["gate_proj", "up_proj", "down_proj"])
    adapted = add_adapters(model, lora, "CAUSAL_LM")
    policy = Policy(adapted, letters_tokenizer())
    for parameter in policy.model.parameters():
        if parameter.requires_grad:
            parameter.data += rows(*parameter.shape) / 10
    batch = Batch.of(random_groups(50, *RAGGED))
    at, trained = batch.logit_positions_T, [p for p in adapted.parameters() if p.requires_grad]
    _, last = watched_rows(policy)
    found, whole = states_at(policy.backbone, batch, at), everywhere(policy.backbone, batch)[at]
    assert last == [len(set(at.tolist())), len(batch.tokens_L)]
    for mine, theirs in zip(
        [found, *torch.autograd.grad(found.square().sum(), trained)],
        [whole, *torch.autograd.grad(whole.square().sum(), trained)],
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)
