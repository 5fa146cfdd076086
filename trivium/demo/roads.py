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
RESPONSE_TOKENS = 48


@dataclass(frozen=True)
class Budget:
    """How much work each stage of the demo does."""

    demonstrations: int
    sft_steps: int
    prompts: int
    samples: int
    grpo_steps: int
    ppo_steps: int
    dpo_epochs: float
    reward_epochs: float
    held_out: int


FULL = Budget(
    demonstrations=40_000,
    sft_steps=900,
    prompts=2_000,
    samples=8,
    grpo_steps=60,
    ppo_steps=60,
    dpo_epochs=2.0,
    reward_epochs=2.0,
    held_out=1_000,
)
QUICK = Budget(
    demonstrations=12_000,
    sft_steps=250,
    prompts=600,
    samples=4,
    grpo_steps=10,
    ppo_steps=10,
    dpo_epochs=1.0,
    reward_epochs=1.0,
    held_out=300,
)


@dataclass(frozen=True)
class Road:
    """One run of the demo: a command, its configuration, and the runs that it builds on."""

    name: str
    command: str
    settings: Mapping[str, Any]
    after: tuple[str, ...] = ()
    title: str = ""


def roads(directory: Path, budget: Budget, seed: int) -> list[Road]:
    """All runs of the demo; those with a title are compared in its table."""
    data, runs = directory / "data", directory / "runs"

    def final(name: str) -> dict[str, str]:
        return {"path": str(runs / name / "final")}

    def run(name: str) -> dict[str, Any]:
        return {"directory": str(runs / name), "seed": seed}

    evaluation = {
        "data": {"path": str(data / "heldout.jsonl")},
        "rewards": [{"function": CORRECT}],
        "max_tokens": RESPONSE_TOKENS,
        "prompts": budget.held_out,
        "at_start": False,
    }
    sampled = {
        "model": final("sft"),
        "data": {"path": str(data / "problems.jsonl")},
        "sampling": {"max_tokens": RESPONSE_TOKENS},
        "evaluation": evaluation,
    }
    grpo = {
        "steps_per_iteration": budget.grpo_steps,
        "prompts_per_step": 48,
        "responses_per_prompt": 8,
        "beta": 0.0,
        "optimizer": {"learning_rate": 1e-3, "schedule": "linear", "final_share": 0.1},
    }
    ppo = {
        "steps": budget.ppo_steps,
        "prompts_per_step": 96,
        "responses_per_prompt": 4,
        "beta": 0.01,
        "epochs": 2,
        "minibatches": 2,
        "optimizer": {"learning_rate": 5e-4, "schedule": "linear", "final_share": 0.1},
        "critic": {"optimizer": {"learning_rate": 1e-3}},
    }
    pairs = {"path": str(data / "pairs.jsonl")}
    return [
        Road(
            "sft",
            "sft",
            {
                "model": {"path": str(directory / "base")},
                "data": {"path": str(data / "demonstrations.jsonl")},
                "steps": budget.sft_steps,
                "examples_per_step": 128,
                "optimizer": {
                    "learning_rate": 4e-3,
                    "schedule": "cosine",
                    "warmup_steps": 50,
                    "weight_decay": 0.01,
                },
                "evaluation": evaluation,
                "run": run("sft"),
            },
            title="SFT (the base of all)",
        ),
        Road(
            "grpo-outcome",
            "grpo",
            {**sampled, **grpo, "rewards": [{"function": CORRECT}], "run": run("grpo-outcome")},
            after=("sft",),
            title="GRPO, outcome",
        ),
        Road(
            "grpo-process",
            "grpo",
            {
                **sampled,
                **grpo,
                "rewards": [{"function": STEPS}],
                "supervision": "process",
                "run": run("grpo-process"),
            },
            after=("sft",),
            title="GRPO, process",
        ),
        Road(
            "ppo-verifier",
            "ppo",
            {**sampled, **ppo, "rewards": [{"function": CORRECT}], "run": run("ppo-verifier")},
            after=("sft",),
            title="PPO, verifier",
        ),
        Road(
            "pairs",
            "pairs",
            {
                "model": final("sft"),
                "data": {"path": str(data / "problems.jsonl"), "limit": budget.prompts},
                "sampling": {"max_tokens": RESPONSE_TOKENS},
                "samples": budget.samples,
                "rewards": [{"function": CORRECT}],
                "output": pairs["path"],
                "seed": seed,
            },
            after=("sft",),
        ),
        Road(
            "dpo",
            "dpo",
            {
                "model": final("sft"),
                "data": pairs,
                "evaluation": evaluation,
                "epochs": budget.dpo_epochs,
                "pairs_per_step": 64,
                "beta": 0.1,
                "sft_coefficient": 0.2,
                "optimizer": {"learning_rate": 5e-4, "schedule": "linear", "warmup_steps": 5},
                "run": run("dpo"),
            },
            after=("pairs",),
            title="DPO, pairs of the base",
        ),
    ]
