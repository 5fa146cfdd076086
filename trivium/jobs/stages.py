"""Description of a stage, in words and numbers, for the page of a comparison or a pipeline.

Everything is read from the stage's configuration and files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trivium.algorithms.dpo_config import OnlinePairsConfig
from trivium.commands import COMMANDS
from trivium.config.base import Configuration
from trivium.jobs.job import Job
from trivium.runs.store import read_metrics

Record = dict[str, Any]
Settings = Mapping[str, Any]

HYPERPARAMETERS = (
    "beta", "kl", "gae_lambda", "gamma", "clip_low", "clip_high", "epochs", "minibatches",
    "iterations", "supervision", "surrogate", "aggregation", "baseline", "scale", "loss",
    "sft_coefficient",
    "prompts_per_step", "responses_per_prompt", "pairs_per_step", "examples_per_step", "samples",
    "pairs_per_prompt", "minimum_reward",
)  # fmt: skip


def stage_record(job: Job, spent: Mapping[str, float]) -> Record:
    """Return the record of one stage: its command, training signal, settings and cost."""
    settings = job.settings
    return {
        "name": job.name.rsplit("/", 1)[-1],
        "job": job.name,
        "command": job.command,
        "config": str(job.config),
        "signal": SIGNALS.get(job.command, lambda _: COMMANDS[job.command].help)(settings),
        "advantage": ADVANTAGES.get(job.command, lambda _: None)(settings),
        "sampling": _sampling(job.command, settings),
        "hyperparameters": _hyperparameters({**(settings.get("online") or {}), **settings})
        | {"learning_rate": (settings.get("optimizer") or {}).get("learning_rate")},
        "spent": dict(spent),
        "steps": _num_steps(job),
    }


def _hyperparameters(settings: Settings) -> Record:
    return {name: settings[name] for name in HYPERPARAMETERS if name in settings}


def _num_steps(job: Job) -> int | None:
    if not (job.directory / "metrics.jsonl").is_file():
        return None
    return len(read_metrics(job.directory))


# --- Descriptions ---------------------------------------------------------------------------------


def _names(rewards: list[Settings]) -> str:
    return ", ".join(str(r.get("name") or r["function"]).rpartition(":")[2] for r in rewards)


def _reward_signal(settings: Settings) -> str:
    descriptions = {"reward_model": "a reward model's score", "process_reward_model": "step scores"}
    rewards = settings.get("rewards") or []
    if len(rewards) == 1 and rewards[0]["function"] in descriptions:
        updated = ", updated during training" if settings.get("reward_update") else ""
        return f"{descriptions[rewards[0]['function']]} (learned{updated})"
    return f"reward: {_names(rewards)}"


def _ppo(settings: Settings) -> str:
    beta = settings.get("beta", 0.05)
    return _reward_signal(settings) + (f", KL in the reward (β = {beta:g})" if beta else "")


def _grpo(settings: Settings) -> str:
    beta = settings.get("beta", 0.04)
    steps = " of each step" if settings.get("supervision") == "process" else ""
    return _reward_signal(settings) + steps + (f", KL in the loss (β = {beta:g})" if beta else "")


def _dpo(settings: Settings) -> str:
    source = "pairs sampled during training" if "online" in settings else "preference pairs"
    return f"{source}, implicit reward (β = {settings.get('beta', 0.1):g})"


SIGNALS: dict[str, Callable[[Settings], str]] = {
    "sft": lambda _: "demonstrations",
    "reward-model": lambda s: "labeled steps" if s.get("steps") else "preference pairs",
    "ppo": _ppo,
    "grpo": _grpo,
    "dpo": _dpo,
    "pairs": lambda s: f"{_reward_signal(s)}, pairs of the best and the worst response",
    "sample": lambda s: f"{_reward_signal(s)}, only the best responses",
    "evaluate": _reward_signal,
}


def _group_advantage(settings: Settings) -> str:
    scale = "" if settings.get("scale") == "none" else ", divided by its standard deviation"
    if settings.get("supervision") == "process":
        return f"sum of later steps' rewards, each minus the group mean{scale}"
    leave_one_out = settings.get("baseline") == "leave_one_out"
    return f"reward minus the mean of {'the others' if leave_one_out else 'the group'}{scale}"


ADVANTAGES: dict[str, Callable[[Settings], str]] = {
    "ppo": lambda s: f"GAE (λ = {s.get('gae_lambda', 0.95):g}) from a critic, per token",
    "grpo": _group_advantage,
    "dpo": lambda _: "none: each pair is weighted by σ(−margin)",
}


def _sampling(command: str, settings: Settings) -> str:
    if settings.get("online"):
        online = setting(OnlinePairsConfig, settings["online"], "responses_per_prompt")
        return f"during training, {online} per prompt"
    config_class = COMMANDS[command].config_class()
    if command in ("ppo", "grpo"):
        per_prompt = setting(config_class, settings, "responses_per_prompt")
        return f"during training, {per_prompt} per prompt"
    if command in ("pairs", "sample"):
        return f"once, {setting(config_class, settings, 'samples')} per prompt"
    return "none"


def setting(config_class: type[Configuration], settings: Settings, name: str) -> Any:
    """Return a setting, or the default of its configuration class."""
    return settings.get(name, config_class.model_fields[name].default)
