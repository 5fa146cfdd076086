"""Run one case with Trivium in a separate process: the real training loops, with steps measured.

    python ours.py TASK WORLD OUTPUT

TASK is a case (``cases.py``) as JSON. The loops run as in ``trivium``; only the call that logs a
step is wrapped, to measure the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import meter

from trivium.algorithms import dpo, grpo, ppo, reward_model, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.data.prompts import PromptsConfig, load_prompts
from trivium.hf.model_config import ModelConfig
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.rollout.sampling import Sampling
from trivium.runs.store import read_metrics
from trivium.training.run_loop import Training
from trivium.training.setup import local_engine

REWARD = Path(__file__).parent / "reward.py"
LOOPS: dict[str, tuple[Any, Callable[[Any], Path]]] = {
    "grpo": (GRPOConfig, grpo.train),
    "dpo": (DPOConfig, dpo.train),
    "sft": (SFTConfig, sft.train),
    "reward-model": (RewardModelConfig, reward_model.train),
    "ppo": (PPOConfig, ppo.train),
}


def main() -> None:
    task, world, output = meter.begin()
    measured = meter.Meter(output, memory=task["memory"])
    if task["method"] == "generation":
        generate(task, world, measured)
    else:
        train(task, world, output, measured)
    measured.report()


def train(task: dict[str, Any], world: Path, output: Path, measured: meter.Meter) -> None:
    """Run the training loop, and measure from the moment its models are loaded.

    DPO computes the reference's log-probs before the first step. Each step gets its share of their
    cost, unless the case leaves it out on both sides.
    """
    steps = task["steps"] + task["warm_up"]
    scored: list[tuple[float, float]] = []
    log, enter, prepare = Training.log, Training.__enter__, dpo.Offline.prepare

    def measured_enter(self: Training) -> Training:
        measured.loaded()
        return enter(self)

    def measured_log(self: Training, *args: Any) -> None:
        log(self, *args)
        measured.step()

    def measured_prepare(self: dpo.Offline, *args: Any) -> None:
        began, cost = time.process_time(), flops.total()
        prepare(self, *args)
        if not task["precomputed"]:
            scored.append(((time.process_time() - began) / steps, (flops.total() - cost) / steps))

    Training.__enter__, Training.log = measured_enter, measured_log
    dpo.Offline.prepare = measured_prepare
    config_class, run = LOOPS[task["method"]]
    lines = read_metrics(run(config_class.model_validate(configuration(task, world, output))))
    names = ("tokens/generated", "tokens/trained")
    seconds, cost = scored[0] if scored else (0.0, 0.0)
    measured.note(
        seconds_before=seconds,
        flops=[line["flops"] + cost for line in lines],
        tokens=[sum(line.get(name, 0) for name in names[:1]) or line[names[1]] for line in lines],
        stages={
            name: [line[name] for line in lines]
            for name in lines[0]
            if name.startswith("time/") and name != "time/total"
        },
    )


def configuration(task: dict[str, Any], world: Path, output: Path) -> dict[str, Any]:
    """Return the run's configuration; all other settings are Trivium's defaults."""
    method, steps = task["method"], task["steps"] + task["warm_up"]
    model = {"path": str(world / "model"), "device": "cpu"}
    optimizer = {"learning_rate": 1e-8, "schedule": "constant"}
    common = {
        "model": model,
        "run": {
            "directory": str(output / "run"),
            "seed": task["seed"],
            "checkpoints": {"seconds": 1e6},
        },
        "optimizer": optimizer,
    }
    if task["our_tokens_per_pass"]:
        common["tokens_per_micro_batch"] = task["our_tokens_per_pass"]
    data = {"path": str(world / "data.jsonl")}
    examples = {**data, "limit": task["prompts"] * steps}
    rollouts = {
        **common,
        "data": data,
        "sampling": {"max_tokens": task["response"]},
        "prompts_per_step": task["prompts"],
        "responses_per_prompt": task["samples"],
        "epochs": task["epochs"],
        "minibatches": 1,
        "beta": task["beta"],
    }
    scorer = {"path": str(world / "scorer"), "device": "cpu"}
    return {
        "grpo": {
            **rollouts,
            "rewards": [{"function": f"{REWARD}:share_of_a"}],
            "steps_per_iteration": steps,
        },
        "ppo": {
            **rollouts,
            "rewards": [{"function": "reward_model", "arguments": scorer}],
            "critic": {"model": scorer, "optimizer": optimizer, "clip": 0.2},
            "steps": steps,
        },
        "dpo": {
            **common,
            "data": examples,
            "pairs_per_step": task["prompts"],
            "reference_cache": False,
        },
        "sft": {
            **common,
            "data": {**examples, "columns": {"completion": "chosen"}},
            "examples_per_step": task["prompts"],
        },
        "reward-model": {
            **common,
            "model": scorer,
            "pairs": examples,
            "held_out_share": 0,
            "examples_per_step": task["prompts"],
        },
    }[method]


def generate(task: dict[str, Any], world: Path, measured: meter.Meter) -> None:
    """Sample without training, as the training loops do."""
    policy = Policy.load(ModelConfig(path=str(world / "model"), device="cpu"))
    prompts = load_prompts(PromptsConfig(path=str(world / "data.jsonl")), policy.tokenizer)
    engine = local_engine(policy)
    sampling = Sampling(max_tokens=task["response"])
    measured.loaded()
    tokens, cost = [], []
    for step in range(task["steps"] + task["warm_up"]):
        before = flops.total()
        chosen = prompts[step * task["prompts"] :][: task["prompts"]]
        groups = engine.generate(chosen, task["samples"], sampling, seed=task["seed"], step=step)
        measured.step()
        tokens.append(sum(len(r.tokens) for group in groups for r in group))
        cost.append(flops.total() - before)
    measured.note(tokens=tokens, flops=cost)


if __name__ == "__main__":
    main()
