"""Count the operations of fixed workloads: a regression check that does not depend on timing.

    python benchmarks/operations.py [--record]

The script counts PyTorch operations while a small model samples and while it trains on groups and
on pairs: calls that compute (views are free), numbers that they write, and FLOPs of matrix products
and attention, padding included. It prints the counts and compares them with ``operations.json``.
The exit status is 1 if a count is more than 2 % above the recorded one, or more than 10 % below it,
in which case ``--record`` saves the better count. ``tests/benchmarks/test_operations.py`` runs the
script in CI. The matrix products are PyTorch's own, so that all machines agree.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from trivium.data.batch import Batch
from trivium.data.group import Group
from trivium.models.cpu.linear import matmul_backend
from trivium.models.policy import Policy
from trivium.rollout.kv_cache import KVCache

RECORDED = Path(__file__).with_suffix(".json")
MAX_RATIO, MIN_RATIO = 1.02, 0.9
Counts = dict[str, int]


class Counter(TorchDispatchMode):
    """Dispatch mode that counts the operations run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = {"calls": 0, "written": 0, "flops": 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.counts["calls"] += 1
            self.counts["written"] += sum(
                x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)
            )
            self.counts["flops"] += flops_of(func.overloadpacket.__name__, args)
        return out


def flops_of(name: str, args: tuple[Any, ...]) -> int:
    """Return the FLOPs of a matrix product or attention; other operations count as 0."""
    if name in ("mm", "bmm"):
        return 2 * args[0].numel() * args[1].shape[-1]
    if name == "addmm":
        return 2 * args[1].numel() * args[2].shape[-1]
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return 4 * args[0].numel() * args[1].shape[-2]
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return 10 * args[1].numel() * args[2].shape[-2]
    return 0


def policy() -> Policy:
    """Return a small Qwen2 with random weights, in float64 so that rounding has no effect."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return Policy(Qwen2ForCausalLM(config).double(), PreTrainedTokenizerBase())


def groups(responses: int) -> list[Group]:
    """Return eight prompts of 60 to 95 tokens with responses of evenly spread lengths, 1 to 64."""
    return [
        Group(
            [2 + i for i in range(60 + 5 * g)],
            [[3] * (1 + (g * responses + r) * 37 % 64) for r in range(responses)],
        )
        for g in range(8)
    ]


def learn(model: Policy, batch: list[Group]) -> None:
    """Run one forward and backward pass."""
    model.score(Batch.of(batch)).logprobs_T.sum().backward()
    model.model.zero_grad(set_to_none=True)


@torch.no_grad()
def sample(model: Policy, prompt: int) -> None:
    """Decode eight responses to each of eight prompts; every fourth step, eight responses end."""
    cache, head = KVCache(model), model.head
    cache.admit([[2 + i for i in range(prompt)]] * 8, 8)
    rows = 64
    for step in range(28):
        head.logits(cache.advance(torch.full((rows,), 3)))
        if step % 4 == 3 and rows > 8:
            cache.keep([r for r in range(rows) if r % (rows // 8)])
            rows -= 8


def measure() -> dict[str, Counts]:
    """Return the counts of every workload."""
    model, before = policy(), matmul_backend.name
    model.decode_model()
    cases: dict[str, Callable[[], None]] = {
        "learn from groups of 8": lambda: learn(model, groups(8)),
        "learn from pairs": lambda: learn(model, groups(2)),
        "learn from single responses": lambda: learn(model, groups(1)),
        "sample after short prompts": lambda: sample(model, 32),
        "sample after long prompts": lambda: sample(model, 256),
    }
    counts_by_case = {}
    matmul_backend.use("torch")
    try:
        for name, workload in cases.items():
            with Counter() as counter:
                workload()
            counts_by_case[name] = counter.counts
    finally:
        matmul_backend.use(before)
    return counts_by_case


def faults(measured: dict[str, Counts], recorded: dict[str, Counts]) -> list[str]:
    """Return a message for every count that is above the recorded one or far below it."""
    messages = []
    for name, counts in measured.items():
        for kind, count in counts.items():
            before = recorded.get(name, {}).get(kind, math.nan)
            if not MIN_RATIO * before <= count <= MAX_RATIO * before:
                messages.append(f"{name}: {count:,} {kind}, recorded: {before:,}")
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="save the counts to operations.json")
    counts_by_case = measure()
    if parser.parse_args().record:
        RECORDED.write_text(json.dumps(counts_by_case, indent=1) + "\n")
    recorded = json.loads(RECORDED.read_text())
    for name, counts in counts_by_case.items():
        print(f"{name}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))
    messages = faults(counts_by_case, recorded)
    if messages:
        sys.exit("\n".join(messages))


if __name__ == "__main__":
    main()
