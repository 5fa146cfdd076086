"""The rollout engine: sampled tokens, ends of responses, and independence from the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers.data_tokenizers import chatml_tokenizer
from helpers.rollout_engines import (
    LENGTHS,
    SAMPLING,
    check_rows_against_backbone,
    engine_of,
    last_states,
    policy_of,
    prompts_of,
    tokens_of,
)
from helpers.tiny_models import EOS, family, letters_tokenizer, random_lm, scripted_lm
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.errors import ModelError
from trivium.hf.model_config import ModelConfig
from trivium.models import flops
from trivium.models.attention import packed_forward
from trivium.models.layout import AttentionSpec
from trivium.models.policy import Policy
from trivium.rollout import local_engine
from trivium.rollout.engine import (
    draw,
    filter_top_k_top_p,
    number_samples,
    row_key,
    uniforms,
)
from trivium.rollout.kv_cache import BLOCK_TOKENS, KVCache
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling

MASK = 2**64 - 1


def greedy_by_transformers(model: PreTrainedModel, tokens: list[int], count: int) -> list[int]:
    ids = torch.tensor([tokens])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        pad_token_id=1,
    )  # fmt: skip
    return out[0, len(tokens) :].tolist()


# --- responses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    "llama qwen2-window mistral gemma2 gemma3 cohere2 gpt2 gpt-neox phi bloom gptj falcon "
    "gpt-oss".split(),
)
def test_greedy_equals_transformers_generate(name: str) -> None:
    reference_model = random_lm(family(name, 13), spread=0.2)
    prompts = prompts_of()
    expected = [greedy_by_transformers(reference_model, p.tokens, 14) for p in prompts]
    greedy = Sampling(temperature=0.0, max_tokens=14)
    engine = engine_of(policy_of(name), max_rows=4)
    found = engine.generate(prompts, 1, greedy, seed=0, step=0)
    assert [group[0].tokens for group in found] == expected


def test_long_greedy_responses_equal_transformers_generate() -> None:
    options = {"max_position_embeddings": 256, "eos_token_id": None, "sliding_window": 50}
    reference_model = random_lm(family("mistral", 13, **options), spread=0.2)
    engine = LocalEngine(policy_of("mistral", **options), set())
    prompts = prompts_of((60, 3))
    found = engine.generate(prompts, 1, Sampling(temperature=0.0, max_tokens=100), seed=0, step=0)
    for prompt, (response,) in zip(prompts, found, strict=True):
        assert response.tokens == greedy_by_transformers(reference_model, prompt.tokens, 100)
        assert response.finish_reason == "length"


def test_greedy_on_a_real_checkpoint_equals_transformers_generate(shared_dir: Path) -> None:
    path = str(shared_dir / "checkpoints" / "stories260k")
    policy = Policy.load(ModelConfig(path=path))
    reference_model = AutoModelForCausalLM.from_pretrained(path)
    texts = ["Once upon a time", "Tim and Sue", "A"]
    prompts = [Prompt(policy.tokenizer(t).input_ids, t, {}, i) for i, t in enumerate(texts)]
    engine = LocalEngine(policy, {policy.tokenizer.eos_token_id}, max_rows=2)
    found = engine.generate(prompts, 1, Sampling(temperature=0.0, max_tokens=45), seed=0, step=0)
    for prompt, (response,) in zip(prompts, found, strict=True):
        assert response.tokens == greedy_by_transformers(reference_model, prompt.tokens, 45)
    assert found[0][0].text.startswith(", there was a little girl named Lily.")


@pytest.mark.parametrize("name", ["llama", "mistral", "bloom", "gpt-oss"])
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    policy, prompts = policy_of(name), prompts_of()
    expected_tokens = tokens_of(engine_of(policy).generate(prompts, 4, SAMPLING, seed=3, step=5))
    assert len({tuple(r) for group in expected_tokens for r in group}) > 20
    for max_rows in (1, 5, 9):
        engine = engine_of(policy, max_rows)
        assert tokens_of(engine.generate(prompts, 4, SAMPLING, seed=3, step=5)) == expected_tokens
    reverse = engine_of(policy, 8).generate(prompts[::-1], 4, SAMPLING, seed=3, step=5)
    assert tokens_of(reverse)[::-1] == expected_tokens
    for prompt, expected in zip(prompts, expected_tokens, strict=True):
        alone = engine_of(policy).generate([prompt], 2, SAMPLING, seed=3, step=5)
        assert tokens_of(alone) == [expected[:2]]
    shorter = engine_of(policy).generate(prompts, 4, Sampling(max_tokens=5), seed=3, step=5)
    assert tokens_of(shorter) == [[r[:5] for r in group] for group in expected_tokens]


def test_samples_differ_by_seed_step_prompt_and_sample() -> None:
    policy = policy_of()
    one = prompts_of((3,))[0]
    prompts = [one, Prompt(one.tokens, "", {}, index=9)]
    engine = engine_of(policy)
    found = [
        tuple(r.tokens)
        for seed, step in product((0, 1), (0, 1))
        for group in engine.generate(prompts, 3, SAMPLING, seed=seed, step=step)
        for r in group
    ]
    assert len(set(found)) == len(found) == 24


def test_repeated_prompt_gets_new_samples_and_keeps_its_first_ones() -> None:
    policy, prompts = policy_of(), prompts_of((3, 2))
    once = tokens_of(engine_of(policy).generate(prompts, 3, SAMPLING, seed=1, step=2))
    both = [prompts[0], prompts[1], prompts[0]]
    twice = tokens_of(engine_of(policy).generate(both, 3, SAMPLING, seed=1, step=2))
    assert twice[:2] == once
    more = tokens_of(engine_of(policy).generate(prompts[:1], 6, SAMPLING, seed=1, step=2))
    assert twice[2] == more[0][3:] != twice[0]
    share = engine_of(policy).generate(
        both[1:], 3, SAMPLING, seed=1, step=2, first_samples=number_samples(both, 3)[1:]
    )
    assert tokens_of(share) == twice[1:]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "opt", "bloom", "gpt-oss"])
def test_sampler_logprobs_equal_trainer_logprobs(name: str, temperature: float) -> None:
    policy, prompts = policy_of(name, temperature), prompts_of()
    sampling = Sampling(temperature=temperature, max_tokens=12, top_p=0.9, top_k=8, min_p=0.02)
    found = engine_of(policy, 8).generate(prompts, 3, sampling, seed=0, step=0)
    groups = [Group(p.tokens, [r.tokens for r in rs]) for p, rs in zip(prompts, found, strict=True)]
    ours_T = torch.tensor([x for group in found for r in group for x in r.logprobs])
    loss_mask_T = policy.score(Batch.of(groups)).logprobs_T.detach()
    torch.testing.assert_close(ours_T, loss_mask_T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_shared_prompts_and_separate_rows_give_identical_samples(name: str) -> None:
    policy, prompts = policy_of(name), prompts_of()
    shared = engine_of(policy, 7).generate(prompts, 3, SAMPLING, seed=1, step=2)
    policy.model.set_attn_implementation("sdpa")
    policy.shared = False
    separate = engine_of(policy, 7).generate(prompts, 3, SAMPLING, seed=1, step=2)
    assert tokens_of(shared) == tokens_of(separate)


def test_prompts_are_prefilled_once_and_few_rows_are_idle() -> None:
    policy, prompts = policy_of(), prompts_of()
    policy.decode_model()  # The first call runs forward passes to select the decode path.
    read: list[int] = []
    embedding = policy.backbone.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    found = engine_of(policy, 8).generate(prompts, 4, SAMPLING, seed=0, step=0)
    lengths = [len(r.tokens) for group in found for r in group]
    assert len(set(lengths)) > 3
    grown = sum(n - 1 for n in lengths)
    assert grown <= sum(read) - sum(LENGTHS) <= grown * 8 / 7


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
def test_rows_attend_only_to_their_own_tokens_after_others_leave_and_join(name: str) -> None:
    policy = policy_of(name)
    check_rows_against_backbone(policy, KVCache(policy))


def test_idle_row_with_full_response_kv_does_not_affect_shorter_rows() -> None:
    policy = policy_of()
    cache = KVCache(policy)
    first, second, third = (p.tokens for p in prompts_of((5, 3, 2)))
    with torch.no_grad():
        cache.admit([first], 1)
        for _ in range(BLOCK_TOKENS - 1):
            cache.advance(torch.tensor([4]))
        cache.admit([second], 8)
        cache.advance(torch.full((9,), 5))
        cache.admit([third], 7)
        cache.keep(list(range(1, 16)))
        found = cache.advance(torch.full((15,), 6))
        rows = [[*second, 5, 6]] * 8 + [[*third, 6]] * 7
        torch.testing.assert_close(found, last_states(policy, rows), atol=1e-5, rtol=0)


class NoAttention:
    """A layout in which tokens attend to nothing."""

    def attend(self, layer: int, query_LHD: Tensor, *args: Tensor, spec: AttentionSpec) -> Tensor:
        return query_LHD.contiguous()


@torch.no_grad()
def flops_at(policy: Policy, positions: list[int]) -> float:
    """Return the FLOPs that are counted for the backbone with tokens at these positions."""
    with flops.apart() as counter:
        positions_T = torch.tensor(positions)
        packed_forward(policy.backbone, torch.ones_like(positions_T), positions_T, NoAttention())
    return counter.flops


def prefixes_of(prompt: Prompt, lengths: Sequence[int]) -> list[Prompt]:
    """Return beginnings of a prompt as prompts of their own."""
    return [Prompt(prompt.tokens[:n], "", {}, 100 * prompt.index + n) for n in sorted(lengths)]


@pytest.mark.parametrize("max_rows", [512, 40, 3])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2", "bloom", "gpt-oss"])
def test_prompts_that_begin_another_prompt_have_the_samples_they_have_alone(
    name: str, max_rows: int
) -> None:
    policy, (first, second) = policy_of(name), prompts_of((14, 9))
    prompts = [
        *prefixes_of(first, (2, 5, 6, 13, 14)),
        *prefixes_of(second, (1, 4, 9)),
        *prefixes_of(first, (3,)),
    ]
    found = engine_of(policy, max_rows).generate(prompts, 4, SAMPLING, seed=3, step=5)
    for prompt, group in zip(prompts, found, strict=True):
        alone = engine_of(policy).generate([prompt], 4, SAMPLING, seed=3, step=5)
        assert tokens_of([group]) == tokens_of(alone)
    assert len({tuple(r.tokens) for group in found for r in group}) > 20


def test_prompts_that_begin_another_prompt_are_prefilled_with_it() -> None:
    policy = policy_of()
    (prompt,) = prompts_of((14,))
    read: list[int] = []
    policy.decode_model()  # The first call runs forward passes to select the decode path.
    embedding = policy.backbone.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    one_token = Sampling(max_tokens=1)
    prefixes = prefixes_of(prompt, (2, 5, 6, 13, 14))
    with flops.apart() as shared:
        engine_of(policy).generate(prefixes, 4, one_token, seed=0, step=0)
    assert read == [14]
    with flops.apart() as separate:
        engine_of(policy).generate(prefixes[::-1], 4, one_token, seed=0, step=0)
    assert read[1:] == [2 + 5 + 6 + 13 + 14]
    assert shared.flops < 0.5 * separate.flops


def test_flops_of_a_row_follow_from_the_prefix_that_it_continues() -> None:
    policy = policy_of()
    cache = KVCache(policy)
    with torch.no_grad():
        cache.admit([prompts_of((14,))[0].tokens], 2, [[3, 14]])
        with flops.apart() as counter:
            cache.advance(torch.ones(4, dtype=torch.long))
    assert counter.flops == flops_at(policy, [3, 3, 14, 14])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_flops_count_active_rows_and_not_idle_ones(name: str) -> None:
    policy = policy_of(name)
    cache = KVCache(policy)
    with torch.no_grad():
        with flops.apart() as prompt_flops:
            cache.admit([p.tokens for p in prompts_of((7, 3))], 8)
        cache.keep([i for i in range(16) if i not in (2, 11)])
        with flops.apart() as row_flops:
            cache.advance(torch.ones(14, dtype=torch.long))
    assert len(cache.group_of_S) == 16  # Two of these rows are idle.
    assert prompt_flops.flops == flops_at(policy, [*range(7), *range(3)]) > 0
    assert row_flops.flops == flops_at(policy, [7] * 7 + [3] * 7) > 0


def test_tensors_made_in_the_callback_can_be_used_for_training() -> None:
    policy, prompts = policy_of(), prompts_of()
    lengths_seen: list[Tensor] = []

    def finished(prompt: int, responses: Sequence[Response]) -> None:
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        lengths_seen.append(torch.tensor([len(r.tokens) for r in responses], dtype=torch.float32))

    engine_of(policy).generate(prompts, 2, SAMPLING, seed=0, step=0, finished=finished)
    weight = torch.ones(2, requires_grad=True)
    (weight * torch.stack(lengths_seen)).sum().backward()
    assert torch.equal(weight.grad, torch.stack(lengths_seen).sum(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_gradients_after_sampling_equal_those_before(rope: str) -> None:
    scaled = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}
    config = family("llama", max_position_embeddings=8, rope_parameters=scaled)
    policy = Policy(random_lm(config), letters_tokenizer())
    policy.model.config.max_position_embeddings = 64
    batch = Batch.of([Group([1, 2, 3], [[4, 5], [6]])])
    parameters = list(policy.model.parameters())
    before = torch.autograd.grad(policy.score(batch).logprobs_T.sum(), parameters)
    engine_of(policy).generate(prompts_of(), 2, SAMPLING, seed=0, step=0)
    after = torch.autograd.grad(policy.score(batch).logprobs_T.sum(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_waiting_prompts_replace_finished_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts = policy_of(), prompts_of((2,) * 12)
    rows: list[int] = []
    advance = KVCache.advance

    def count_rows(cache: KVCache, tokens_R: Tensor) -> Tensor:
        rows.append(len(tokens_R))
        return advance(cache, tokens_R)

    monkeypatch.setattr(KVCache, "advance", count_rows)
    found = engine_of(policy, max_rows=4).generate(prompts, 1, SAMPLING, seed=0, step=0)
    lengths = [len(group[0].tokens) for group in found]
    assert max(rows) == 4
    batches = [max(lengths[i : i + 4]) for i in range(0, 12, 4)]
    assert len(rows) < sum(batches)


def test_more_samples_than_rows_are_all_sampled() -> None:
    policy, prompts = policy_of(), prompts_of((2, 3))
    few = engine_of(policy, max_rows=2).generate(prompts, 5, SAMPLING, seed=0, step=0)
    many = engine_of(policy).generate(prompts, 5, SAMPLING, seed=0, step=0)
    assert tokens_of(few) == tokens_of(many)


def test_next_rollout_uses_the_updated_weights() -> None:
    policy, prompts = policy_of(), prompts_of()
    engine = engine_of(policy)
    engine.generate(prompts, 2, SAMPLING, seed=0, step=0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.5)
    again = engine.generate(prompts, 2, SAMPLING, seed=0, step=0)
    fresh = engine_of(policy).generate(prompts, 2, SAMPLING, seed=0, step=0)
    assert tokens_of(again) == tokens_of(fresh)


def test_no_prompts_give_no_responses() -> None:
    assert engine_of(policy_of()).generate([], 2, SAMPLING, seed=0, step=0) == []


# --- endings --------------------------------------------------------------------------------------


def scripted(text: str, sampling: Sampling, tokenizer: object = None) -> Response:
    """Return the response of a model that generates ``text`` and then repeats its last token."""
    tokenizer = tokenizer or letters_tokenizer()
    script = tokenizer.encode(text)  # type: ignore[attr-defined]
    model = scripted_lm([1, *script], len(tokenizer))  # type: ignore[arg-type]
    policy = Policy(model, tokenizer)  # type: ignore[arg-type]
    ends = {tokenizer.eos_token_id}  # type: ignore[attr-defined]
    engine = LocalEngine(policy, ends)
    return engine.generate([Prompt([1], "", {}, 0)], 1, sampling, seed=0, step=0)[0][0]


def greedy(**options: object) -> Sampling:
    return Sampling(temperature=0.0, **{"max_tokens": 10, **options})


def test_response_ends_with_its_eos() -> None:
    response = scripted("abc<eos>de", greedy())
    assert response == Response([1, 2, 3, EOS], response.logprobs, "eos", "abc")
    assert len(response.logprobs) == 4


def test_response_is_truncated_at_the_length_limit() -> None:
    response = scripted("abcdefgh", greedy(max_tokens=3))
    assert (response.tokens, response.finish_reason, response.text) == ([1, 2, 3], "length", "abc")


def test_eos_as_the_last_allowed_token_is_not_truncation() -> None:
    assert scripted("ab<eos>", greedy(max_tokens=3)).finish_reason == "eos"


def test_stop_token_ends_a_response_like_an_eos() -> None:
    response = scripted("abcd", greedy(stop_tokens=(3,)))
    assert (response.tokens, response.finish_reason) == ([1, 2, 3], "eos")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(("c",), "abc"), (("bcd",), "abcd"), (("x", "de", "cd"), "abcd"), (("f", "ab"), "ab")],
)
def test_stop_text_ends_a_response_and_stays_part_of_it(
    stop: tuple[str, ...], expected: str
) -> None:
    response = scripted("abcdefgh", greedy(stop=stop))
    assert (response.text, response.finish_reason) == (expected, "stop")


def test_text_that_is_not_a_stop_text_does_not_end_a_response() -> None:
    response = scripted("abcabcabcabc", greedy(stop=("ca.", "acb"), max_tokens=9))
    assert (response.text, response.finish_reason) == ("abcabcabc", "length")


def test_stop_text_of_characters_that_take_many_tokens_is_found() -> None:
    tokenizer = chatml_tokenizer()
    stop = "日本語の終わりです。"
    assert len(tokenizer.encode(stop)) > len(stop) + 8
    response = scripted("a" + stop + "b", greedy(stop=(stop,), max_tokens=40), tokenizer)
    assert (response.text, response.finish_reason) == ("a" + stop, "stop")


def test_finish_reasons_of_random_samples_are_correct() -> None:
    policy, prompts = policy_of(), prompts_of()
    sampling = Sampling(max_tokens=9, stop=("ab", ".c"), stop_tokens=(12,))
    found = engine_of(policy, 16).generate(prompts, 30, sampling, seed=0, step=0)
    seen = set()
    for response in (r for group in found for r in group):
        seen.add(response.finish_reason)
        *before, last = response.tokens
        text = "".join(letters_tokenizer().convert_ids_to_tokens(before))
        assert not {EOS, 12} & set(before)
        assert not any(stop in text for stop in sampling.stop)
        assert len(response.tokens) <= 9
        match response.finish_reason:
            case "eos":
                assert last in (EOS, 12)
            case "stop":
                assert response.text.endswith(sampling.stop)
            case "length":
                assert len(response.tokens) == 9
    assert seen == {"eos", "stop", "length"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prompt_that_does_not_fit_the_context_is_an_error(name: str) -> None:
    engine = engine_of(policy_of(name))
    engine.generate(prompts_of((52,)), 1, SAMPLING, seed=0, step=0)
    with pytest.raises(ModelError, match=r"prompt of 53 tokens .* up to 12 .* context of 64"):
        engine.generate(prompts_of((53, 2)), 1, SAMPLING, seed=0, step=0)


def test_family_without_a_context_limit_takes_prompts_of_any_length() -> None:
    (group,) = engine_of(policy_of("bloom")).generate(
        prompts_of((70,)), 1, SAMPLING, seed=0, step=0
    )
    assert group[0].tokens


# --- drawing --------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2]])


def kept_probabilities(**options: object) -> list[float]:
    return filter_top_k_top_p(PROBABILITIES, Sampling(**options))[0].tolist()


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 9}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.7}, {1, 3, 4}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.24}, {1, 2, 3, 4}),
        ({"min_p": 0.26}, {1, 3, 4}),
        ({"min_p": 0.6}, {1, 3}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}),
        ({"min_p": 0.3, "top_k": 4, "top_p": 0.99}, {1, 3, 4}),
    ],
)
def test_filter_keeps_the_expected_tokens_with_their_probabilities(
    options: dict, tokens: set[int]
) -> None:
    expected = [p if i in tokens else 0.0 for i, p in enumerate(PROBABILITIES[0].tolist())]
    assert kept_probabilities(**options) == expected


def test_filter_is_per_row() -> None:
    rows = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    assert filter_top_k_top_p(rows, Sampling(top_p=0.8)).gt(0).tolist() == [
        [True, True, False], [False, True, True],
    ]  # fmt: skip


def test_token_is_the_inverse_of_the_cumulative_distribution() -> None:
    log_p = PROBABILITIES.log().double()
    edges = [0.0, 0.049, 0.051, 0.449, 0.451, 0.549, 0.551, 0.799, 0.801, 1 - 2**-53]
    numbers = torch.tensor(edges, dtype=torch.float64)
    tokens_R, logprobs_R = draw(log_p.expand(len(edges), -1), numbers, Sampling())
    assert tokens_R.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    torch.testing.assert_close(logprobs_R, log_p[0, tokens_R])


def test_logprob_is_that_of_the_unfiltered_distribution() -> None:
    logits = PROBABILITIES.log() + 3.0
    numbers = torch.tensor([0.0, 0.61, 0.62, 0.999], dtype=torch.float64)
    tokens_R, logprobs_R = draw(logits.expand(4, -1), numbers, Sampling(top_p=0.6))
    # 0.4 and 0.25 remain: token 1 up to 0.4/0.65 = 0.615, then token 3.
    assert tokens_R.tolist() == [1, 1, 3, 3]
    torch.testing.assert_close(logprobs_R.exp(), torch.tensor([0.4, 0.4, 0.25, 0.25]))


def test_uniform_close_to_one_never_draws_an_impossible_token() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]).expand(3, -1)
    numbers = torch.tensor([1 - 2**-53, 1.0, 0.5], dtype=torch.float64)
    tokens_R, _ = draw(logits, numbers, Sampling())
    assert tokens_R.tolist() == [1, 1, 1]


def test_greedy_takes_the_most_likely_token_for_any_uniform() -> None:
    numbers = torch.tensor([0.0, 0.99], dtype=torch.float64)
    tokens_R, _ = draw(PROBABILITIES.log().expand(2, -1), numbers, Sampling(temperature=0.0))
    assert tokens_R.tolist() == [1, 1]


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected).square() / expected).sum())


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 2}, {"min_p": 0.3}])
def test_frequencies_match_the_filtered_distribution(options: dict) -> None:
    count = 100_000
    keys = torch.tensor([row_key(1, 2, 3, j) for j in range(1000)]).repeat_interleave(100)
    numbers = uniforms(keys, torch.arange(100).repeat(1000))
    tokens_R, _ = draw(PROBABILITIES.log().expand(count, -1), numbers, Sampling(**options))
    p = torch.tensor(kept_probabilities(**options), dtype=torch.float64)
    possible = p > 0
    counts = torch.bincount(tokens_R, minlength=5).double()
    assert not counts[~possible].any()
    # The 99.9 % quantile of chi-square with 4 degrees of freedom is 18.5; with fewer it is less.
    assert chi_square(counts[possible], (count * p / p.sum())[possible]) < 18.5


# --- randomness -----------------------------------------------------------------------------------


def splitmix64(key: int, position: int) -> int:
    """Compute SplitMix64 (Steele et al. 2014) with Python integers."""
    state = (key + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_uniforms_are_splitmix64_in_53_bits() -> None:
    # The published outputs of the generator seeded with 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    found = uniforms(torch.tensor([1234567] * 3), torch.arange(3))
    assert found.tolist() == [(x >> 11) * 2.0**-53 for x in published]
    keys = [row_key(0, 0, i, j) for i in range(5) for j in range(5)]
    found = uniforms(torch.tensor(keys), torch.arange(25))
    assert found.tolist() == [(splitmix64(k, i) >> 11) * 2.0**-53 for i, k in enumerate(keys)]
    assert found.dtype == torch.float64


def test_keys_never_change() -> None:
    assert row_key(0, 0, 0, 0) == -6738056433161113872
    assert row_key(1, 2, 3, 4) == 2319475572399523498
    spelled = {row_key(1, 11, 1, 1), row_key(11, 1, 1, 1), row_key(1, 1, 11, 1)}
    assert len(spelled) == 3
    assert all(-(2**63) <= key < 2**63 for key in spelled)


def test_uniforms_do_not_depend_on_their_batch() -> None:
    keys = torch.tensor([row_key(0, 0, 0, j) for j in range(50)])
    whole = uniforms(keys, torch.full((50,), 3))
    assert [
        float(uniforms(keys[j : j + 1], torch.tensor([3]))) for j in range(50)
    ] == whole.tolist()


def test_precomputed_uniforms_of_a_row_are_contiguous() -> None:
    rows = [local_engine.Row(0, row_key(1, 2, 3, i)) for i in range(3)]
    drawn: list[list[float]] = [[], [], []]
    for position in range(2 * local_engine.UNIFORMS_PER_CALL + 5):
        present = rows if position > 9 else rows[:2]  # The third row starts later.
        for row, uniform in zip(present, local_engine._uniforms(present).tolist(), strict=True):
            drawn[rows.index(row)].append(uniform)
            row.tokens.append(0)
    for row, numbers in zip(rows, drawn, strict=True):
        keys_P = torch.full((len(numbers),), row.key)
        assert numbers == uniforms(keys_P, torch.arange(len(numbers))).tolist()


def test_uniforms_are_uniform_and_independent_between_positions_and_samples() -> None:
    keys = torch.tensor([row_key(0, 0, 0, j) for j in range(400)])
    u_RT = torch.stack([uniforms(keys, torch.full((400,), t)) for t in range(250)], 1)
    assert bool(((u_RT >= 0) & (u_RT < 1)).all())
    counts = torch.histc(u_RT, 50, 0.0, 1.0)
    # The 99.9 % quantile of chi-square with 49 degrees of freedom.
    assert chi_square(counts, torch.full((50,), 2000.0, dtype=torch.float64)) < 85.4
    for a, b in ((u_RT[:, 1:], u_RT[:, :-1]), (u_RT[1:], u_RT[:-1])):
        correlation = float(((a - 0.5) * (b - 0.5)).mean()) * 12
        assert abs(correlation) < 3.3 / math.sqrt(a.numel())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"min_p": -0.1},
        {"top_k": -1}, {"max_tokens": 0}, {"stop": ("",)},
    ],
)  # fmt: skip
def test_sampling_values_out_of_range_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_engine_never_exceeds_max_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_rows: list[int] = []
    original = local_engine.LocalEngine._sample_tokens

    def record_rows(engine: LocalEngine, rows: list, *rest: object) -> None:
        num_rows.append(len(rows))
        original(engine, rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(local_engine.LocalEngine, "_sample_tokens", record_rows)
    engine_of(policy_of(), max_rows=7).generate(prompts_of(), 3, SAMPLING, seed=0, step=0)
    assert max(num_rows) == 6
