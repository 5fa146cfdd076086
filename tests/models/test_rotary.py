"""Rotary frequencies that depend on a sequence's length: a sequence's own decides for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.rollout_engines import engine_of, prompts_of
from helpers.tiny_models import family, letters_tokenizer, perturb, plain_logprobs, random_lm
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.models.critic import SeparateCritic
from trivium.models.policy import Policy
from trivium.models.reward_model import RewardModel
from trivium.rollout.sampling import Sampling

ORIGINAL = 16
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [40.0, 50.0, 60.0, 70.0],
        "original_max_position_embeddings": ORIGINAL,
        "factor": 4.0,
    },
}
DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": ORIGINAL,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
}
KINDS = {"phi3": LONGROPE, "llama": DYNAMIC}


def model_of(name: str) -> PreTrainedModel:
    return random_lm(family(name, 13, **KINDS[name]), spread=0.2)


def policy_of(model: PreTrainedModel, *, shared: bool) -> Policy:
    policy = Policy(copy.deepcopy(model), letters_tokenizer())
    assert policy.shared
    if not shared:
        policy.model.set_attn_implementation("eager")
        policy.shared = False
    return policy


def drawn(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 13, (n,), generator=generator).tolist() for n in lengths]


def groups_of() -> list[Group]:
    """Groups within the original context, beyond it, and across it; some lengths occur twice."""
    prompts = drawn(3, 12, 15, 20, 9, seed=1)
    lengths = [(4, 2), (2, 9, 4), (1, 2), (3, 9), (7, 8)]
    responses = [drawn(*n, seed=i) for i, n in enumerate(lengths)]
    return [Group(p, r) for p, r in zip(prompts, responses, strict=True)]


def alone(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Log-probs by plain ``transformers``, each sequence by a model that has seen no other."""
    single = [Group(g.prompt, [r]) for g in groups for r in g.responses]
    return torch.cat([plain_logprobs(copy.deepcopy(model), [group]) for group in single])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
@pytest.mark.parametrize("name", KINDS)
def test_logprobs_beside_sequences_of_other_lengths_are_those_of_plain_transformers_alone(
    name: str, shared: bool
) -> None:
    model, groups = model_of(name), groups_of()
    policy = policy_of(model, shared=shared)
    expected_T = alone(model, groups)
    for _ in range(2):  # The second time, the model has seen longer sequences.
        found_T = policy.logprobs(Batch.of(groups)).detach()
        torch.testing.assert_close(found_T, expected_T, atol=1e-5, rtol=0)
    backwards_T = policy.logprobs(Batch.of(groups[::-1])).detach()
    per_group = expected_T.split([sum(map(len, g.responses)) for g in groups])
    torch.testing.assert_close(backwards_T, torch.cat(per_group[::-1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_frequencies_really_differ_beyond_the_original_context(name: str) -> None:
    model = model_of(name)
    (longer,) = drawn(2 * ORIGINAL)
    alone = copy.deepcopy(model)(input_ids=torch.tensor([longer[:9]])).logits
    beside = copy.deepcopy(model)(input_ids=torch.tensor([longer])).logits[:, :9]
    assert float((alone - beside).detach().abs().max()) > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_gradients_do_not_depend_on_the_division_into_batches(name: str) -> None:
    model, groups = model_of(name), groups_of()
    weights = torch.linspace(-1, 1, sum(len(r) for g in groups for r in g.responses))
    found = []
    for parts in ([groups], [[Group(g.prompt, [r])] for g in groups for r in g.responses]):
        policy, start = policy_of(model, shared=True), 0
        for part in parts:
            scores_T = policy.logprobs(Batch.of(part))
            (scores_T * weights[start : start + len(scores_T)]).sum().backward()
            start += len(scores_T)
        found.append([p.grad for p in policy.model.parameters()])
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_scores_and_values_do_not_depend_on_the_batch(name: str) -> None:
    config = family(name, 13, **KINDS[name], num_labels=1)
    classifier = AutoModelForSequenceClassification.from_config(config)
    perturb(classifier, seed=2, spread=0.2)
    model = RewardModel(classifier, letters_tokenizer())
    critic, groups = SeparateCritic(model), groups_of()
    single = [Batch.of([Group(g.prompt, [r])]) for g in groups for r in g.responses]
    for compute in (model.scores, critic.values, lambda b: critic.final_values(None, b)):
        together = compute(Batch.of(groups)).detach()
        apart = torch.cat([compute(batch).detach() for batch in single])
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
@pytest.mark.parametrize("name", KINDS)
def test_sampled_rows_are_those_of_plain_transformers_one_token_at_a_time(
    name: str, shared: bool
) -> None:
    model, prompts = model_of(name), prompts_of((3, 14, 20, 11, 15))
    policy = policy_of(model, shared=shared)
    engine = engine_of(policy, max_rows=6)
    found = engine.generate(prompts, 2, Sampling(max_tokens=8), seed=0, step=0)
    for prompt, responses in zip(prompts, found, strict=True):
        for response in responses:
            tokens = list(prompt.tokens)
            for token, logprob in zip(response.tokens, response.logprobs, strict=True):
                logits = (
                    copy.deepcopy(model)(input_ids=torch.tensor([tokens])).logits[0, -1].detach()
                )
                assert float(logits.log_softmax(-1)[token]) == pytest.approx(logprob, abs=2e-5)
                tokens.append(token)


def test_models_with_fixed_frequencies_keep_one_batch() -> None:
    policy = Policy(random_lm(family("llama", 13)), letters_tokenizer())
    batch = Batch.of(groups_of())
    assert policy.frequency_key is None
    assert policy.arranged(batch) is batch


def test_prompts_stay_shared_where_all_sequences_have_the_same_frequencies() -> None:
    policy = policy_of(model_of("phi3"), shared=True)
    batch = Batch.of([Group(*x) for x in zip(drawn(5, 3), [drawn(2, 4), drawn(1)], strict=True)])
    assert policy.arranged(batch) is batch
