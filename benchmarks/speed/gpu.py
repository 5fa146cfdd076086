"""Measure Trivium on one GPU: tokens per second and model FLOPs utilization.

    python benchmarks/speed/gpu.py [--peak-tflops 989]

A Qwen2 with half a billion random weights in bfloat16 samples 8 responses to each of 32 prompts and
trains on them with GRPO, first without and then with CUDA graphs for sampling. The model FLOPs per
second (``trivium.models.flops``) are divided by the GPU's peak, which is given as an option or
measured with a product of large matrices. Without a GPU the script prints a message and measures
nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ours import REWARD
from worlds import Size, write_world

from trivium.algorithms import grpo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.models import flops
from trivium.rollout.local_engine import LocalEngine
from trivium.runs.store import read_metrics

HALF_A_BILLION = Size(width=1024, layers=32, vocabulary=151_936)
PROMPT, RESPONSE, PROMPTS, SAMPLES, STEPS = 512, 512, 32, 8, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of the GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("PyTorch finds no GPU on this machine: nothing was measured")
        return
    peak = options.peak_tflops or measured_peak()
    print(f"{torch.cuda.get_device_name()}, peak {peak:.0f} TFLOP/s in bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        write_world(world, HALF_A_BILLION, prompt_tokens=PROMPT, response_tokens=RESPONSE)
        for graphs in (False, True):
            report(peak, graphs, *train(world, graphs))


def report(peak: float, graphs: bool, sampling: float, steps: list[dict[str, float]]) -> None:
    """Print the tokens per second and the FLOPs utilization of each stage."""
    tokens = fmean(step["tokens/generated"] for step in steps)
    learning = fmean(step["flops"] for step in steps) - sampling
    for stage, cost in {"rollout": sampling, "update": learning}.items():
        seconds = fmean(step[f"time/{stage}"] for step in steps)
        result = {
            "stage": stage,
            "cuda_graphs": graphs,
            "tokens_per_second": tokens / seconds,
            "flops_share": cost / seconds / (peak * 1e12),
        }
        print(json.dumps(result))


def measured_peak(size: int = 8192) -> float:
    """Return the TFLOP/s of a product of two square bfloat16 matrices, the best of ten."""
    left, right = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        torch.cuda.synchronize()
        best = max(best, 2e-12 * size**3 / (time.perf_counter() - began))
    return best


def train(world: Path, graphs: bool) -> tuple[float, list[dict[str, float]]]:
    """Return the FLOPs of sampling and the steps' metrics, without the warm-up step."""
    generate, costs = LocalEngine.generate, list[float]()
    model = {"path": str(world / "model"), "dtype": "bfloat16", "device": "cuda"}

    def counted(self: LocalEngine, *args: Any, **kwargs: Any) -> Any:
        before = flops.total()
        responses = generate(self, *args, **kwargs)
        costs.append(flops.total() - before)
        return responses

    LocalEngine.generate = counted
    config = {
        "model": model | {"cuda_graphs": graphs},
        "data": {"path": str(world / "data.jsonl")},
        "rewards": [{"function": f"{REWARD}:share_of_a"}],
        "run": {"directory": str(world / f"run-{graphs}"), "checkpoints": {"seconds": 1e6}},
        "sampling": {"max_tokens": RESPONSE},
        "optimizer": {"learning_rate": 1e-8},
        "prompts_per_step": PROMPTS,
        "responses_per_prompt": SAMPLES,
        "steps_per_iteration": STEPS,
        "beta": 0.0,
    }
    try:
        steps = read_metrics(grpo.train(GRPOConfig.model_validate(config)))
    finally:
        LocalEngine.generate = generate
    return fmean(costs[1:]), steps[1:]


if __name__ == "__main__":
    main()
