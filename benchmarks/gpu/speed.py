"""Tokens per second and model-FLOPs utilization of training passes and of sampling."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.data.prompts import PromptsConfig, load_prompts
from trivium.hf.model_config import ModelConfig
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine

Record = dict[str, Any]
RESPONSES = 4
"""Responses of a group, of which each has a quarter of the tokens after the prompt."""


def measured_peak(device: torch.device, size: int) -> float:
    """Return the FLOP/s of a product of two square bfloat16 matrices, the best of ten."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [_timed(device, lambda: left @ right)[0] for _ in range(10)]
    return 2 * size**3 / min(seconds)


def lengths(
    world: Path, name: str, device: torch.device, tokens: tuple[int, ...], peak: float, new: int
) -> Iterator[Record]:
    """Yield the measurements of one model: forward and backward passes over packed sequences of
    several lengths, and sampling after prompts of these lengths."""
    config = {"path": str(world / "model"), "device": str(device), "dtype": "bfloat16"}
    for graphs in (False, True) if device.type == "cuda" else (False,):
        policy = Policy.load(ModelConfig.model_validate(config | {"cuda_graphs": graphs}))
        for count in tokens:
            found = {"model": name, "tokens": count, "cuda_graphs": graphs}
            if not graphs:
                train = partial(_train, policy, count, peak)
                yield _caught(found | {"stage": "train"}, train)
            sample = partial(_sample, policy, count, new, peak)
            yield _caught(found | {"stage": "sample"}, sample)
        del policy
        gc.collect()


def _train(policy: Policy, count: int, peak: float) -> Record:
    prompt = count // 2
    own = (count - prompt) // RESPONSES
    group = Group([2 + i % 97 for i in range(prompt)], [[3 + i] * own for i in range(RESPONSES)])

    def step() -> None:
        batch = Batch.of([group]).to(policy.device)
        policy.logprobs(batch).mean().backward()
        policy.model.zero_grad()

    return _rates(policy.device, step, prompt + own * RESPONSES, peak)


def _sample(policy: Policy, count: int, new: int, peak: float) -> Record:
    """Sample responses to one prompt of ``count`` tokens."""
    engine, sampling = local_engine(policy), Sampling(max_tokens=new)
    prompt = _prompt(policy, count)

    def step() -> int:
        (group,) = engine.generate([prompt], 8 * RESPONSES, sampling, seed=0, step=0)
        return sum(len(response.tokens) for response in group)

    return _rates(policy.device, step, None, peak)


def _prompt(policy: Policy, count: int) -> Any:
    """Return a prompt of ``count`` tokens."""
    folder = Path(policy.model.name_or_path).parent
    (prompt,) = load_prompts(
        PromptsConfig(path=str(folder / "data.jsonl"), limit=1), policy.tokenizer
    )
    repeated = (list(prompt.tokens) * (count // len(prompt.tokens) + 1))[:count]
    return type(prompt)(**{**vars(prompt), "tokens": repeated})


def _rates(
    device: torch.device, step: Callable[[], int | None], tokens: int | None, peak: float
) -> Record:
    """Return tokens per second and the share of the peak: the best of three, after one more."""
    best: Record = {}
    for repetition in range(4):
        before = flops.total()
        seconds, made = _timed(device, step)
        rate = (tokens or made or 0) / seconds
        if repetition and rate > best.get("tokens_per_second", 0.0):
            share = (flops.total() - before) / seconds / peak
            best = {"tokens_per_second": rate, "flops_share": share, "seconds": seconds}
    if device.type == "cuda":
        best["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    return best


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - began, result


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _caught(record: Record, measure: Callable[[], Record]) -> Record:
    """Return the record with its measurements, or with the error that ended them."""
    try:
        return record | measure()
    except RuntimeError as error:  # Out of memory, above all.
        return record | {"error": f"{type(error).__name__}: {error}"[:300]}
