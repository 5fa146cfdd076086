"""One case on Trivium's side, in a process of its own: the real loops, their steps watched.

    python ours.py TASK WORLD PLACE

TASK is a case (``cases.py``) as JSON. Loops are run as ``trivium`` runs them; only the log of a
step is wrapped, where a step ends.
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
from trivium.models import flops
from trivium.models.model_config import ModelConfig
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
    task, world, place = meter.begin()
    measured = meter.Meter(place, memory=task["memory"])
    if task["method"] == "generation":
        generate(task, world, measured)
    else:
        train(task, world, place, measured)
    measured.report()


def train(task: dict[str, Any], world: Path, place: Path, measured: meter.Meter) -> None:
    """Run the loop; the models are loaded when its training begins.

    DPO's reference log-probs are computed before: each step gets its share of their cost, unless
    the case is one where that is left out on both sides.
    """
    steps = task["steps"] + task["warm_up"]
    scored: list[tuple[float, float]] = []
    log, enter, prepare = Training.log, Training.__enter__, dpo.Offline.prepare

    def watched_enter(self: Training) -> Training:
        measured.loaded()
        return enter(self)

    def watched_log(self: Training, *given: Any) -> None:
        log(self, *given)
        measured.step()

    def watched_prepare(self: dpo.Offline, *given: Any) -> None:
        began, cost = time.process_time(), flops.total()
        prepare(self, *given)
        if not task["precomputed"]:
            scored.append(((time.process_time() - began) / steps, (flops.total() - cost) / steps))

    Training.__enter__, Training.log = watched_enter, watched_log
    dpo.Offline.prepare = watched_prepare
    kind, run = LOOPS[task["method"]]
    lines = read_metrics(run(kind.model_validate(configuration(task, world, place))))
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


def configuration(task: dict[str, Any], world: Path, place: Path) -> dict[str, Any]:
    """The run's configuration, everything that is not named here being Trivium's default."""
    method, steps = task["method"], task["steps"] + task["warm_up"]
    model = {"path": str(world / "model"), "device": "cpu"}
    optimizer = {"learning_rate": 1e-8, "schedule": "constant"}
    common = {
        "model": model,
        "run": {
            "directory": str(place / "run"),
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
    """Sample alone, as the loops do."""
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
