"""The shipped loops reach the optimum that theory names, on worlds small enough to enumerate.

Tokens are EOS, a, b and c; a response ends with EOS or at a length of two (for GRPO: of one). The
models are float64; the tolerances leave room for a finite number of steps and, where responses
are sampled, for the noise that is left when the learning rate has fallen to zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from worlds import checkpoint, rows, source

from trivium.algorithms import dpo, grpo, ppo

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
    return checkpoint(path, letters=LETTERS, dtype="float64", spread=0.25, seed=4)


def reward_of(prompt: str, text: str) -> float:
    """A reward between −1 and 1 that depends on everything."""
    code = sum((i + 2) * (ord(c) - 95) for i, c in enumerate(text.removesuffix(EOS)))
    return math.sin(2.3 * code + 1.7 * ord(prompt))


REWARDS = """
import math

def reward(prompts, responses):
    def one(prompt, text):
        code = sum((i + 2) * (ord(c) - 95) for i, c in enumerate(text))
        return math.sin(2.3 * code + 1.7 * ord(prompt))
    return [one(p, r) for p, r in zip(prompts, responses)]
"""


def settings(base: str, directory: Path, prompts: list[str]) -> dict[str, Any]:
    function = source(directory / "rewards.py", REWARDS) + ":reward"
    return {
        "model": {"path": base, "dtype": "float64"},
        "data": {"path": rows(directory / "prompts.jsonl", [{"prompt": p} for p in prompts])},
        "rewards": [{"function": function, "timeout": None}],
        "run": {"directory": str(directory / "run")},
        "prompts_per_step": len(prompts),
    }


def optimizer(rate: float) -> dict[str, Any]:
    return {
        "learning_rate": rate, "schedule": "linear", "betas": [0.9, 0.99], "max_grad_norm": 1e3,
    }  # fmt: skip


def test_ppo_with_kl_in_the_reward_reaches_the_tilted_reference(base: str, tmp_path: Path) -> None:
    beta = 0.5
    config = ppo.PPOConfig(
        **settings(base, tmp_path, list(PROMPTS)),
        critic={"optimizer": optimizer(0.01)},
        sampling={"max_tokens": 2},
        optimizer=optimizer(0.01),
        responses_per_prompt=192,
        steps=120,
        epochs=1,
        minibatches=1,
        beta=beta,
        lam=1.0,
        aggregation="fixed_length",
        whiten_advantages=False,
    )
    run = ppo.train(config)
    for prompt in PROMPTS:
        reference = distribution(base, prompt, 2)
        optimum = tilted(reference, lambda y, p=prompt: reward_of(p, y), beta)
        print(
            prompt,
            total_variation(reference, optimum),
            total_variation(distribution(run / "final", prompt, 2), optimum),
        )
    assert 0
