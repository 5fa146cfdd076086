"""The gain of each optimization: the same work with and without it, in turn, in one process.

    python benchmarks/speed/shares.py [--size S|M] [--prompt N] [--repetitions N] [--only PATTERN]

The work is what a step of GRPO does with eight prompts and eight responses each: sampling them, or
a forward and a backward pass over them. Prints a Markdown table of ratios of processor time,
without over with: the median, and the lowest and highest of all repetitions.
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
from trivium.models.attention import hidden_states
from trivium.models.cpu import PIECES, accelerate_for_cpu, prefix_attention
from trivium.models.cpu.linear import matmul_backend
from trivium.models.logprobs import Head
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.rollout.kv_cache import KVCache
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.sampling import Sampling
from trivium.training.setup import local_engine

Without = Callable[[], AbstractContextManager[object]]
Comparison = tuple[str, Callable[[], None], Callable[[], None], Without]
"""An optimization: its name, the work with it, the work without, and what takes it away."""


class Work:
    """A policy with some pieces of the CPU's fast path, and a step's prompts and responses."""

    def __init__(self, world: Path, pieces: frozenset[str] = PIECES) -> None:
        config = ModelConfig(path=str(world / "model"), device="cpu", fast_path="off")
        self.policy, backend = Policy.load(config), matmul_backend.name
        accelerate_for_cpu(self.policy.model, pieces)
        matmul_backend.use(backend)
        data = PromptsConfig(path=str(world / "data.jsonl"))
        self.prompts = load_prompts(data, self.policy.tokenizer)[:8]
        self.engine, self.sampling = local_engine(self.policy), Sampling(max_tokens=64)
        found = self._sampled(self.prompts, 8)
        self.groups = [Group(p.tokens, r) for p, r in zip(self.prompts, found, strict=True)]
        self.optimizers = {
            fused: torch.optim.AdamW(self.policy.model.parameters(), lr=1e-8, fused=fused)
            for fused in (True, False)
        }

    def _sampled(self, prompts: Sequence[Prompt], samples: int) -> list[list[list[int]]]:
        groups = self.engine.generate(prompts, samples, self.sampling, seed=0, step=1)
        return [[response.tokens for response in group] for group in groups]

    def sample(self) -> None:
        self._sampled(self.prompts, 8)

    def sample_alone(self) -> None:
        """Every response reads its prompt itself."""
        self._sampled([prompt for prompt in self.prompts for _ in range(8)], 1)

    def learn(self) -> None:
        self.policy.score(Batch.of(self.groups)).logprobs_T.sum().backward()
        self.policy.model.zero_grad(set_to_none=True)

    def learn_with_whole_logits(self) -> None:
        """The head on all positions, as one table that autograd keeps."""
        batch = Batch.of(self.groups)
        line_LD = hidden_states(self.policy.backbone, batch)
        logits_LV = nn.functional.linear(line_LD, self.policy.head.weight_VD)
        log_p_TV = logits_LV.log_softmax(-1).index_select(0, batch.logit_positions_T)
        log_p_TV.gather(1, batch.targets_T[:, None]).sum().backward()
        self.policy.model.zero_grad(set_to_none=True)

    def move(self, fused: bool) -> None:
        for parameter in self.policy.model.parameters():
            parameter.grad = parameter.detach()
        self.optimizers[fused].step()


@contextmanager
def separate_rows(policy: Policy) -> Iterator[None]:
    """The model's own attention, one padded row per response."""
    model = policy.model
    before = model.config._attn_implementation
    policy.shared = False
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        policy.shared = True
        model.set_attn_implementation(before)


@contextmanager
def torch_products() -> Iterator[None]:
    before = matmul_backend.name
    matmul_backend.use("torch")
    try:
        yield
    finally:
        matmul_backend.use(before)


def measure(
    plain: Callable[[], None], other: Callable[[], None], without: Without, repetitions: int
) -> list[float]:
    """Ratios of processor time, without over with, alternating after one of each."""
    ratios = []
    for i in range(repetitions + 1):
        seconds = []
        for work, around in ((plain, nullcontext), (other, without)):
            with around():
                start = time.process_time()
                work()
                seconds.append(time.process_time() - start)
        if i:
            ratios.append(seconds[1] / seconds[0])
    return ratios


def comparisons(work: Work, world: Path) -> Iterator[Comparison]:
    """Yield all optimizations."""
    yield from of_pieces(work, world)
    yield from of_learning(work)
    yield "optimizer: fused AdamW", partial(work.move, True), partial(work.move, False), nullcontext
    yield from of_sampling(work)


def of_pieces(work: Work, world: Path) -> Iterator[Comparison]:
    for piece in sorted(PIECES):
        other = Work(world, PIECES - {piece})
        without = torch_products if piece == "matmul" else nullcontext
        yield f"learning: {piece}", work.learn, other.learn, without
        yield f"sampling: {piece}", work.sample, other.sample, without


def of_learning(work: Work) -> Iterator[Comparison]:
    policy, lean = work.policy, mock.patch.object
    yield (
        "learning: a prompt once for its responses",
        work.learn,
        work.learn,
        lambda: separate_rows(policy),
    )
    yield (
        "learning: long rows of attention as views",
        work.learn,
        work.learn,
        lambda: lean(prefix_attention, "MIN_UNBATCHED_PAIRS", 1 << 30),
    )
    yield (
        "learning: head at response positions, in chunks",
        work.learn,
        work.learn_with_whole_logits,
        nullcontext,
    )


def of_sampling(work: Work) -> Iterator[Comparison]:
    policy, engine, lean = work.policy, work.engine, mock.patch.object
    yield (
        "sampling: a prompt's cache for all its rows",
        work.sample,
        work.sample_alone,
        nullcontext,
    )
    yield (
        "sampling: finished rows leave",
        work.sample,
        work.sample,
        lambda: lean(engine, "end_tokens", ()),
    )
    kept = torch.no_grad()(LocalEngine.generate.__wrapped__)  # type: ignore[attr-defined]
    yield (
        "sampling: inference mode",
        work.sample,
        work.sample,
        lambda: lean(LocalEngine, "generate", kept),
    )
    yield (
        "sampling: the head's weights packed",
        work.sample,
        work.sample,
        lambda: lean(Head, "packed", lambda head: head),
    )
    together = partial(KVCache, policy, shared_prefix=len(work.prompts[0].tokens) <= 64)
    yield (
        "sampling: long prompts shared by rows, short ones copied",
        work.sample,
        work.sample,
        lambda: lean(LocalEngine, "_cache", lambda *_: together()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="S")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="*", help="lines whose names match this pattern")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        write_world(world, SIZES[given.size], prompt_tokens=given.prompt)
        work = Work(world)
        print(f"| {given.size}, prompts of {given.prompt} | gain | from – to |\n|---|---|---|")
        for name, plain, other, without in comparisons(work, world):
            if not fnmatch(name, given.only):
                continue
            ratios = measure(plain, other, without, given.repetitions)
            middle = statistics.median(ratios)
            print(f"| {name} | {middle:.2f}× | {min(ratios):.2f} – {max(ratios):.2f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
