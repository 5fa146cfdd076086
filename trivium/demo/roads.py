"""The demo's configurations, as a user would write them: one mapping per run.

They are written to ``configs/*.yaml`` and run by the ordinary commands; any of them can be run
again, changed, by hand. The numbers were chosen for two CPU cores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CORRECT = "trivium.tasks.verifier:correct"
STEPS = "trivium.tasks.verifier:steps"
LABELS = "trivium.tasks.verifier:labels"
RESPONSE_TOKENS = 48


@dataclass(frozen=True)
class Budget:
    """How much work each stage of the demo does."""

    demonstrations: int
    problems: int
    held_out: int
    sft_steps: int
    sft_batch: int
    rate: float
    grpo_steps: int
    ppo_steps: int
    pair_prompts: int
    labels: int
    operations: tuple[int, int]


FULL = Budget(
    demonstrations=30_000,
    problems=4_000,
    held_out=1_000,
    sft_steps=1_500,
    sft_batch=32,
    rate=1e-3,
    grpo_steps=45,
    ppo_steps=24,
    pair_prompts=3_000,
    labels=12_000,
    operations=(2, 4),
)
QUICK = Budget(
    demonstrations=8_000,
    problems=1_200,
    held_out=300,
    sft_steps=850,
    sft_batch=32,
    rate=5e-4,
    grpo_steps=12,
    ppo_steps=7,
    pair_prompts=500,
    labels=3_000,
    operations=(1, 2),
)


@dataclass(frozen=True)
class Road:
    """One run of the demo: a command, its configuration, and the runs that it builds on.

    Roads with a title are compared in the demo's table.
    """

    name: str
    command: str
    settings: Mapping[str, Any]
    after: tuple[str, ...] = ()
    title: str = ""


def roads(directory: Path, budget: Budget, seed: int) -> list[Road]:
    """All runs of the demo, the longest chains first."""
    plan = Plan(directory, budget, seed)
    return [
        plan.sft(),
        plan.process_reward_model(),
        plan.pairs(),
        plan.outcome_reward_model(),
        plan.ppo_with_process_model(),
        plan.ppo_with_outcome_model(),
        plan.ppo_with_verifier(),
        plan.grpo("outcome", CORRECT),
        plan.grpo("process", STEPS),
        plan.dpo(),
    ]


class Plan:
    """The configurations, for one directory, budget and seed."""

    def __init__(self, directory: Path, budget: Budget, seed: int) -> None:
        self.directory, self.budget, self.seed = directory, budget, seed

    def file(self, name: str) -> str:
        return str(self.directory / "data" / name)

    def final(self, name: str) -> str:
        return str(self.directory / "runs" / name / "final")

    def run(self, name: str) -> dict[str, Any]:
        return {
            "directory": str(self.directory / "runs" / name),
            "seed": self.seed,
            "overwrite": True,
        }

    def falling(self, rate: float) -> dict[str, Any]:
        return {"learning_rate": rate, "schedule": "linear", "final_share": 0.1}

    def evaluation(self) -> dict[str, Any]:
        return {
            "data": {"path": self.file("heldout.jsonl")},
            "rewards": [{"function": CORRECT}],
            "max_tokens": RESPONSE_TOKENS,
            "at_start": False,
        }

    def sampled(self) -> dict[str, Any]:
        """What all roads over rollouts share."""
        return {
            "model": {"path": self.final("sft")},
            "data": {"path": self.file("problems.jsonl")},
            "sampling": {"max_tokens": RESPONSE_TOKENS},
            "evaluation": self.evaluation(),
        }

    def sft(self) -> Road:
        settings = {
            "model": {"path": str(self.directory / "base")},
            "data": {"path": self.file("demonstrations.jsonl")},
            "steps": self.budget.sft_steps,
            "examples_per_step": self.budget.sft_batch,
            "optimizer": {
                "learning_rate": 4e-3,
                "schedule": "cosine",
                "warmup_steps": 50,
                "weight_decay": 0.01,
            },
            "evaluation": self.evaluation(),
            "run": self.run("sft"),
        }
        return Road("sft", "sft", settings, title="SFT, the base of all roads")

    def grpo(self, supervision: str, reward: str) -> Road:
        name = f"grpo-{supervision}"
        settings = {
            **self.sampled(),
            "rewards": [{"function": reward}],
            "supervision": supervision,
            "steps_per_iteration": self.budget.grpo_steps,
            "prompts_per_step": 48,
            "responses_per_prompt": 8,
            "beta": 0.0,
            "optimizer": self.falling(self.budget.rate),
            "run": self.run(name),
        }
        return Road(name, "grpo", settings, ("sft",), f"GRPO, {supervision}")

    def ppo(self, name: str, rewards: list[dict[str, Any]], beta: float) -> dict[str, Any]:
        return {
            **self.sampled(),
            "rewards": rewards,
            "steps": self.budget.ppo_steps,
            "prompts_per_step": 96,
            "responses_per_prompt": 4,
            "epochs": 2,
            "minibatches": 2,
            "beta": beta,
            "optimizer": self.falling(self.budget.rate / 2),
            "critic": {"optimizer": {"learning_rate": self.budget.rate}},
            "run": self.run(name),
        }

    def ppo_with_verifier(self) -> Road:
        settings = self.ppo("ppo-verifier", [{"function": CORRECT}], beta=0.01)
        return Road("ppo-verifier", "ppo", settings, ("sft",), "PPO, verifier")

    def ppo_with_process_model(self) -> Road:
        arguments = {"path": self.final("process-model"), "aggregate": "product"}
        rewards = [{"function": "process_reward_model", "arguments": arguments}]
        settings = self.ppo("ppo-process-model", rewards, beta=0.02)
        settings["reward_update"] = self.reward_update(LABELS)
        title = "PPO, learned process reward"
        return Road("ppo-process-model", "ppo", settings, ("process-model",), title)

    def ppo_with_outcome_model(self) -> Road:
        arguments = {"path": self.final("outcome-model")}
        rewards = [{"function": "reward_model", "arguments": arguments}]
        settings = self.ppo("ppo-outcome-model", rewards, beta=0.05)
        settings["reward_update"] = self.reward_update(CORRECT)
        title = "PPO, learned outcome reward"
        return Road("ppo-outcome-model", "ppo", settings, ("outcome-model",), title)

    def reward_update(self, judge: str) -> dict[str, Any]:
        """Keeps a learned reward true where the policy goes; a fixed one may be gamed."""
        return {
            "judge": {"function": judge},
            "every": 2,
            "examples": 256,
            "replay": 0.5,
            "optimizer": {"learning_rate": 3e-4},
        }

    def pairs(self) -> Road:
        settings = {
            "model": {"path": self.final("sft")},
            "data": {"path": self.file("problems.jsonl"), "limit": self.budget.pair_prompts},
            "sampling": {"max_tokens": RESPONSE_TOKENS},
            "samples": 8,
            "pairs_per_prompt": 2,
            "rewards": [{"function": CORRECT}],
            "output": self.file("pairs.jsonl"),
            "overwrite": True,
            "seed": self.seed,
        }
        return Road("pairs", "pairs", settings, ("sft",))

    def dpo(self) -> Road:
        settings = {
            "model": {"path": self.final("sft")},
            "data": {"path": self.file("pairs.jsonl")},
            "epochs": 3.0,
            "pairs_per_step": 64,
            "beta": 0.1,
            "sft_coefficient": 0.2,
            "optimizer": self.falling(self.budget.rate / 2) | {"warmup_steps": 5},
            "evaluation": self.evaluation(),
            "run": self.run("dpo"),
        }
        return Road("dpo", "dpo", settings, ("pairs",), "DPO, pairs from the base")

    def process_reward_model(self) -> Road:
        settings = self.reward_model("process-model", "sft", learning_rate=1e-3)
        settings["steps"] = {"path": self.file("labels.jsonl")}
        return Road("process-model", "reward-model", settings, ("sft",))

    def outcome_reward_model(self) -> Road:
        """From the process model, which has learned to look at single steps."""
        settings = self.reward_model("outcome-model", "process-model", learning_rate=5e-4)
        settings["pairs"] = {"path": self.file("pairs.jsonl")}
        return Road("outcome-model", "reward-model", settings, ("process-model", "pairs"))

    def reward_model(self, name: str, start: str, learning_rate: float) -> dict[str, Any]:
        return {
            "model": {"path": self.final(start)},
            "epochs": 2.0,
            "examples_per_step": 64,
            "optimizer": {
                "learning_rate": learning_rate,
                "schedule": "cosine",
                "warmup_steps": 10,
                "weight_decay": 0.05,
            },
            "run": self.run(name),
        }
