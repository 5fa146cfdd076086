"""What is compared: every case of the benchmark, with the ratio that is promised of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Method = Literal["grpo", "generation", "dpo", "sft", "reward-model", "ppo"]


@dataclass(frozen=True)
class Case:
    """A step of a method, as both sides do it.

    Attributes:
        name: by which it is asked for, and found in the results.
        method: what is trained, or ``generation``.
        size: of the models (``worlds.SIZES``), or how many words an S has.
        prompt: tokens of every prompt.
        minimum: the ratio that is promised.
        response: the most tokens of a response.
        prompts: prompts, pairs or examples per step.
        samples: responses per prompt.
        epochs: optimiser steps on one batch of responses.
        beta: the coefficient of the KL term.
        precomputed: whether the reference's log-probs are there before the steps that count.
        lean_head: whether TRL is patched, so that its head sees response positions only.
        their_rows_per_pass: rows (pairs) in one forward pass of TRL's; None: all of the step.
        our_tokens_per_pass: tokens in one of Trivium's; None: its default.
        their_settings: further settings of TRL's trainer.
        memory: compare peak memory instead of time.
        steps: that are measured.
        warm_up: steps before them, which are not.
    """

    name: str
    method: Method
    size: str
    prompt: int
    minimum: float | None = None
    response: int = 64
    prompts: int = 8
    samples: int = 8
    epochs: int = 1
    beta: float = 0.0
    precomputed: bool = False
    lean_head: bool = False
    their_rows_per_pass: int | None = None
    our_tokens_per_pass: int | None = None
    their_settings: dict[str, Any] = field(default_factory=dict)
    memory: bool = False
    steps: int = 5
    warm_up: int = 1


def _cases() -> list[Case]:
    s, m = {"size": "S"}, {"size": "M", "steps": 1}
    short = {"steps": 10}
    few = {"prompts": 32, "steps": 2}
    pairs = {"prompts": 16, "steps": 8}
    examples = {"prompt": 32, "prompts": 64, "steps": 8}
    at_once = [
        Case("grpo-s-256", "grpo", prompt=256, minimum=4, **s),
        Case("grpo-s-32", "grpo", prompt=32, minimum=2, **s | short),
        Case("grpo-m-256", "grpo", prompt=256, minimum=5, **m),
        Case("grpo-m-32", "grpo", prompt=32, minimum=2, **m),
        Case("grpo-s-256-mu4", "grpo", prompt=256, minimum=4, epochs=4, beta=0.04, **s),
        Case("grpo-m-256-mu4", "grpo", prompt=256, minimum=4, epochs=4, beta=0.04, **m),
        Case("grpo-m-256-lean-head", "grpo", prompt=256, lean_head=True, **m),
        Case("generation-s-256", "generation", prompt=256, minimum=4, **s),
        Case("generation-s-32", "generation", prompt=32, minimum=2, **s | short),
        Case("generation-m-256", "generation", prompt=256, minimum=2, **m),
        Case("generation-m-32", "generation", prompt=32, minimum=2, **m),
        Case("dpo-s", "dpo", prompt=256, minimum=2, **s | pairs),
        Case("dpo-m", "dpo", prompt=256, minimum=3, **m | pairs | {"steps": 1}),
        Case("dpo-s-precomputed", "dpo", prompt=256, precomputed=True, **s | pairs),
        Case("dpo-m-precomputed", "dpo", prompt=256, precomputed=True, **m | pairs | {"steps": 1}),
        Case("dpo-s-32", "dpo", prompt=32, **s | pairs),
        Case("dpo-m-32", "dpo", prompt=32, **m | pairs | {"steps": 2}),
        Case("sft-s", "sft", minimum=1.3, **s | examples),
        Case("sft-m", "sft", minimum=1.3, **m | examples | {"steps": 2}),
        Case("reward-model-s", "reward-model", minimum=1.3, **s | examples | {"prompts": 32}),
        Case("reward-model-m", "reward-model", minimum=1.3, **m | examples | few),
        Case("ppo-s", "ppo", prompt=32, minimum=2, prompts=64, samples=1, epochs=4, beta=0.05, **s),
        Case("ppo-m", "ppo", prompt=32, prompts=64, samples=1, epochs=4, beta=0.05, **m),
    ]
    least = {"grpo-s-256": 2.5, "grpo-m-256": 4}
    memory = [
        replace(
            case, name=f"memory-{case.name}", memory=True, minimum=least.get(case.name), steps=1
        )
        for case in at_once
        if not case.lean_head and not case.precomputed
    ]
    by_group = [
        Case(
            f"memory-grpo-{size.lower()}-256-groups-of-8", "grpo", size, 256, memory=True, steps=1,
            their_rows_per_pass=8, our_tokens_per_pass=256 + 8 * 64,
        )
        for size in "SM"
    ]  # fmt: skip
    return [*at_once, *memory, *by_group]


CASES = _cases()
QUICK = (
    "grpo-s-256 grpo-s-32 generation-s-256 generation-s-32 dpo-s sft-s ppo-s memory-grpo-s-256"
).split()
CURVES = {
    "prompt tokens": [
        Case(f"prompt-{n}", "grpo", "S", n, steps=2) for n in (32, 128, 512, 2048)
    ],
    "responses per prompt": [
        Case(f"group-{n}", "grpo", "S", 256, prompts=64 // n or 1, samples=n, steps=2)
        for n in (2, 8, 32, 64)
    ],
    "vocabulary": [
        Case(f"vocabulary-{n}", "grpo", str(n), 64, prompts=2, steps=1)
        for n in (512, 8192, 32_000, 128_000)
    ],
    "longest response": [
        Case(f"response-{n}", "grpo", "S", 64, response=n, steps=2) for n in (16, 64, 256)
    ],
}  # fmt: skip
