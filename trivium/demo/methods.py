"""The demo as a comparison: its methods, as a user would write them down for ``trivium compare``.

It is written to ``config.yaml``, and every stage's own configuration beside its run; any of them
can be run again, changed, by hand. The numbers were chosen for two CPU cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.compare.plan import Job

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
    evaluations: int
    credit: int
    sft_steps: int
    sft_batch: int
    rate: float
    grpo_steps: int
    ppo_steps: int
    pair_prompts: int
    labels: int
    operations: tuple[int, int]
    deep: bool
    """Whether to measure memory and risks too."""
    outcome_method: bool
    """Whether PPO with an outcome reward model is a method: it needs more pairs and updates."""


FULL = Budget(
    demonstrations=30_000,
    problems=4_000,
    held_out=1_000,
    evaluations=2,
    credit=8,
    sft_steps=1_500,
    sft_batch=32,
    rate=1e-3,
    grpo_steps=45,
    ppo_steps=24,
    pair_prompts=3_000,
    labels=12_000,
    operations=(2, 4),
    deep=True,
    outcome_method=True,
)
QUICK = Budget(
    demonstrations=8_000,
    problems=1_200,
    held_out=250,
    evaluations=2,
    credit=2,
    sft_steps=850,
    sft_batch=32,
    rate=5e-4,
    grpo_steps=10,
    ppo_steps=9,
    pair_prompts=500,
    labels=4_000,
    operations=(2, 2),
    deep=False,
    outcome_method=False,
)


BASE = "sft"
"""The stage that every method starts from."""


def sft_job(directory: Path, budget: Budget, seed: int) -> Job:
    """The base: fine-tuned from nothing on imperfect demonstrations."""
    place = place_of(directory, seed)
    settings = {
        "model": {"path": str(place / "base")},
        "data": {"path": str(place / "data" / "demonstrations.jsonl")},
        "steps": budget.sft_steps,
        "examples_per_step": budget.sft_batch,
        "optimizer": {
            "learning_rate": 4e-3,
            "schedule": "cosine",
            "warmup_steps": 50,
            "weight_decay": 0.01,
        },
        "run": {"directory": str(place / BASE), "seed": seed, "overwrite": True},
    }
    return Job(f"{place.name}/{BASE}", "sft", place / BASE, settings)


def place_of(directory: Path, seed: int) -> Path:
    """Where a seed's data and base are."""
    return directory / f"seed-{seed}"


def comparison(directory: Path, budget: Budget, seeds: Sequence[int]) -> dict[str, Any]:
    """The comparison of all methods, the longest chains first."""
    place = directory / "seed-${seed}"
    methods = Methods(budget, place / "data")
    return {
        "title": "The demo: chained word problems",
        "model": {"path": str(place / BASE / "final")},
        "data": {"path": str(place / "data" / "problems.jsonl")},
        "rewards": [{"function": CORRECT}],
        "sampling": {"max_tokens": RESPONSE_TOKENS},
        "evaluation": {"data": {"path": str(place / "data" / "heldout.jsonl")}},
        "seeds": list(seeds),
        "credit": budget.credit,
        "memory": budget.deep,
        "risk": budget.deep,
        "directory": str(directory),
        "methods": [
            *([methods.ppo_with_outcome_model()] if budget.outcome_method else []),
            methods.ppo_with_process_model(),
            methods.dpo(),
            methods.ppo_with_verifier(),
            methods.grpo("outcome", {}),
            methods.grpo("process", {"rewards": [{"function": STEPS}]}),
        ],
    }


class Methods:
    """The demo's methods, for one budget; ``data`` is the directory of a seed's files."""

    def __init__(self, budget: Budget, data: Path) -> None:
        self.budget, self.data = budget, data

    def grpo(self, supervision: str, settings: dict[str, Any]) -> dict[str, Any]:
        stage = {
            "supervision": supervision,
            "steps_per_iteration": self.budget.grpo_steps,
            "prompts_per_step": 48,
            "responses_per_prompt": 8,
            "beta": 0.0,
            "optimizer": falling(self.budget.rate),
            **self.evaluated(self.budget.grpo_steps),
            **settings,
        }
        return method(f"GRPO, {supervision}", ("grpo", "", stage))

    def ppo(self, beta: float, labeler: str | None = None) -> dict[str, Any]:
        """PPO; with a labeler, the method's learned reward is kept true where the policy goes."""
        stage = {
            "steps": self.budget.ppo_steps,
            "prompts_per_step": 96,
            "responses_per_prompt": 4,
            "epochs": 2,
            "minibatches": 2,
            "beta": beta,
            "optimizer": falling(self.budget.rate / 2),
            "critic": {"optimizer": {"learning_rate": self.budget.rate}},
            **self.evaluated(self.budget.ppo_steps),
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

    def evaluated(self, steps: int) -> dict[str, Any]:
        """Held-out evaluations spread evenly over about so many steps, the last at the end."""
        return {"evaluation": {"every": math.ceil(steps / self.budget.evaluations)}}

    def ppo_with_verifier(self) -> dict[str, Any]:
        return method("PPO, verifier", ("ppo", "", self.ppo(beta=0.01)))

    def ppo_with_process_model(self) -> dict[str, Any]:
        return method(
            "PPO, learned process reward",
            ("reward-model", "process", self.process_model()),
            ("ppo", "", self.ppo(beta=0.02, labeler=LABELS)),
        )

    def ppo_with_outcome_model(self) -> dict[str, Any]:
        """Its reward model starts from the process model, which looks at single steps."""
        outcome = reward_model(learning_rate=5e-4) | {"model": {"path": "${process}/final"}}
        return method(
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
            "optimizer": falling(self.budget.rate / 2) | {"warmup_steps": 5},
            **self.evaluated(3 * self.budget.pair_prompts // 38),
        }
        return method("DPO, pairs from the base", ("pairs", "", self.pairs()), ("dpo", "", stage))

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


def method(name: str, *stages: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """A method of stages, each a command, its name in the method and its settings."""
    return {
        "name": name,
        "stages": [
            {"command": command, "name": label, "settings": settings}
            for command, label, settings in stages
        ],
    }


def reward_model(learning_rate: float) -> dict[str, Any]:
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


def falling(rate: float) -> dict[str, Any]:
    return {"learning_rate": rate, "schedule": "linear", "min_lr_ratio": 0.1}
