"""Cases of the benchmark, with the minimum speed ratio of each.

If a TRL setting changes only the speed, the benchmark uses the faster value, as measured.
docs/internals/benchmarks.md lists these settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Method = Literal["grpo", "generation", "dpo", "sft", "reward-model", "ppo"]


@dataclass(frozen=True)
class Case:
    """A training step of a method, run by Trivium and by TRL.

    Attributes:
        name: name of the case on the command line and in the results.
        method: method that is trained, or ``generation``.
        size: size of the models: S, M, or S with another vocabulary, as in S-8192.
        prompt: tokens of every prompt.
        minimum: target ratio of TRL's cost to Trivium's; None for no target.
        response: largest number of tokens of a response.
        prompts: prompts, pairs or examples per step.
        samples: responses per prompt.
        epochs: optimizer steps on one batch of responses.
        beta: coefficient of the KL term.
        precomputed: whether the reference's log-probs are computed before the measured steps.
        lean_head: whether TRL is patched so that its head sees only response positions.
        their_rows_per_pass: rows (pairs) in one forward pass of TRL; None for the whole step.
        our_tokens_per_pass: tokens in one forward pass of Trivium; None for the default.
        their_settings: further settings of TRL's trainer.
        memory: whether to compare peak memory instead of time.
        steps: measured steps of Trivium.
        their_steps: measured steps of TRL.
        warm_up: steps before the measured ones.
        repetitions: pairs of runs.
        quick: whether ``make bench-quick`` runs the case.
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
    steps: int = 10
    their_steps: int = 4
    warm_up: int = 1
    repetitions: int = 5
    quick: bool = False


STATIC = {"cache_implementation": "static"}
"""Faster for TRL with long prompts, slower with short ones."""
LARGE = {"steps": 3, "their_steps": 1, "repetitions": 3}
"""Steps of M are long, so a few of them suffice."""


def grpo() -> Iterator[Case]:
    """Yield whole GRPO steps: responses, rewards, update."""
    again = {"epochs": 4, "beta": 0.04, "steps": 5, "their_steps": 2}
    large = {**LARGE, "their_rows_per_pass": 16}
    yield Case("grpo-s-256", "grpo", "S", 256, 4, quick=True)
    yield Case("grpo-m-256", "grpo", "M", 256, 5, **large, quick=True)
    yield Case("grpo-m-256-lean-head", "grpo", "M", 256, **large, lean_head=True)
    yield Case("grpo-s-32", "grpo", "S", 32, 2, quick=True)
    yield Case("grpo-m-32", "grpo", "M", 32, 2, **large)
    yield Case("grpo-s-256-mu4", "grpo", "S", 256, 4, **again, quick=True)
    yield Case("grpo-m-256-mu4", "grpo", "M", 256, 4, **{**again, **large, "warm_up": 0})


def generation() -> Iterator[Case]:
    """Yield sampling without training, in tokens per second."""
    yield Case("generation-s-256", "generation", "S", 256, 4, their_settings=STATIC, quick=True)
    yield Case("generation-s-32", "generation", "S", 32, 2, quick=True)
    yield Case("generation-m-256", "generation", "M", 256, 2, their_settings=STATIC, **LARGE)
    yield Case("generation-m-32", "generation", "M", 32, **LARGE)


def from_data() -> Iterator[Case]:
    """Yield the methods that train on a data set: DPO, reward models and SFT."""
    pairs = {"prompts": 16, "samples": 2}
    for precomputed in (False, True):
        end = "-precomputed" if precomputed else ""
        own = {**pairs, "precomputed": precomputed}
        yield Case(f"dpo-s{end}", "dpo", "S", 256, 2, **own, quick=True)
        yield Case(f"dpo-m{end}", "dpo", "M", 256, 3, **{**own, **LARGE})
        yield Case(f"dpo-s-32{end}", "dpo", "S", 32, **own)
        yield Case(f"dpo-m-32{end}", "dpo", "M", 32, **{**own, **LARGE})
    yield Case("dpo-m-lean-head", "dpo", "M", 256, **pairs, **LARGE, lean_head=True)
    examples = {"prompts": 64, "samples": 1}
    yield Case("sft-s", "sft", "S", 32, 1.3, **examples, quick=True)
    yield Case("sft-m", "sft", "M", 32, 1.3, **examples, **LARGE)
    yield Case("sft-m-lean-head", "sft", "M", 32, **examples, **LARGE, lean_head=True)
    pairs = {"prompts": 32, "samples": 2}
    yield Case("reward-model-s", "reward-model", "S", 32, 1.3, **pairs, quick=True)
    yield Case("reward-model-m", "reward-model", "M", 32, 1.3, **pairs, **LARGE)


def ppo() -> Iterator[Case]:
    """Yield PPO with one response per prompt, as in TRL, and with eight, at the same total work."""
    own = {"epochs": 4, "beta": 0.05}
    for name, prompts, minimum in (("", 64, 2.0), ("-groups", 8, None)):
        shape = {"prompts": prompts, "samples": 64 // prompts}
        quick = not name
        yield Case(f"ppo-s{name}", "ppo", "S", 32, minimum, **own, **shape, quick=quick)
        yield Case(f"ppo-m{name}", "ppo", "M", 32, minimum, **own, **shape, **LARGE)


def memory(cases: list[Case]) -> Iterator[Case]:
    """Yield memory cases: the whole step in one pass, and eight responses per pass."""
    once = {"memory": True, "repetitions": 1, "warm_up": 0, "quick": False}
    for case in cases:
        steps = 1 if case.epochs > 1 else 2
        minimum = {"S": 2.5, "M": 4.0}[case.size]
        whole = replace(case, **once, steps=steps, their_steps=steps, minimum=minimum)
        quick = case.name in ("grpo-s-256", "dpo-s")
        yield replace(whole, name=f"memory-{case.name}", their_rows_per_pass=None, quick=quick)
        if case.name in ("grpo-s-256", "grpo-m-256"):
            yield replace(
                whole,
                name=f"memory-{case.name}-by-8",
                their_rows_per_pass=8,
                our_tokens_per_pass=case.prompt + 8 * case.response,
            )


def curves() -> Iterator[Case]:
    """Yield GRPO on S with prompts of 128, groups of 8 and responses of up to 64, one varied."""
    short = {"repetitions": 2, "steps": 4, "their_steps": 1, "their_rows_per_pass": 16}
    middle = Case("", "grpo", "S", 128, **short)
    for prompt in (32, 128, 512, 2048):
        yield replace(middle, name=f"curve-prompt-{prompt}", prompt=prompt)
    for samples in (2, 8, 32, 64):
        name = f"curve-group-{samples}"
        rows = max(16, samples)
        yield replace(
            middle, name=name, prompts=64 // samples, samples=samples, their_rows_per_pass=rows
        )
    for vocabulary in (512, 8192, 32_768, 131_072):
        yield replace(middle, name=f"curve-vocabulary-{vocabulary}", size=f"S-{vocabulary}")
    for response in (16, 64, 256):
        yield replace(middle, name=f"curve-response-{response}", response=response)


TIMES = [*grpo(), *generation(), *from_data(), *ppo()]
CURVES = list(curves())
CASES = {case.name: case for case in [*TIMES, *memory(TIMES), *CURVES]}


def chosen(patterns: str) -> list[Case]:
    """Return the cases whose names match one of the comma-separated patterns."""
    from fnmatch import fnmatch

    wanted = patterns.split(",")
    unknown = [p for p in wanted if not any(fnmatch(name, p) for name in CASES)]
    if unknown:
        raise SystemExit(f"no case matches {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    return [case for name, case in CASES.items() if any(fnmatch(name, p) for p in wanted)]


def hurried(case: Case) -> Case:
    """Return the case with fewer steps and one repetition, for a quick look."""
    return replace(
        case,
        steps=max(1, case.steps // 2),
        their_steps=max(1, case.their_steps // 2),
        warm_up=case.warm_up if case.size == "S" else 0,
        repetitions=1,
    )
