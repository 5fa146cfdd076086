"""Whether every path that a GPU takes computes what the reference does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.data.prompts import PromptsConfig, load_prompts
from trivium.hf.model_config import ModelConfig
from trivium.models.equivalence import uses_ragged_attention
from trivium.models.flex_attention import FlexLayout
from trivium.models.group_layout import MaskedLayout
from trivium.models.layout import AttentionSpec
from trivium.models.policy import Policy
from trivium.rollout.cuda_graphs import CudaGraphs, Step, graphs_work
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine

GROUPS = [
    Group([5] * 33, [[7 + i] * (3 + 9 * i) for i in range(6)]),
    Group([6] * 70, [[9] * 2, [8] * 41]),
    Group([4] * 1, [[3, 2, 9]]),
]


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference (or the least agreement) and its limit."""

    name: str
    value: float | None
    limit: float
    passed: bool
    error: str = ""


def checks(world: Path, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the result of every check; a path that fails does not end the others."""
    plain = _policy(world, device, "float32")
    table: list[tuple[str, float, Callable[[], float]]] = [
        ("log-probs of the device and of the CPU, float32", 2e-3, lambda: _devices(world, plain)),
        ("FlexAttention and masks, forward", 1e-3, lambda: _flex(device, None, None)[0]),
        ("FlexAttention and masks, window", 1e-3, lambda: _flex(device, 9, None)[0]),
        ("FlexAttention and masks, soft cap", 1e-3, lambda: _flex(device, None, 5.0)[0]),
        ("shared prompts and separate rows, float32", 1e-3, lambda: _shared(plain)),
        ("gradient of halves and of the whole, float32", 1e-4, lambda: _halves(plain)),
        ("log-probs when sampling and when scoring, float32", 1e-3, lambda: _sampler(world, plain)),
        ("gradient in bfloat16, 1 - cosine", 0.02, lambda: _precision(world, plain)),
        ("recorded decode steps and plain ones", 0.0, lambda: _graphs(plain)),
    ]
    if device.type == "cuda":  # FlexAttention has no backward pass on the CPU.
        table.insert(
            2, ("FlexAttention and masks, backward", 1e-2, lambda: _flex(device, None, None)[1])
        )
    for name, limit, measure in table:
        try:
            value = measure()
            yield asdict(Check(name, value, limit, value <= limit))
        except Exception as error:
            yield asdict(Check(name, None, limit, False, f"{type(error).__name__}: {error}"[:500]))


def _policy(world: Path, device: torch.device, dtype: str) -> Policy:
    config = {"path": str(world / "model"), "device": str(device), "dtype": dtype}
    return Policy.load(ModelConfig.model_validate(config))


def _batch(policy: Policy, groups: list[Group] = GROUPS) -> Batch:
    return Batch.of(groups).to(policy.device)


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float().cpu() - expected.float().cpu()).abs().max())


@torch.no_grad()
def _devices(world: Path, plain: Policy) -> float:
    on_cpu = _policy(world, torch.device("cpu"), "float32")
    return _difference(plain.logprobs(_batch(plain)), on_cpu.logprobs(_batch(on_cpu)))


def _flex(device: torch.device, window: int | None, softcap: float | None) -> tuple[float, float]:
    """Return the differences of the outputs and of the gradients."""
    batch = Batch.of(GROUPS).to(device)
    spec = AttentionSpec(0.2, window, softcap)
    backward = device.type == "cuda"
    outputs, gradients = [], []
    for layout in (MaskedLayout(batch), FlexLayout(batch)):
        generator = torch.Generator(device).manual_seed(0)
        shape = (len(batch.tokens_L), 4, 32)
        inputs = [
            torch.randn(shape, generator=generator, device=device).requires_grad_(backward)
            for _ in range(3)
        ]
        out = layout.attend(0, *inputs, spec=spec)
        outputs.append(out.detach())
        if backward:
            out.square().sum().backward()
            gradients.append(torch.stack([x.grad for x in inputs if x.grad is not None]))
    return _difference(*outputs), _difference(*gradients) if backward else 0.0


@torch.no_grad()
def _shared(plain: Policy) -> float:
    """Compare groups that share their prompt with rows that do not."""
    if not uses_ragged_attention(plain.base):
        raise RuntimeError("the model computes separate rows: nothing is shared")
    rows = [Group(g.prompt, [response]) for g in GROUPS for response in g.responses]
    return _difference(plain.logprobs(_batch(plain)), plain.logprobs(_batch(plain, rows)))


def _gradient(policy: Policy, batches: list[list[Group]], weight: float) -> Tensor:
    policy.model.zero_grad()
    for groups in batches:
        (policy.logprobs(_batch(policy, groups)).sum() * weight).backward()
    return torch.cat(
        [p.grad.float().flatten() for p in policy.model.parameters() if p.grad is not None]
    )


def _halves(plain: Policy) -> float:
    """Return the difference relative to the gradient's size."""
    whole = _gradient(plain, [GROUPS], 0.01)
    parts = _gradient(plain, [GROUPS[:1], GROUPS[1:]], 0.01)
    return float((whole - parts).norm() / whole.norm())


@torch.no_grad()
def _sampler(world: Path, plain: Policy) -> float:
    prompts = load_prompts(PromptsConfig(path=str(world / "data.jsonl"), limit=4), plain.tokenizer)
    sampled = local_engine(plain).generate(prompts, 4, Sampling(max_tokens=24), seed=0, step=0)
    groups = [
        Group(list(p.tokens), [list(r.tokens) for r in g])
        for p, g in zip(prompts, sampled, strict=True)
    ]
    drawn = torch.tensor([x for g in sampled for r in g for x in r.logprobs])
    return _difference(plain.logprobs(_batch(plain, groups)), drawn)


def _precision(world: Path, plain: Policy) -> float:
    half = _policy(world, plain.device, "bfloat16")
    whole, rounded = (_gradient(p, [GROUPS], 0.01) for p in (plain, half))
    return 1 - float(F.cosine_similarity(whole.cpu(), rounded.cpu(), 0))


def _graphs(plain: Policy) -> float:
    """Return 0 if steps that are recorded and replayed agree with plain ones, else 1."""

    def replayed(device: torch.device) -> Callable[[Step], Step]:
        return CudaGraphs(device) if device.type == "cuda" else lambda step: step

    return 0.0 if graphs_work(plain, replayed) else 1.0
