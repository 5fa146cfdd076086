"""What fixed pieces of work cost in operations: a regression check that no busy machine disturbs.

    python benchmarks/operations.py [--record]

Counts what PyTorch is asked for while a small model samples, and while it learns from groups and
from pairs: calls that compute (views are free), numbers that they write, and FLOPs of products and
attention, padding included. Prints them beside those in ``operations.json``; exit status 1 if any
is more than 2 % above, or more than 10 % below, when ``--record`` should keep the better number.
``tests/benchmarks/test_operations.py`` runs it in CI. Products are PyTorch's own, so that machines agree.
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
MORE, LESS = 1.02, 0.9
Counts = dict[str, int]


class Counter(TorchDispatchMode):
    """Counts the operations that are carried out while it is on."""

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
    """Of products and attention; everything else counts as none."""
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
    """A small Qwen2 with random weights, in float64 so that rounding decides nothing."""
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
    """Eight prompts of 60 to 95 tokens, with responses of 1 to 64 tokens that spread evenly."""
    return [
        Group(
            [2 + i for i in range(60 + 5 * g)],
            [[3] * (1 + (g * responses + r) * 37 % 64) for r in range(responses)],
        )
        for g in range(8)
    ]


def learn(model: Policy, chosen: list[Group]) -> None:
    """One forward and backward pass."""
    model.score(Batch.of(chosen)).logprobs_T.sum().backward()
    model.model.zero_grad(set_to_none=True)


@torch.no_grad()
def sample(model: Policy, prompt: int) -> None:
    """Eight prompts, eight rows each; every fourth step, eight of the rows end."""
    cache, head = KVCache(model, shared_prefix=prompt > 64), model.head.packed()
    cache.admit([[2 + i for i in range(prompt)]] * 8, 8)
    rows = 64
    for step in range(28):
        head.logits(cache.advance(torch.full((rows,), 3)))
        if step % 4 == 3 and rows > 8:
            cache.keep([r for r in range(rows) if r % (rows // 8)])
            rows -= 8


def measure() -> dict[str, Counts]:
    """The counts of every case."""
    model, before = policy(), matmul_backend.name
    model.decode_model()
    cases: dict[str, Callable[[], None]] = {
        "learn from groups of 8": lambda: learn(model, groups(8)),
        "learn from pairs": lambda: learn(model, groups(2)),
        "learn from single responses": lambda: learn(model, groups(1)),
        "sample after short prompts": lambda: sample(model, 32),
        "sample after long prompts": lambda: sample(model, 256),
    }
    found = {}
    matmul_backend.use("torch")
    try:
        for name, work in cases.items():
            with Counter() as counter:
                work()
            found[name] = counter.counts
    finally:
        matmul_backend.use(before)
    return found


def faults(found: dict[str, Counts], recorded: dict[str, Counts]) -> list[str]:
    """What costs more than is recorded, or so much less that it should be recorded."""
    told = []
    for name, counts in found.items():
        for kind, count in counts.items():
            before = recorded.get(name, {}).get(kind, math.nan)
            if not LESS * before <= count <= MORE * before:
                told.append(f"{name}: {count:,} {kind}, recorded are {before:,}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="keep what is found")
    found = measure()
    if parser.parse_args().record:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    recorded = json.loads(RECORDED.read_text())
    for name, counts in found.items():
        print(f"{name}: " + ", ".join(f"{n:,} {kind}" for kind, n in counts.items()))
    told = faults(found, recorded)
    if told:
        sys.exit("\n".join(told))


if __name__ == "__main__":
    main()
