"""Log-probs and entropy in chunks equal the full log-softmax in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import family, random_groups, random_lm
from torch import Tensor

from trivium.data.batch import Batch
from trivium.models import logprobs
from trivium.models.logprobs import Head, token_logprobs

TOKENS, VOCABULARY, WIDTH = 53, 11, 5
CASES = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "soft cap": {"softcap": 1.5},
    "all": {"bias": True, "temperature": 1.9, "scale": 2.0, "softcap": 2.5},
}


class Case:
    """Random hidden states, a head, targets, and weights for the two results."""

    def __init__(
        self,
        *,
        bias: bool = False,
        temperature: float = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
        tokens: int = TOKENS,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        generator = torch.Generator().manual_seed(tokens)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden_TD = draw(tokens, WIDTH).requires_grad_()
        self.weight_VD = draw(VOCABULARY, WIDTH).requires_grad_()
        self.bias_V = draw(VOCABULARY).requires_grad_() if bias else None
        self.targets_T = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
        self.weights_T = draw(tokens), draw(tokens)
        self.temperature, self.scale, self.softcap = temperature, scale, softcap

    @property
    def inputs(self) -> list[Tensor]:
        return [x for x in (self.hidden_TD, self.weight_VD, self.bias_V) if x is not None]

    def ours(self) -> tuple[Tensor, Tensor]:
        head = Head(self.weight_VD, self.bias_V, self.scale, self.softcap)
        return token_logprobs(self.hidden_TD, head, self.targets_T, temperature=self.temperature)

    def full(self) -> tuple[Tensor, Tensor]:
        """Return the results from all logits, in float64."""
        logits_TV = self.hidden_TD.double() @ self.weight_VD.double().t()
        if self.bias_V is not None:
            logits_TV = logits_TV + self.bias_V.double()
        logits_TV = logits_TV * self.scale
        if self.softcap is not None:
            logits_TV = self.softcap * torch.tanh(logits_TV / self.softcap)
        log_p_TV = (logits_TV / self.temperature).log_softmax(-1)
        entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)
        return log_p_TV[torch.arange(len(log_p_TV)), self.targets_T], entropy_T

    def gradients(self, results: tuple[Tensor, Tensor], which: tuple[int, ...]) -> list[Tensor]:
        total = sum((results[i] * self.weights_T[i]).sum() for i in which)
        return list(torch.autograd.grad(total, self.inputs))


@pytest.mark.parametrize("chunk", [1, 200, 1 << 22], ids=["small", "uneven", "one"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_the_full_log_softmax(
    options: dict, chunk: int, which: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", chunk)
    case = Case(**options)
    ours, full = case.ours(), case.full()
    for mine, theirs in zip(ours, full, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    for mine, theirs in zip(case.gradients(ours, which), case.gradients(full, which), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_the_last_chunk_may_be_shorter() -> None:
    assert [(s.start, s.stop) for s in logprobs.chunks(53, 1 << 22, 1 << 22)] == [
        (0, 16), (16, 32), (32, 48), (48, 53),
    ]  # fmt: skip


def test_gradcheck_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 1)
    case = Case(bias=True, temperature=1.3, scale=0.5, softcap=2.0, tokens=18)

    def scores(hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor) -> tuple[Tensor, Tensor]:
        head = Head(weight_VD, bias_V, 0.5, 2.0)
        return token_logprobs(hidden_TD, head, case.targets_T, temperature=1.3)

    assert torch.autograd.gradcheck(scores, case.inputs)


def test_probabilities_of_all_targets_sum_to_one() -> None:
    case = Case(tokens=1, softcap=3.0, temperature=0.5)
    head = Head(case.weight_VD, None, 1.0, 3.0)
    every_V = torch.arange(VOCABULARY)
    hidden = case.hidden_TD.expand(VOCABULARY, -1)
    logprob_V, entropy_V = token_logprobs(hidden, head, every_V, temperature=0.5)
    torch.testing.assert_close(logprob_V.exp().sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(entropy_V[0], -(logprob_V.exp() * logprob_V).sum())


def test_no_tokens_give_empty_results_and_zero_gradients() -> None:
    case = Case(tokens=0)
    results = case.ours()
    assert [len(r) for r in results] == [0, 0]
    assert all(not g.any() for g in case.gradients(results, (0, 1)))


def test_bfloat16_hidden_states_give_float32_results_near_the_exact_ones() -> None:
    case = Case(dtype=torch.bfloat16, bias=True)
    logprobs_T, entropy_T = case.ours()
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    exact_T = case.full()[0].float()
    # One bfloat16 rounding of a logit of magnitude up to 8.
    torch.testing.assert_close(logprobs_T, exact_T, atol=0.05, rtol=0)
    grads = torch.autograd.grad((logprobs_T * case.weights_T[0].float()).sum(), case.inputs)
    exact = torch.autograd.grad((exact_T * case.weights_T[0].float()).sum(), case.inputs)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3
    for mine, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_that_is_not_positive_is_an_error(temperature: float) -> None:
    case = Case(temperature=temperature)
    with pytest.raises(ValueError, match="temperature must be positive"):
        case.ours()


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2", "phi", "gptj"])
def test_head_with_scale_cap_or_bias_equals_the_models(name: str) -> None:
    from trivium.models.policy import Policy, lm_head

    model = random_lm(family(name), spread=0.3)
    tokens = torch.tensor([[1, 2, 3, 4]])
    output = model(input_ids=tokens, output_hidden_states=True)
    ours = lm_head(model).logits(output.hidden_states[-1][0])
    torch.testing.assert_close(ours, output.logits[0].float(), atol=1e-5, rtol=1e-5)
    policy = Policy(model, None)  # type: ignore[arg-type]
    assert policy.score(Batch.of(random_groups(50, [2], [[3]]))).logprobs_T.isfinite().all()


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_unlikely_tokens_have_finite_logprobs(offset: float) -> None:
    logits_V = torch.tensor([0.0, -300.0, 2.0, 1.0]) + offset
    targets_T, atol = torch.arange(4), 4e-5 + 3e-7 * abs(offset)
    head = Head(logits_V[:, None])
    found_T, entropy_T = token_logprobs(torch.ones(4, 1), head, targets_T)
    expected_T = logits_V.double().log_softmax(0)
    assert entropy_T is not None
    torch.testing.assert_close(found_T.double(), expected_T, atol=atol, rtol=0)
    entropy = -(expected_T.exp() * expected_T).sum()
    torch.testing.assert_close(entropy_T.double(), entropy.expand(4), atol=atol, rtol=0)


def test_logprobs_have_the_same_bits_with_and_without_entropies() -> None:
    case = Case(dtype=torch.float32)
    head = Head(case.weight_VD)
    with_entropy, _ = token_logprobs(case.hidden_TD, head, case.targets_T)
    alone, _ = token_logprobs(case.hidden_TD, head, case.targets_T, entropy=False)
    assert torch.equal(with_entropy, alone)
