"""What a stage is, in words and numbers for the comparison's table.

Everything here is read from the stage's own configuration and files: the words say what the
configuration chose, the numbers what was predicted and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trivium.compare.plan import Job
from trivium.runs.store import read_metrics

Record = dict[str, Any]
Settings = Mapping[str, Any]

HYPERPARAMETERS = (
    "beta", "kl", "gae_lambda", "gamma", "clip_low", "clip_high", "epochs", "minibatches", "iterations",
    "supervision", "surrogate", "aggregation", "baseline", "scale", "loss", "sft_coefficient",
    "prompts_per_step", "responses_per_prompt", "pairs_per_step", "examples_per_step", "samples",
    "pairs_per_prompt", "minimum_reward",
)  # fmt: skip


def stage_record(job: Job, spent: Mapping[str, float]) -> Record:
    """One stage: its command, what it learns from, what it cost."""
    settings = job.settings
    return {
        "name": job.name.rsplit("/", 1)[-1],
        "job": job.name,
        "command": job.command,
        "config": str(job.config),
        "signal": SIGNALS[job.command](settings),
        "advantage": ADVANTAGES.get(job.command, lambda _: None)(settings),
        "sampling": _sampling(job.command, settings),
        "hyperparameters": {k: settings[k] for k in HYPERPARAMETERS if k in settings}
        | {"learning_rate": (settings.get("optimizer") or {}).get("learning_rate")},
        "spent": dict(spent),
        "steps": _steps(job),
    }


def _steps(job: Job) -> int | None:
    if not (job.directory / "metrics.jsonl").is_file():
        return None
    return len(read_metrics(job.directory))


# --- In words -------------------------------------------------------------------------------------


def _names(rewards: list[Settings]) -> str:
    return ", ".join(str(r.get("name") or r["function"]).rpartition(":")[2] for r in rewards)


def _rewarded(settings: Settings) -> str:
    learned = {"reward_model": "a reward model's score", "process_reward_model": "step scores"}
    rewards = settings.get("rewards") or []
    if len(rewards) == 1 and rewards[0]["function"] in learned:
        updated = ", updated while training" if settings.get("reward_update") else ""
        return f"{learned[rewards[0]['function']]} (learned{updated})"
    return f"reward: {_names(rewards)}"


def _ppo(settings: Settings) -> str:
    beta = settings.get("beta", 0.05)
    return _rewarded(settings) + (f", KL in the reward (β = {beta:g})" if beta else "")


def _grpo(settings: Settings) -> str:
    beta = settings.get("beta", 0.04)
    steps = " of each step" if settings.get("supervision") == "process" else ""
    return _rewarded(settings) + steps + (f", KL in the loss (β = {beta:g})" if beta else "")


def _dpo(settings: Settings) -> str:
    source = "pairs sampled while training" if "online" in settings else "preference pairs"
    return f"{source}, implicit reward (β = {settings.get('beta', 0.1):g})"


SIGNALS: dict[str, Callable[[Settings], str]] = {
    "sft": lambda _: "demonstrations",
    "reward-model": lambda s: "labeled steps" if s.get("steps") else "preference pairs",
    "ppo": _ppo,
    "grpo": _grpo,
    "dpo": _dpo,
    "pairs": lambda s: f"{_rewarded(s)}, best against worst",
    "sample": lambda s: f"{_rewarded(s)}, the best kept",
    "evaluate": _rewarded,
}


def _group_advantage(settings: Settings) -> str:
    scale = "" if settings.get("scale") == "none" else ", over its standard deviation"
    if settings.get("supervision") == "process":
        return f"sum of later steps' rewards, each less the group's mean{scale}"
    others = settings.get("baseline") == "leave_one_out"
    return f"reward less the mean of {'the others' if others else 'the group'}{scale}"


ADVANTAGES: dict[str, Callable[[Settings], str]] = {
    "ppo": lambda s: f"GAE (λ = {s.get('lam', 0.95):g}) from a critic, per token",
    "grpo": _group_advantage,
    "dpo": lambda _: "none: a pair weighs σ(−margin)",
}


def _sampling(command: str, settings: Settings) -> str:
    if command in ("ppo", "grpo") or "online" in settings:
        per_prompt = settings.get("responses_per_prompt", 8 if command == "grpo" else 1)
        return f"while training, {per_prompt} per prompt"
    if command in ("pairs", "sample"):
        return f"once, {settings.get('samples', 8)} per prompt"
    return "none"
