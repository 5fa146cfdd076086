"""Measure the gain of each optimization: the same work with and without it, in one process.

    python benchmarks/speed/shares.py [--size S|M] [--prompt N] [--repetitions N] [--only PATTERN]

The work is a step of GRPO with eight prompts and eight responses to each: sampling them, or a
forward and backward pass over them. The script prints a Markdown table of processor-time ratios,
without the optimization over with it: the median, the lowest and the highest of all repetitions.
``benchmarks/fast_path.py`` measures the CPU fast path in whole steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from worlds import SIZES, write_world

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.data.prompts import Prompt, PromptsConfig, load_prompts
from trivium.hf.model_config import ModelConfig
from trivium.models.attention import states_at
from trivium.models.policy import Policy
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine

Without = Callable[[], AbstractContextManager[object]]
Comparison = tuple[str, Callable[[], None], Callable[[], None], Without]
"""An optimization: name, work with it, work without it, and a context that disables it."""


class Work:
    """A policy and the responses of a step."""

    def __init__(self, world: Path) -> None:
        self.policy = Policy.load(ModelConfig(path=str(world / "model"), device="cpu"))
        data = PromptsConfig(path=str(world / "data.jsonl"))
        self.prompts = load_prompts(data, self.policy.tokenizer)[:8]
        self.engine, self.sampling = local_engine(self.policy), Sampling(max_tokens=64)
        responses = self._sample(self.prompts, 8)
        self.groups = [Group(p.tokens, r) for p, r in zip(self.prompts, responses, strict=True)]
        self.optimizers = {
            fused: torch.optim.AdamW(self.policy.model.parameters(), lr=1e-8, fused=fused)
            for fused in (True, False)
        }

    def _sample(self, prompts: Sequence[Prompt], samples: int) -> list[list[list[int]]]:
        groups = self.engine.generate(prompts, samples, self.sampling, seed=0, step=1)
        return [[response.tokens for response in group] for group in groups]

    def sample(self) -> None:
        self._sample(self.prompts, 8)

    def sample_without_sharing(self) -> None:
        """Sample with a separate prompt for every response."""
        self._sample([prompt for prompt in self.prompts for _ in range(8)], 1)

    def train(self) -> None:
        self.policy.score(Batch.of(self.groups)).logprobs_T.sum().backward()
        self.policy.model.zero_grad(set_to_none=True)

    def train_with_full_logits(self) -> None:
        """Train with the head on all positions, as one tensor of logits that autograd keeps."""
        batch = Batch.of(self.groups)
        everywhere = torch.arange(len(batch.tokens_L))
        hidden_LD = states_at(self.policy.backbone, batch, everywhere)
        logits_LV = nn.functional.linear(hidden_LD, self.policy.head.weight_VD)
        log_p_TV = logits_LV.log_softmax(-1).index_select(0, batch.logit_positions_T)
        log_p_TV.gather(1, batch.targets_T[:, None]).sum().backward()
        self.policy.model.zero_grad(set_to_none=True)

    def optimizer_step(self, fused: bool) -> None:
        for parameter in self.policy.model.parameters():
            parameter.grad = parameter.detach()
        self.optimizers[fused].step()


@contextmanager
def padded_rows(policy: Policy) -> Iterator[None]:
    """Use the model's own attention, with one padded row per response."""
    model = policy.model
    before = model.config._attn_implementation
    policy.shared = False
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        policy.shared = True
        model.set_attn_implementation(before)


def processor_seconds(work: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(
    optimized: Callable[[], object],
    unoptimized: Callable[[], object],
    without: Without,
    repetitions: int,
    cost: Callable[[Callable[[], object]], float] = processor_seconds,
) -> list[tuple[float, float]]:
    """Return the costs with and without an optimization, after one warm-up repetition.

    Every second repetition begins without the optimization, so that neither side gains from order.
    """
    costs = []
    for i in range(repetitions + 1):
        order = ((0, optimized, nullcontext), (1, unoptimized, without))
        pair = [0.0, 0.0]
        for side, work, context in order if i % 2 == 0 else reversed(order):
            with context():
                pair[side] = cost(work)
        costs.append((pair[0], pair[1]))
    return costs[1:]


def comparisons(work: Work) -> Iterator[Comparison]:
    """Yield all optimizations."""
    yield from training_comparisons(work)
    yield (
        "optimizer: fused AdamW",
        partial(work.optimizer_step, True),
        partial(work.optimizer_step, False),
        nullcontext,
    )
    yield from sampling_comparisons(work)


def training_comparisons(work: Work) -> Iterator[Comparison]:
    """Yield the other optimizations of the forward and backward pass."""
    policy = work.policy
    yield (
        "training: one prompt copy for all its responses",
        work.train,
        work.train,
        lambda: padded_rows(policy),
    )
    yield (
        "training: head at response positions, in chunks",
        work.train,
        work.train_with_full_logits,
        nullcontext,
    )


def sampling_comparisons(work: Work) -> Iterator[Comparison]:
    """Yield the other optimizations of sampling."""
    engine, patch = work.engine, mock.patch.object
    yield (
        "sampling: shared prompt cache",
        work.sample,
        work.sample_without_sharing,
        nullcontext,
    )
    yield (
        "sampling: eviction of finished responses",
        work.sample,
        work.sample,
        lambda: patch(engine, "end_tokens", ()),
    )
    with_no_grad = torch.no_grad()(LocalEngine.generate.__wrapped__)  # type: ignore[attr-defined]
    yield (
        "sampling: inference mode",
        work.sample,
        work.sample,
        lambda: patch(LocalEngine, "generate", with_no_grad),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--only", default="*", help="measure the optimizations whose names match this pattern"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        write_world(world, SIZES[options.size], prompt_tokens=options.prompt)
        work = Work(world)
        print(f"| {options.size}, prompts of {options.prompt} | gain | from – to |\n|---|---|---|")
        for name, optimized, unoptimized, without in comparisons(work):
            if not fnmatch(name, options.only):
                continue
            costs = measure(optimized, unoptimized, without, options.repetitions)
            ratios = [cost_without / cost_with for cost_with, cost_without in costs]
            median = statistics.median(ratios)
            print(f"| {name} | {median:.2f}× | {min(ratios):.2f} – {max(ratios):.2f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
