"""Measure what skipped forward passes save: each optimization disabled and enabled in turn.

    python benchmarks/passes.py [--repeat 3] [--only old,groups,cache,split,peak]

The model is a Qwen2 with random weights (width 128, 4 layers, 512 tokens). Prompts have 64 tokens
and responses 1 to 64; everything runs on one thread. The script prints one Markdown table per
optimization. It has the model FLOPs of a training step, which are the same in every repetition, and
the CPU seconds of the stages after sampling, the minimum of the repetitions. For the splitting into
micro-batches it also has the memory that they need.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent / "speed"))

import torch
from torch import Tensor
from worlds import S, write_world

from trivium.algorithms import actor_critic, dpo, grpo, ppo
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.data.batch import Batch, Grouped
from trivium.data.group import Group
from trivium.data.oom import score_logprobs
from trivium.hf.model_config import ModelConfig
from trivium.maths.ragged import segment_starts
from trivium.models.policy import Policy
from trivium.runs.peak_memory import PeakMemory, return_freed_memory
from trivium.runs.store import read_metrics
from trivium.training import run_loop
from trivium.training.experience import Experience, first_epoch_micro_batches

REWARDS = """
def mixed(prompts, responses):
    return [float(len(r)) for r in responses]

def half(prompts, responses):
    # Half of the groups have equal rewards, as for tasks that are solved or too hard.
    return [float(len(r)) if sum(map(ord, p)) % 2 else 1.0 for p, r in zip(prompts, responses)]
"""
STEPS = 3


class CpuSeconds:
    """CPU seconds of the stages after sampling."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Add the stages of the runs inside the block."""
        began, lap = [0.0], run_loop.Stopwatch.lap

        def begin(stopwatch: Any) -> None:
            began[0] = time.process_time()

        def counted(stopwatch: Any, stage: str) -> None:
            now = time.process_time()
            self.seconds += now - began[0]
            began[0] = now
            lap(stopwatch, stage)

        with (
            mock.patch.object(run_loop.Stopwatch, "begin", begin),
            mock.patch.object(run_loop.Stopwatch, "lap", counted),
        ):
            yield


class World:
    """A checkpoint and data, with runs that train on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        write_world(directory / "S", S, prompt_tokens=64, rows=256)
        (directory / "rewards.py").write_text(REWARDS)
        self.runs = 0

    def common(self) -> dict[str, Any]:
        self.runs += 1
        return {
            "model": {"path": str(self.directory / "S" / "model"), "device": "cpu"},
            "data": {"path": str(self.directory / "S" / "data.jsonl")},
            "run": {"directory": str(self.directory / f"run-{self.runs}")},
            "tokens_per_micro_batch": 4096,
        }

    def on_policy(self, reward: str, **options: Any) -> dict[str, Any]:
        rewards = [{"function": f"{self.directory / 'rewards.py'}:{reward}", "timeout": None}]
        return {
            **self.common(),
            "rewards": rewards,
            "sampling": {"max_tokens": 64},
            "prompts_per_step": 16,
            **options,
        }

    def grpo(self, reward: str = "mixed", **options: Any) -> Path:
        settings = self.on_policy(reward, responses_per_prompt=8, steps_per_iteration=STEPS)
        return grpo.train(GRPOConfig.model_validate(settings | options))

    def ppo(self, **options: Any) -> Path:
        settings = self.on_policy("mixed", responses_per_prompt=4, steps=STEPS)
        return ppo.train(PPOConfig.model_validate(settings | options))

    def dpo(self, **options: Any) -> Path:
        settings = self.common() | {"pairs_per_step": 32, "epochs": 1.0}
        return dpo.train(DPOConfig.model_validate(settings | options))


def compare(
    name: str,
    run: Callable[[], Path],
    without: Callable[[], Any],
    repeat: int,
) -> None:
    """Print a row: the run with the optimization, and without it, patched by ``without``."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    cost: dict[bool, float] = {}
    for _ in range(repeat):
        for enabled in (False, True):
            cpu = CpuSeconds()
            patches = nullcontext() if enabled else without()
            with cpu.counting(), redirect_stdout(StringIO()), patches:
                path = run()
            seconds[enabled].append(cpu.seconds / STEPS)
            cost[enabled] = sum(m["flops"] for m in read_metrics(path)) / STEPS / 1e9
    flops_saved = 1 - cost[True] / cost[False]
    time_saved = 1 - min(seconds[True]) / min(seconds[False])
    print(
        f"| {name} | {cost[False]:.1f} | {cost[True]:.1f} | {flops_saved:.0%} "
        f"| {min(seconds[False]):.2f} | {min(seconds[True]):.2f} | {time_saved:.0%} |",
        flush=True,
    )


def print_header(title: str) -> None:
    """Print the header of a table."""
    print(f"\n| {title} | GFLOP, computed | skipped | saved | CPU s, computed | skipped | saved |")
    print("|---|---|---|---|---|---|---|")


# --- π_old ----------------------------------------------------------------------------------------


def score_whole_batch(data: Any, steps: Any, sampler_T: Tensor, policy: Any, **_: Any) -> Any:
    """Return π_old's log-probs from a forward pass over the whole batch."""
    micro_batches = first_epoch_micro_batches(steps, len(data.lengths_N))
    return score_logprobs(policy, data, micro_batches), torch.ones(len(sampler_T), dtype=torch.bool)


@contextmanager
def with_old_policy_pass() -> Iterator[None]:
    """Enable the separate forward pass for π_old."""
    with (
        mock.patch.object(grpo, "old_logprobs", score_whole_batch),
        mock.patch.object(actor_critic, "old_logprobs", score_whole_batch),
    ):
        yield


def old(world: World, repeat: int) -> None:
    """Measure the separate forward pass for π_old."""
    print_header("π_old")
    cases = {
        "GRPO, μ = 4, 1 minibatch, β = 0.04": partial(world.grpo, epochs=4),
        "GRPO, μ = 1, 4 minibatches, β = 0": partial(world.grpo, minibatches=4, beta=0.0),
        "GRPO, μ = 1, 4 minibatches, β = 0.04": partial(world.grpo, minibatches=4),
        "PPO, μ = 4, 1 minibatch, β = 0": partial(world.ppo, epochs=4, minibatches=1, beta=0.0),
    }
    for name, run in cases.items():
        compare(name, run, with_old_policy_pass, repeat)


# --- Groups without a gradient --------------------------------------------------------------------


def groups(world: World, repeat: int) -> None:
    """Measure the passes over groups of equal rewards."""
    print_header("groups without a gradient")
    compare(
        "GRPO, β = 0, half of the groups have equal rewards",
        partial(world.grpo, "half", beta=0.0),
        partial(mock.patch.object, Experience, "without_gradient", return_value=[]),
        repeat,
    )


# --- The reference's log-probs on disk ------------------------------------------------------------


def cache(world: World, repeat: int) -> None:
    """Measure the reference's pass over all pairs, which later runs read from disk."""
    print("\n| DPO | before the first step, CPU s |\n|---|---|")
    with redirect_stdout(StringIO()):
        world.dpo()
    seconds_by_source: dict[str, list[float]] = {"scored": [], "read": []}
    for _ in range(repeat):
        for name in seconds_by_source:
            config = DPOConfig.model_validate(world.common() | {"reference_cache": name == "read"})
            source = dpo.Offline(config)
            policy = Policy.load(config.model)
            began = time.process_time()
            source.prepare(policy, dpo.Reference(policy, enabled=False))
            seconds_by_source[name].append(time.process_time() - began)
    for name, seconds in seconds_by_source.items():
        print(f"| {name} | {min(seconds):.2f} |", flush=True)


# --- Micro-batches --------------------------------------------------------------------------------


def greedy(data: Grouped, max_tokens: int) -> list[list[int]]:
    """Return micro-batches filled up to the token limit, from the shortest group to the longest."""
    first_G = segment_starts(data.sizes_G).tolist()
    longest = [max(map(len, g.responses)) + len(g.prompt) for g in data.groups]
    micro_batches: list[list[int]] = [[]]
    used, last = 0, -1
    for g in sorted(range(len(data.groups)), key=lambda g: (longest[g], g)):
        for j, response in enumerate(data.groups[g].responses):
            prompt = len(data.groups[g].prompt)
            added = len(response) + (0 if last == g else prompt)
            if micro_batches[-1] and used + added > max_tokens:
                micro_batches.append([])
                used, added = 0, len(response) + prompt
            micro_batches[-1].append(first_G[g] + j)
            used, last = used + added, g
    return [sorted(indices) for indices in micro_batches]


def ragged(kind: str) -> Grouped:
    """Return groups of 8 short or long responses of varied lengths."""
    rng = random.Random(1)
    if kind == "short":
        prompts, lengths = (16, 256), lambda: rng.randint(1, 64)
    else:
        prompts, lengths = (32, 128), lambda: min(512, 1 + int(rng.lognormvariate(4.3, 0.8)))
    count = 16 if kind == "short" else 8
    return Grouped(
        [
            Group([5] * rng.randint(*prompts), [[7] * lengths() for _ in range(8)])
            for _ in range(count)
        ]
    )


def learn(policy: Policy, micro_batches: list[Grouped]) -> None:
    """Run the forward and backward pass of every micro-batch."""
    for micro_batch in micro_batches:
        policy.score(Batch.of(micro_batch.groups)).logprobs_T.sum().backward()


SPLITS = {"filled": greedy, "even": Grouped.split}
TOKEN_LIMITS = (("short", 1024), ("short", 4096), ("long", 2048), ("long", 4096))


def compare_splits(
    world: World, unit: str, measure: Callable[[Policy, list[Grouped]], str]
) -> None:
    """Compare micro-batches of even work with micro-batches filled up to the token limit.

    The first pass is not measured, because oneDNN creates its kernels there.
    """
    policy = Policy.load(ModelConfig(path=str(world.directory / "S" / "model"), device="cpu"))
    title = f"responses | token limit | split | micro-batches | tokens | largest | {unit}"
    print(f"\n| {title} |\n|{'---|' * 7}")
    for kind, limit in TOKEN_LIMITS:
        data = ragged(kind)
        for name, split in SPLITS.items():
            batches = [data.select(indices) for indices in split(data, limit)]
            tokens = [batch.tokens for batch in batches]
            learn(policy, batches)
            print(
                f"| {kind} | {limit} | {name} | {len(batches)} | {sum(tokens)} | {max(tokens)} "
                f"| {measure(policy, batches)} |",
                flush=True,
            )


def split_time(world: World, repeat: int) -> None:
    """Measure the time that micro-batches take."""

    def measure(policy: Policy, micro_batches: list[Grouped]) -> str:
        seconds = []
        for _ in range(repeat):
            began = time.process_time()
            learn(policy, micro_batches)
            seconds.append(time.process_time() - began)
        return f"{min(seconds):.2f}"

    compare_splits(world, "CPU s", measure)


def split_memory(world: World, repeat: int) -> None:
    """Measure the memory that micro-batches need, with freed blocks returned to the system."""
    return_freed_memory()

    def measure(policy: Policy, micro_batches: list[Grouped]) -> str:
        peaks = []
        for _ in range(repeat):
            memory = PeakMemory(torch.device("cpu"))
            learn(policy, micro_batches)
            peaks.append(memory.bytes() / 2**20)
        return f"{max(peaks):.0f}"

    compare_splits(world, "peak, MiB", measure)


MEASUREMENTS = {
    "old": old,
    "groups": groups,
    "cache": cache,
    "split": split_time,
    "peak": split_memory,
}


def main() -> int:
    """Run the chosen measurements, each in its own process if there are several.

    A measurement fragments the heap, so a second one in the same process would seem to need more
    memory.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default=",".join(MEASUREMENTS))
    options = parser.parse_args()
    names = options.only.split(",")
    if len(names) > 1:
        for name in names:
            command = [sys.executable, __file__, "--only", name, "--repeat", str(options.repeat)]
            subprocess.run(command, check=True)
        return 0
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIVIUM_CACHE"] = str(Path(folder) / "cache")
        MEASUREMENTS[options.only](World(Path(folder)), options.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
