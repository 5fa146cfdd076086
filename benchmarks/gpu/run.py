"""Measure one GPU: parity of every fast path, speed by length, GRPO beside TRL. See gpu.sh."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import parity
import speed
from sizes import LARGE, SMALL, TINY, Qwen, write_world

from trivium.algorithms import grpo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.runs.store import read_metrics

HERE = Path(__file__).resolve().parent
REWARD = HERE.parent / "speed" / "reward.py"


@dataclass(frozen=True)
class Sizes:
    """Sizes of one kind of machine.

    Attributes:
        tokens: lengths of packed sequences and of prompts.
        new: tokens sampled after a prompt.
        grpo: prompts, responses per prompt, tokens of a response, steps of a GRPO run.
        matrix: width of the matrices whose product gives the peak.
    """

    models: dict[str, Qwen]
    tokens: tuple[int, ...]
    new: int
    grpo: tuple[int, int, int, int]
    matrix: int


GPU = Sizes({"0.5B": SMALL, "1.5B": LARGE}, (1_024, 8_192, 16_384), 256, (32, 8, 512, 3), 8_192)
CPU = Sizes({"tiny": TINY}, (64, 128), 8, (4, 4, 8, 2), 256)


def main() -> int:
    """Measure, print a line for each result, and write the JSON file; 1 if a path differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=Path("gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--trl", type=Path, help="interpreter of an environment with TRL")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("PyTorch finds no GPU here: --tiny tries the script on the CPU")
        return 2
    device = torch.device("cpu" if options.tiny else "cuda")
    began = time.perf_counter()
    result = measure(device, CPU if options.tiny else GPU, options.trl)
    result["seconds"] = time.perf_counter() - began
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    agree = sum(check["passed"] for check in result["parity"])
    print(f"{options.output}: {agree} of {len(result['parity'])} paths agree")
    return 0 if agree == len(result["parity"]) else 1


def measure(device: torch.device, sizes: Sizes, trl: Path | None) -> dict[str, Any]:
    """Return everything that is measured."""
    peak = speed.measured_peak(device, sizes.matrix)
    result: dict[str, Any] = {"machine": machine(device) | {"peak_flops": peak}}
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "parity"
        write_world(world, TINY, prompt_tokens=16, response_tokens=24, scorer=False)
        result["parity"] = shown(parity.checks(world, device))
        result["speed"], result["grpo"] = [], []
        for name, size in sizes.models.items():
            world, prompt, response = Path(folder) / name, sizes.tokens[0] // 2, sizes.grpo[2]
            write_world(world, size, prompt_tokens=prompt, response_tokens=response, scorer=False)
            result["speed"] += shown(
                speed.lengths(world, name, device, sizes.tokens, peak, sizes.new)
            )
            result["grpo"] += shown(grpo_steps(world, name, device, sizes.grpo, trl))
    return result


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures are true for."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def shown(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records, each printed as soon as it is there."""
    found = []
    for record in records:
        print(json.dumps(record), flush=True)
        found.append(record)
    return found


# --- GRPO -----------------------------------------------------------------------------------------


def grpo_steps(
    world: Path, name: str, device: torch.device, numbers: tuple[int, ...], trl: Path | None
) -> Iterator[dict[str, Any]]:
    """Yield the seconds of GRPO steps: Trivium's without and with CUDA graphs, and TRL's."""
    for graphs in (False, True) if device.type == "cuda" else (False,):
        yield {"model": name, "side": "trivium", "cuda_graphs": graphs} | ours(
            world, device, numbers, graphs
        )
    if trl is not None:
        command = [trl, HERE / "trl_grpo.py", world, device.type, *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, text=True)
        record = (
            {"error": done.stderr[-500:]}
            if done.returncode
            else {"seconds": fmean(json.loads(done.stdout.splitlines()[-1])["seconds"])}
        )
        yield {"model": name, "side": "trl"} | record


def ours(
    world: Path, device: torch.device, numbers: tuple[int, ...], graphs: bool
) -> dict[str, Any]:
    """Return the mean seconds of a step and of its stages, without the first step."""
    prompts, samples, response, steps = numbers
    config = {
        "model": {
            "path": str(world / "model"),
            "device": device.type,
            "dtype": "bfloat16" if device.type == "cuda" else "float32",
            "cuda_graphs": graphs,
        },
        "data": {"path": str(world / "data.jsonl")},
        "rewards": [{"function": f"{REWARD}:share_of_a"}],
        "run": {"directory": str(world / f"run-{graphs}"), "checkpoints": {"seconds": 1e6}},
        "sampling": {"max_tokens": response},
        "optimizer": {"learning_rate": 1e-8},
        "prompts_per_step": prompts,
        "responses_per_prompt": samples,
        "steps_per_iteration": steps + 1,
        "beta": 0.0,
    }
    lines = read_metrics(grpo.train(GRPOConfig.model_validate(config)))[1:]
    stages = {
        key.removeprefix("time/"): fmean(line[key] for line in lines)
        for key in lines[0]
        if key.startswith("time/") and key != "time/total"
    }
    return {
        "seconds": fmean(line["time/total"] for line in lines),
        "stages": stages,
        "tokens": fmean(line["tokens/generated"] for line in lines),
    }


if __name__ == "__main__":
    sys.exit(main())
