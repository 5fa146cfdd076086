"""The shipped loops reach the optimum that theory names, on worlds small enough to enumerate.

Tokens are EOS, a, b and c; a response ends with EOS or at a length of two (for GRPO: of one). The
models are float64; the tolerances leave room for a finite number of steps and, where responses
are sampled, for the noise that is left when the learning rate has fallen to zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import checkpoint, rows, source
from transformers import AutoModelForCausalLM

from trivium.algorithms import dpo, grpo, ppo
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig

LETTERS = "abc"
EOS = "<eos>"
PROMPTS = ("a", "b")
Distribution = dict[str, float]


def responses(longest: int) -> list[str]:
    """Every response, written with its EOS."""
    found, open_ones = [], [""]
    for _ in range(longest):
        found += [text + EOS for text in open_ones]
        open_ones = [text + letter for text in open_ones for letter in LETTERS]
    return found + open_ones


@torch.no_grad()
def distribution(path: Path | str, prompt: str, longest: int) -> Distribution:
    """The probability of every response, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    found = {}
    for text in responses(longest):
        tokens = [0 if piece == "" else 1 + LETTERS.index(piece) for piece in _tokens(text)]
        start = [1 + LETTERS.index(letter) for letter in prompt]
        logits = model(input_ids=torch.tensor([start + tokens])).logits[0]
        log_p = logits.log_softmax(-1)[len(start) - 1 : -1]
        found[text] = float(log_p[torch.arange(len(tokens)), tokens].sum().exp())
    assert math.isclose(math.fsum(found.values()), 1.0, abs_tol=1e-9)
    return found


def _tokens(text: str) -> list[str]:
    letters = list(text.removesuffix(EOS))
    return [*letters, ""] if text.endswith(EOS) else letters


def tilted(reference: Distribution, reward: Callable[[str], float], beta: float) -> Distribution:
    """``π_ref exp(r/β) / Z``."""
    weight = {y: p * math.exp(reward(y) / beta) for y, p in reference.items()}
    total = math.fsum(weight.values())
    return {y: w / total for y, w in weight.items()}


def total_variation(p: Distribution, q: Distribution) -> float:
    assert p.keys() == q.keys()
    return sum(abs(p[y] - q[y]) for y in p) / 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    # Learned positions: with rotary ones a token that repeats its predecessor changes nothing.
    return checkpoint(
        path, "gpt2", letters=LETTERS, dtype="float64", spread=0.25, seed=3, n_layer=1,
        tie_word_embeddings=False,
    )  # fmt: skip


def strength(prompt: str, text: str) -> int:
    """1, 2 or 3: the reward is its logarithm, so that Bradley-Terry's odds are whole numbers."""
    code = sum((i + 2) * (ord(c) - 95) for i, c in enumerate(text.removesuffix(EOS)))
    return 1 + (code + ord(prompt)) % 3


REWARDS = """
import math

def strength(prompts, responses):
    codes = [sum((i + 2) * (ord(c) - 95) for i, c in enumerate(text)) for text in responses]
    return [math.log(1 + (code + ord(p)) % 3) for p, code in zip(prompts, codes)]

def letter(responses):
    return [{"": 0.0, "a": 0.5, "b": -0.3, "c": 1.0}[text] for text in responses]
"""


def settings(base: str, directory: Path, prompts: list[str], reward: str) -> dict[str, Any]:
    function = f"{source(directory / 'rewards.py', REWARDS)}:{reward}"
    return {
        "model": {"path": base, "dtype": "float64"},
        "data": {"path": rows(directory / "prompts.jsonl", [{"prompt": p} for p in prompts])},
        "rewards": [{"function": function, "timeout": None}],
        "run": {"directory": str(directory / "run")},
        "prompts_per_step": len(prompts),
    }


def optimizer(rate: float = 0.01) -> dict[str, Any]:
    return {
        "learning_rate": rate, "schedule": "linear", "betas": [0.9, 0.99], "max_grad_norm": 1e3,
    }  # fmt: skip


def assert_tilted(base: str, run: Path, beta: float) -> None:
    """After each prompt the policy is ``π_ref exp(r/β)/Z``, and was not so at the start."""
    for prompt in PROMPTS:
        reference = distribution(base, prompt, 2)
        optimum = tilted(reference, lambda y, p=prompt: math.log(strength(p, y)), beta)
        assert total_variation(reference, optimum) > 0.2
        assert total_variation(distribution(run / "final", prompt, 2), optimum) <= 0.01


@pytest.mark.parametrize("ahead", [False, True])
def test_ppo_with_kl_in_the_reward_reaches_the_tilted_reference(
    ahead: bool, base: str, tmp_path: Path
) -> None:
    config = PPOConfig(
        **settings(base, tmp_path, list(PROMPTS), "strength"),
        critic={"optimizer": optimizer()},
        sampling={"max_tokens": 2},
        optimizer=optimizer(0.006),
        responses_per_prompt=96,
        steps=200,
        epochs=2,
        minibatches=1,
        beta=0.5,
        gae_lambda=1.0,
        importance_sampling_cap=2.0 if ahead else None,
        asynchronous=ahead,
        aggregation="fixed_length",
        whiten_advantages=False,
    )
    assert_tilted(base, ppo.train(config), 0.5)


def test_dpo_on_bradley_terry_pairs_reaches_the_tilted_reference(base: str, tmp_path: Path) -> None:
    # Each pair is there as often as Bradley-Terry prefers it: nothing is left to chance.
    records = []
    for prompt in PROMPTS:
        for one, other in combinations(responses(2), 2):
            records += [pair(prompt, one, other)] * strength(prompt, one)
            records += [pair(prompt, other, one)] * strength(prompt, other)
    config = DPOConfig(
        model={"path": base, "dtype": "float64"},
        data={
            "path": rows(tmp_path / "pairs.jsonl", records),
            "max_response_tokens": 2,
            "long_responses": "truncate",
        },
        run={"directory": str(tmp_path / "run")},
        optimizer=optimizer(),
        pairs_per_step=len(records),
        epochs=200.0,
        beta=0.5,
    )
    assert_tilted(base, dpo.train(config), 0.5)


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("corrected", [False, True])
def test_grpo_reaches_the_fixed_point_of_its_kl_term(
    corrected: bool, base: str, tmp_path: Path
) -> None:
    beta, size = 0.5, 1024
    config = GRPOConfig(
        **settings(base, tmp_path, list(PROMPTS), "letter"),
        sampling={"max_tokens": 1},
        optimizer=optimizer(),
        responses_per_prompt=size,
        steps_per_iteration=200,
        beta=beta,
        kl_correction=corrected,
        scale="none",
        aggregation="fixed_length",
    )
    run = grpo.train(config)
    effective = beta * size / (size - 1)
    for prompt in PROMPTS:
        reference = distribution(base, prompt, 1)
        exponential = tilted(reference, LETTER_REWARDS.__getitem__, effective)
        quotient = rational(reference, LETTER_REWARDS.__getitem__, effective)
        assert total_variation(exponential, quotient) > 0.04
        found = distribution(run / "final", prompt, 1)
        assert total_variation(found, exponential if corrected else quotient) <= 0.015


LETTER_REWARDS = {EOS: 0.0, "a": 0.5, "b": -0.3, "c": 1.0}


def rational(reference: Distribution, reward: Callable[[str], float], beta: float) -> Distribution:
    """``β π_ref / (c − r)``, with c such that it sums to 1 (by bisection)."""
    low = max(reward(y) for y in reference)
    high = low + beta
    for _ in range(200):
        c = (low + high) / 2
        total = math.fsum(beta * p / (c - reward(y)) for y, p in reference.items())
        low, high = (c, high) if total > 1 else (low, c)
    return {y: beta * p / (c - reward(y)) for y, p in reference.items()}
