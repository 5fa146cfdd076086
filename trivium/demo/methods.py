"""The demo's methods, as a configuration for ``trivium compare``.

The comparison is saved as ``config.yaml``, and the configuration of every stage in the directory of
its run, so that a user can edit and rerun any of them. The sizes are chosen for two CPU cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.jobs.job import Job

CORRECT = "trivium.tasks.verifier:correct"
STEPS = "trivium.tasks.verifier:steps"
LABELS = "trivium.tasks.verifier:labels"
RESPONSE_TOKENS = 48


@dataclass(frozen=True)
class Budget:
    """Sizes of the demo's stages."""

    demonstrations: int
    problems: int
    held_out: int
    evaluations: int
    credit: int
    sft_steps: int
    sft_batch: int
    learning_rate: float
    grpo_steps: int
    ppo_steps: int
    pair_prompts: int
    labels: int
    operations: tuple[int, int]
    memory_and_risk: bool
    """Whether to measure memory and risks."""
    outcome_reward_model: bool
    """Whether to include PPO with an outcome reward model, which needs more pairs and updates."""


FULL = Budget(
    demonstrations=30_000,
    problems=4_000,
    held_out=1_000,
    evaluations=2,
    credit=8,
    sft_steps=1_500,
    sft_batch=32,
    learning_rate=1e-3,
    grpo_steps=45,
    ppo_steps=24,
    pair_prompts=3_000,
    labels=12_000,
    operations=(2, 4),
    memory_and_risk=True,
    outcome_reward_model=True,
)
QUICK = Budget(
    demonstrations=8_000,
    problems=1_200,
    held_out=250,
    evaluations=2,
    credit=2,
    sft_steps=850,
    sft_batch=32,
    learning_rate=5e-4,
    grpo_steps=10,
    ppo_steps=9,
    pair_prompts=500,
    labels=4_000,
    operations=(2, 2),
    memory_and_risk=False,
    outcome_reward_model=False,
)


BASE = "sft"
"""Name of the stage that trains the base of every method."""


def sft_job(directory: Path, budget: Budget, seed: int) -> Job:
    """Return the job that trains the base from scratch on imperfect demonstrations."""
    seed_dir = seed_directory(directory, seed)
    settings = {
        "model": {"path": str(seed_dir / "base")},
        "data": {"path": str(seed_dir / "data" / "demonstrations.jsonl")},
        "steps": budget.sft_steps,
        "examples_per_step": budget.sft_batch,
        "optimizer": {
            "learning_rate": 4e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "weight_decay": 0.01,
        },
        "run": {"directory": str(seed_dir / BASE), "seed": seed, "overwrite": True},
    }
    return Job(f"{seed_dir.name}/{BASE}", "sft", seed_dir / BASE, settings)


def seed_directory(directory: Path, seed: int) -> Path:
    """Return the directory of a seed's data and base."""
    return directory / f"seed-{seed}"


def comparison_config(directory: Path, budget: Budget, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the comparison of all methods, those with the most stages first."""
    seed_dir = directory / "seed-${seed}"
    methods = MethodConfigs(budget, seed_dir / "data")
    return {
        "title": "The demo: chained word problems",
        "model": {"path": str(seed_dir / BASE / "final")},
        "data": {"path": str(seed_dir / "data" / "problems.jsonl")},
        "rewards": [{"function": CORRECT}],
        "sampling": {"max_tokens": RESPONSE_TOKENS},
        "evaluation": {"data": {"path": str(seed_dir / "data" / "heldout.jsonl")}},
        "seeds": list(seeds),
        "credit": budget.credit,
        "memory": budget.memory_and_risk,
        "risk": budget.memory_and_risk,
        "directory": str(directory),
        "methods": [
            *([methods.ppo_with_outcome_model()] if budget.outcome_reward_model else []),
            methods.ppo_with_process_model(),
            methods.dpo(),
            methods.ppo_with_verifier(),
            methods.grpo("outcome", {}),
            methods.grpo("process", {"rewards": [{"function": STEPS}]}),
        ],
    }


class MethodConfigs:
    """Configurations of the demo's methods for one budget.

    ``data`` is the directory of a seed's data files.
    """

    def __init__(self, budget: Budget, data: Path) -> None:
        self.budget, self.data = budget, data

    def grpo(self, supervision: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Return GRPO with outcome or process supervision; ``settings`` are added to the stage."""
        stage = {
            "supervision": supervision,
            "steps_per_iteration": self.budget.grpo_steps,
            "prompts_per_step": 48,
            "responses_per_prompt": 8,
            "beta": 0.0,
            "optimizer": linear_decay(self.budget.learning_rate),
            **self.evaluation(self.budget.grpo_steps),
            **settings,
        }
        return method_config(f"GRPO, {supervision}", ("grpo", "", stage))

    def ppo(self, beta: float, labeler: str | None = None) -> dict[str, Any]:
        """Return the settings of PPO.

        With a labeler, the learned reward is trained further on the policy's own responses.
        """
        stage = {
            "steps": self.budget.ppo_steps,
            "prompts_per_step": 96,
            "responses_per_prompt": 4,
            "epochs": 2,
            "minibatches": 2,
            "beta": beta,
            "optimizer": linear_decay(self.budget.learning_rate / 2),
            "critic": {"optimizer": {"learning_rate": self.budget.learning_rate}},
            **self.evaluation(self.budget.ppo_steps),
        }
        if labeler is not None:
            stage["reward_update"] = {
                "labeler": {"function": labeler},
                "every": 2,
                "examples": 256,
                "replay": 0.5,
                "optimizer": {"learning_rate": 3e-4},
            }
        return stage

    def evaluation(self, steps: int) -> dict[str, Any]:
        """Return the settings of evaluations at even intervals over about ``steps`` steps."""
        return {"evaluation": {"every": math.ceil(steps / self.budget.evaluations)}}

    def ppo_with_verifier(self) -> dict[str, Any]:
        return method_config("PPO, verifier", ("ppo", "", self.ppo(beta=0.01)))

    def ppo_with_process_model(self) -> dict[str, Any]:
        return method_config(
            "PPO, learned process reward",
            ("reward-model", "process", self.process_model()),
            ("ppo", "", self.ppo(beta=0.02, labeler=LABELS)),
        )

    def ppo_with_outcome_model(self) -> dict[str, Any]:
        """Return PPO with an outcome reward model that starts from the process reward model."""
        outcome = reward_model(learning_rate=5e-4) | {"model": {"path": "${process}"}}
        return method_config(
            "PPO, learned outcome reward",
            ("pairs", "", self.pairs()),
            ("reward-model", "process", self.process_model()),
            ("reward-model", "outcome", outcome),
            ("ppo", "", self.ppo(beta=0.05, labeler=CORRECT)),
        )

    def dpo(self) -> dict[str, Any]:
        stage = {
            "epochs": 3.0,
            "pairs_per_step": 64,
            "beta": 0.1,
            "sft_coefficient": 0.2,
            "optimizer": linear_decay(self.budget.learning_rate / 2) | {"warmup_steps": 5},
            **self.evaluation(3 * self.budget.pair_prompts // 38),
        }
        return method_config(
            "DPO, pairs from the base", ("pairs", "", self.pairs()), ("dpo", "", stage)
        )

    def pairs(self) -> dict[str, Any]:
        problems = str(self.data / "problems.jsonl")
        return {
            "data": {"path": problems, "limit": self.budget.pair_prompts},
            "samples": 8,
            "pairs_per_prompt": 2,
        }

    def process_model(self) -> dict[str, Any]:
        labels = {"path": str(self.data / "labels.jsonl")}
        return reward_model(learning_rate=1e-3) | {"steps": labels}


def method_config(name: str, *stages: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """Return a method; each stage is a command, the stage's name, and its settings."""
    return {
        "name": name,
        "stages": [
            {"command": command, "name": label, "settings": settings}
            for command, label, settings in stages
        ],
    }


def reward_model(learning_rate: float) -> dict[str, Any]:
    """Return the settings of reward model training."""
    return {
        "epochs": 2.0,
        "examples_per_step": 64,
        "optimizer": {
            "learning_rate": learning_rate,
            "schedule": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.05,
        },
    }


def linear_decay(learning_rate: float) -> dict[str, Any]:
    """Return the settings of an optimizer whose learning rate decays to a tenth."""
    return {"learning_rate": learning_rate, "schedule": "linear", "min_lr_ratio": 0.1}
