"""What the passes that are not made would cost: each saving switched off and on, in turn.

    python benchmarks/passes.py [--repeat 3] [--only old,groups,cache,cut,peak]

A Qwen2 of random weights (width 128, 4 layers, 512 tokens), prompts of 64 tokens and responses of 1
to 64, on one thread. Prints one Markdown table per saving: model FLOPs of a training step, which
are the same in every repetition, and the process's CPU seconds of what comes after sampling, the
least of the repetitions; for the cutting of micro-batches also the memory that they need.
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
from helpers.tiny_models import S, write_world
from torch import Tensor

from trivium.algorithms import actor_critic, dpo, grpo, ppo
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.data.batch import Batch, Grouped
from trivium.data.group import Group
from trivium.maths.ragged import segment_starts
from trivium.models.model_config import ModelConfig
from trivium.models.oom import score_logprobs
from trivium.models.policy import Policy
from trivium.runs.peak_memory import PeakMemory, return_freed_memory
from trivium.runs.store import read_metrics
from trivium.training import run_loop
from trivium.training.experience import Experience, first_epoch_micro_batches

REWARDS = """
def mixed(prompts, responses):
    return [float(len(r)) for r in responses]

def half(prompts, responses):
    # Half of the groups are of equal rewards, as where a task is solved or out of reach.
    return [float(len(r)) if sum(map(ord, p)) % 2 else 1.0 for p, r in zip(prompts, responses)]
"""
STEPS = 3


class Spent:
    """CPU seconds of the stages after sampling."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the stages of the runs in the block."""
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
    """A checkpoint and data, and runs over them."""

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
        given = self.on_policy(reward, responses_per_prompt=8, steps_per_iteration=STEPS)
        return grpo.train(GRPOConfig.model_validate(given | options))

    def ppo(self, **options: Any) -> Path:
        given = self.on_policy("mixed", responses_per_prompt=4, steps=STEPS)
        return ppo.train(PPOConfig.model_validate(given | options))

    def dpo(self, **options: Any) -> Path:
        given = self.common() | {"pairs_per_step": 32, "epochs": 1.0}
        return dpo.train(DPOConfig.model_validate(given | options))


def compared(
    name: str,
    run: Callable[[], Path],
    without: Callable[[], Any],
    repeat: int,
) -> None:
    """Print a case's row: the run as it is, and inside ``without``'s patches."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    cost: dict[bool, float] = {}
    for _ in range(repeat):
        for saving in (False, True):
            spent = Spent()
            around = nullcontext() if saving else without()
            with spent.counting(), redirect_stdout(StringIO()), around:
                path = run()
            seconds[saving].append(spent.seconds / STEPS)
            cost[saving] = sum(m["flops"] for m in read_metrics(path)) / STEPS / 1e9
    flop, cpu = (1 - cost[True] / cost[False]), 1 - min(seconds[True]) / min(seconds[False])
    print(
        f"| {name} | {cost[False]:.1f} | {cost[True]:.1f} | {flop:.0%} "
        f"| {min(seconds[False]):.2f} | {min(seconds[True]):.2f} | {cpu:.0%} |",
        flush=True,
    )


def head(title: str) -> None:
    """Print a table's head."""
    print(f"\n| {title} | GFLOP, made | spared | less | CPU s, made | spared | less |")
    print("|---|---|---|---|---|---|---|")


# --- π_old ----------------------------------------------------------------------------------------


def score_all_of_it(data: Any, steps: Any, sampler_T: Tensor, policy: Any, **_: Any) -> Any:
    """π_old's log-probs from a pass over the whole batch."""
    parts = first_epoch_micro_batches(steps, len(data.lengths_N))
    return score_logprobs(policy, data, parts), torch.ones(len(sampler_T), dtype=torch.bool)


@contextmanager
def old_policy_is_scored() -> Iterator[None]:
    """Make the pass for π_old."""
    with (
        mock.patch.object(grpo, "old_logprobs", score_all_of_it),
        mock.patch.object(actor_critic, "old_logprobs", score_all_of_it),
    ):
        yield


def old(world: World, repeat: int) -> None:
    """The pass for π_old."""
    head("π_old")
    cases = {
        "GRPO, μ = 4, 1 minibatch, β = 0.04": partial(world.grpo, epochs=4),
        "GRPO, μ = 1, 4 minibatches, β = 0": partial(world.grpo, minibatches=4, beta=0.0),
        "GRPO, μ = 1, 4 minibatches, β = 0.04": partial(world.grpo, minibatches=4),
        "PPO, μ = 4, 1 minibatch, β = 0": partial(world.ppo, epochs=4, minibatches=1, beta=0.0),
    }
    for name, run in cases.items():
        compared(name, run, old_policy_is_scored, repeat)


# --- Groups without a gradient --------------------------------------------------------------------


def groups(world: World, repeat: int) -> None:
    """Passes over groups of equal rewards."""
    head("groups without a gradient")
    compared(
        "GRPO, β = 0, half of the groups of equal rewards",
        partial(world.grpo, "half", beta=0.0),
        partial(mock.patch.object, Experience, "without_gradient", return_value=[]),
        repeat,
    )


# --- The reference's log-probs on disk ------------------------------------------------------------


def cache(world: World, repeat: int) -> None:
    """The reference's pass over all pairs, for the second and further runs."""
    print("\n| DPO | before the first step, CPU s |\n|---|---|")
    with redirect_stdout(StringIO()):
        world.dpo()
    found: dict[str, list[float]] = {"scored": [], "read": []}
    for _ in range(repeat):
        for name in found:
            config = DPOConfig.model_validate(world.common() | {"reference_cache": name == "read"})
            source = dpo.Offline(config)
            policy = Policy.load(config.model)
            began = time.process_time()
            source.prepare(policy, dpo.Reference(policy, asked=False))
            found[name].append(time.process_time() - began)
    for name, seconds in found.items():
        print(f"| {name} | {min(seconds):.2f} |", flush=True)


# --- Micro-batches --------------------------------------------------------------------------------


def greedy(data: Grouped, max_tokens: int) -> list[list[int]]:
    """Micro-batches filled to the brim, from the shortest group to the longest."""
    first_G = segment_starts(data.sizes_G).tolist()
    longest = [max(map(len, g.responses)) + len(g.prompt) for g in data.groups]
    parts: list[list[int]] = [[]]
    used, last = 0, -1
    for g in sorted(range(len(data.groups)), key=lambda g: (longest[g], g)):
        for j, response in enumerate(data.groups[g].responses):
            prompt = len(data.groups[g].prompt)
            more = len(response) + (0 if last == g else prompt)
            if parts[-1] and used + more > max_tokens:
                parts.append([])
                used, more = 0, len(response) + prompt
            parts[-1].append(first_G[g] + j)
            used, last = used + more, g
    return [sorted(part) for part in parts]


def ragged(kind: str) -> Grouped:
    """Groups of 8 with short or with long responses, whose lengths spread."""
    drawn = random.Random(1)
    if kind == "short":
        prompts, lengths = (16, 256), lambda: drawn.randint(1, 64)
    else:
        prompts, lengths = (32, 128), lambda: min(512, 1 + int(drawn.lognormvariate(4.3, 0.8)))
    count = 16 if kind == "short" else 8
    return Grouped(
        [
            Group([5] * drawn.randint(*prompts), [[7] * lengths() for _ in range(8)])
            for _ in range(count)
        ]
    )


def learn(policy: Policy, parts: list[Grouped]) -> None:
    """Forward and backward pass of every micro-batch."""
    for part in parts:
        policy.score(Batch.of(part.groups)).logprobs_T.sum().backward()


CUTS = {"to the brim": greedy, "even": Grouped.split}
BOUNDS = (("short", 1024), ("short", 4096), ("long", 2048), ("long", 4096))


def cuts(world: World, unit: str, measure: Callable[[Policy, list[Grouped]], str]) -> None:
    """One measure of micro-batches of even work and of ones that are filled to the brim.

    A first pass, in which kernels are made for their shapes, is not measured.
    """
    policy = Policy.load(ModelConfig(path=str(world.directory / "S" / "model"), device="cpu"))
    title = f"responses | bound | cut | micro-batches | tokens | largest | {unit}"
    print(f"\n| {title} |\n|{'---|' * 7}")
    for kind, bound in BOUNDS:
        data = ragged(kind)
        for name, split in CUTS.items():
            parts = [data.select(part) for part in split(data, bound)]
            tokens = [part.tokens for part in parts]
            learn(policy, parts)
            print(
                f"| {kind} | {bound} | {name} | {len(parts)} | {sum(tokens)} | {max(tokens)} "
                f"| {measure(policy, parts)} |",
                flush=True,
            )


def cut(world: World, repeat: int) -> None:
    """The time that micro-batches take."""

    def measure(policy: Policy, parts: list[Grouped]) -> str:
        seconds = []
        for _ in range(repeat):
            began = time.process_time()
            learn(policy, parts)
            seconds.append(time.process_time() - began)
        return f"{min(seconds):.2f}"

    cuts(world, "CPU s", measure)


def peak(world: World, repeat: int) -> None:
    """The memory that micro-batches need; freed blocks go back to the system, which takes time."""
    return_freed_memory()

    def measure(policy: Policy, parts: list[Grouped]) -> str:
        peaks = []
        for _ in range(repeat):
            memory = PeakMemory(torch.device("cpu"))
            learn(policy, parts)
            peaks.append(memory.bytes() / 2**20)
        return f"{max(peaks):.0f}"

    cuts(world, "peak, MiB", measure)


SAVINGS = {"old": old, "groups": groups, "cache": cache, "cut": cut, "peak": peak}


def main() -> int:
    """Measure what was asked for, several things in a process each: one leaves holes in the heap,
    and in them the next would seem to need more memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default=",".join(SAVINGS))
    options = parser.parse_args()
    names = options.only.split(",")
    if len(names) > 1:
        for name in names:
            alone = [sys.executable, __file__, "--only", name, "--repeat", str(options.repeat)]
            subprocess.run(alone, check=True)
        return 0
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIVIUM_CACHE"] = str(Path(folder) / "cache")
        SAVINGS[options.only](World(Path(folder)), options.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
