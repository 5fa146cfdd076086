"""Small runs of every algorithm, and a bit-by-bit comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from helpers.tiny_models import World
from trivium.algorithms import dpo, grpo, ppo, reward_model, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.config.base import Configuration
from trivium.monitoring.metrics import metric
from trivium.runs.checkpoint import Checkpoints
from trivium.runs.checkpointing import LOGS, LOOP_STATE
from trivium.runs.store import read_run

Train = Callable[[Any], Path]

FAST = {"learning_rate": 3e-3, "schedule": "linear"}


def evaluation(world: World, **options: Any) -> dict[str, Any]:
    data = {"data": world.prompts, "every": 2, "samples": 2, "max_tokens": 5}
    return {"evaluation": {**data, "rewards": world.reward("letters"), **options}}


def grpo_config(world: World, run: Path) -> GRPOConfig:
    """Refresh the reference after each of 2 iterations; μ = 2 epochs of 2 minibatches."""
    return GRPOConfig(
        **world.on_policy("letters", optimizer=FAST, run=run_options(run), **evaluation(world)),
        iterations=2, steps_per_iteration=2, epochs=2, minibatches=2, beta=0.1,
    )  # fmt: skip


def grpo_process_config(world: World, run: Path) -> GRPOConfig:
    process_reward = {"function": "process_reward_model",
                      "arguments": {"path": world.reward_model(), "separator": "."}}  # fmt: skip
    labeler = {
        "function": "trivium.rewards.steps:steps",
        "arguments": {"separator": ".", "without_equation": 0.4},
    }
    update = {"labeler": labeler, "examples": 6, "replay": 0.5, "examples_per_step": 3,
              "optimizer": {"learning_rate": 1e-3}}  # fmt: skip
    options = world.on_policy(optimizer=FAST, run=run_options(run)) | {"rewards": [process_reward]}
    return GRPOConfig(
        **options, supervision="process", iterations=3, steps_per_iteration=1, epochs=2, beta=0.1,
        reward_update=update,
    )  # fmt: skip


def grpo_without_kl_config(world: World, run: Path) -> GRPOConfig:
    """Use no reference, and the sampler's log-probs as those of π_old."""
    return GRPOConfig(
        **world.on_policy("letters", optimizer=FAST, run=run_options(run)),
        steps_per_iteration=3, epochs=2, minibatches=2, beta=0.0,
    )  # fmt: skip


def grpo_async_config(world: World, run: Path) -> GRPOConfig:
    """Sample asynchronously in both of 2 iterations, with dynamic sampling."""
    return GRPOConfig(
        **world.on_policy("letters", optimizer=FAST, run=run_options(run), **evaluation(world)),
        iterations=2, steps_per_iteration=2, epochs=2, minibatches=2, beta=0.1,
        dynamic_sampling=1, importance_sampling_cap=2.0, asynchronous=True,
    )  # fmt: skip


def ppo_async_config(world: World, run: Path) -> PPOConfig:
    """Sample asynchronously, with LoRA and a reward function that scores while sampling."""
    options = world.on_policy(optimizer=FAST, run=run_options(run))
    overlapped = {"function": f"{world.rewards}:letters", "timeout": 60.0, "while_sampling": True}
    options |= {"model": {"path": world.path, "lora": {"rank": 2}}, "rewards": [overlapped]}
    return PPOConfig(
        **options, steps=3, epochs=1, minibatches=2, critic={"optimizer": {"learning_rate": 1e-2}},
        importance_sampling_cap=2.0, asynchronous=True,
    )  # fmt: skip


def ppo_config(world: World, run: Path) -> PPOConfig:
    texts = world.rows("texts.jsonl", [{"prompt": "a", "completion": "bcd"}, {"text": "hij"}])
    return PPOConfig(
        **world.on_policy("letters", optimizer=FAST, run=run_options(run), **evaluation(world)),
        steps=3, epochs=2, minibatches=2, adaptive_kl={"target": 0.1, "horizon": 50},
        critic={"optimizer": {"learning_rate": 1e-2}},
        pretraining={"data": texts, "examples_per_step": 1}, ema_decay=0.9,
    )  # fmt: skip


def ppo_shared_config(world: World, run: Path) -> PPOConfig:
    reward_model = {"function": "reward_model", "arguments": {"path": world.reward_model()}}
    update = {"labeler": world.reward("letters")[0], "every": 1, "examples": 4,
              "optimizer": {"learning_rate": 1e-3}}  # fmt: skip
    options = world.on_policy(optimizer=FAST, run=run_options(run)) | {"rewards": [reward_model]}
    return PPOConfig(
        **options, steps=3, epochs=2, minibatches=1, critic={"kind": "shared"}, target_kl=1e-4,
        reward_update=update,
    )  # fmt: skip


PAIRS = [
    {"prompt": p, "chosen": c, "rejected": r}
    for p, c, r in (("a", "bc", "d"), ("bc", "e", "fgh"), ("d", "a", "b"), ("e", "cc", "dd"))
]


def dpo_config(world: World, run: Path) -> DPOConfig:
    return DPOConfig(
        model={"path": world.path}, data=world.rows("pairs.jsonl", PAIRS), optimizer=FAST,
        epochs=2.0, pairs_per_step=2, run=run_options(run), **evaluation(world),
    )  # fmt: skip


def dpo_rmsprop_config(world: World, run: Path) -> DPOConfig:
    """Take the steps of RMSprop, with warm-up over half of them."""
    options = dpo_config(world, run).model_dump()
    options["optimizer"] |= {"kind": "rmsprop", "warmup_ratio": 0.5, "warmup_start_ratio": 0.1}
    return DPOConfig.model_validate(options)


def online_dpo_config(world: World, run: Path) -> DPOConfig:
    online = {"data": world.prompts, "rewards": world.reward("letters"), "steps": 3,
              "sampling": {"max_tokens": 6}}  # fmt: skip
    lora = {"path": world.path, "lora": {"rank": 2}}
    return DPOConfig(
        model=lora, online=online, optimizer=FAST, pairs_per_step=4, run=run_options(run)
    )


def sft_config(world: World, run: Path) -> SFTConfig:
    rows = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]
    return SFTConfig(
        model={"path": world.path}, data=world.rows("rows.jsonl", rows), optimizer=FAST,
        steps=4, examples_per_step=2, run=run_options(run), measure_kl=True, **evaluation(world),
    )  # fmt: skip


def bfloat16_config(world: World, run: Path) -> GRPOConfig:
    """Train bfloat16 weights on float32 copies, with a refreshed reference."""
    options = world.on_policy("letters", optimizer=FAST, run=run_options(run))
    options["model"] = {"path": world.path, "dtype": "bfloat16"}
    return GRPOConfig(**options, iterations=2, steps_per_iteration=1, epochs=2, beta=0.1)


def stochastic_config(world: World, run: Path) -> SFTConfig:
    """Train bfloat16 weights that are rounded stochastically, and average them."""
    options = sft_config(world, run).model_dump()
    options["model"]["dtype"] = "bfloat16"
    options["optimizer"] |= {"half_precision": "stochastic_rounding", "kind": "adam"}
    return SFTConfig.model_validate(options | {"ema_decay": 0.5})


def ranking_config(world: World, run: Path) -> RewardModelConfig:
    """Learn from rankings of unequal sizes, and save the best and last model with a bias."""
    ranks = [
        {"prompt": "a", "responses": ["bc", "d", "ef"], "scores": [2, 1, 1]},
        {"prompt": "bc", "responses": ["e", "fgh"], "scores": [0.5, -1]},
        {"prompt": "d", "responses": ["a", "b", "c", "dd"], "scores": [1, 2, 3, 4]},
    ]
    options = run_options(run)
    options["checkpoints"] |= {"best": "loss", "best_is": "lowest"}
    rankings = world.rows("rankings.jsonl", ranks)
    return RewardModelConfig(
        model={"path": world.path}, rankings={**rankings, "ties": "half", "margin_scale": 0.1},
        validation_rankings=rankings, optimizer=FAST, epochs=3.0, examples_per_step=2,
        evaluate_every=1, run=options,
        demonstrations=world.rows("shown.jsonl", [{"prompt": "a", "completion": "bc"}]),
    )  # fmt: skip


def reward_model_config(world: World, run: Path) -> RewardModelConfig:
    return RewardModelConfig(
        model={"path": world.path}, pairs=world.rows("pairs.jsonl", PAIRS), optimizer=FAST,
        epochs=3.0, examples_per_step=2, held_out_share=0.25, evaluate_every=1,
        run=run_options(run),
    )  # fmt: skip


def lora_config(world: World, run: Path) -> GRPOConfig:
    """Train LoRA adapters, with a reward function that draws from the global random generators.

    The reference is the base model without adapters, and from the second iteration on with the
    adapters of the first.
    """
    options = world.on_policy("letters", "noise", optimizer=FAST, run=run_options(run))
    options["model"] = {"path": world.path, "lora": {"rank": 2}}
    return GRPOConfig(**options, iterations=2, steps_per_iteration=1, epochs=2, beta=0.1)


def run_options(directory: Path) -> dict[str, Any]:
    return {"directory": str(directory), "samples_every": 1, "samples": 2,
            "checkpoints": {"seconds": 1e-9}}  # fmt: skip


RUNS: dict[str, tuple[Train, Callable[[World, Path], Configuration]]] = {
    "grpo": (grpo.train, grpo_config),
    "grpo-no-kl": (grpo.train, grpo_without_kl_config),
    "grpo-async": (grpo.train, grpo_async_config),
    "grpo-process": (grpo.train, grpo_process_config),
    "grpo-lora": (grpo.train, lora_config),
    "ppo": (ppo.train, ppo_config),
    "ppo-async": (ppo.train, ppo_async_config),
    "ppo-shared": (ppo.train, ppo_shared_config),
    "dpo": (dpo.train, dpo_config),
    "dpo-rmsprop": (dpo.train, dpo_rmsprop_config),
    "dpo-online": (dpo.train, online_dpo_config),
    "sft": (sft.train, sft_config),
    "grpo-bfloat16": (grpo.train, bfloat16_config),
    "sft-stochastic": (sft.train, stochastic_config),
    "reward-model": (reward_model.train, reward_model_config),
    "reward-model-rankings": (reward_model.train, ranking_config),
}


# --- Comparison -----------------------------------------------------------------------------------


def depends_on_clock(name: str) -> bool:
    """Return whether a metric may differ between two equal runs, because it measures time."""
    definition = metric(name)
    return (
        name == "elapsed"
        or (definition is not None and definition.unit in ("s", "tokens/s"))
        or (name.startswith("time_share/"))
    )


def run_results(run: Path) -> dict[str, Any]:
    """Return the logs, models and last checkpoint of a run, without values that measure time."""
    results: dict[str, Any] = {}
    for stem in ("metrics", "evaluation", "samples", "outcomes"):
        file = run / f"{stem}.jsonl"
        lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
        results[stem] = [{k: v for k, v in x.items() if not depends_on_clock(k)} for x in lines]
    for file in sorted(run.rglob("*.safetensors")):
        if "checkpoints" not in file.parts:
            results[str(file.relative_to(run))] = load_file(file)
    last = Checkpoints(run, read_run(run)["id"]).latest()
    assert last is not None
    state = {name: last.load(name, PROMPTS) for name in sorted(last.entries)}
    del state[LOGS], state[LOOP_STATE]["spent"]["seconds"]
    for name in ("seconds", "stages", "flops"):  # FLOPs are counted over the whole process.
        del state[LOOP_STATE][name]
    return results | {"state": state}


PROMPTS = [object()] * 100
"""Stand-ins for the prompts that a checkpoint refers to by index."""


def different_values(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the paths of all values that are not bit-identical."""
    if isinstance(one, torch.Tensor):
        equal = one.dtype == other.dtype and one.shape == other.shape
        equal = equal and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (one, other)))
        return [] if equal else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{path}: {one.keys() ^ other.keys()}"]
        return [d for key in one for d in different_values(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} entries"]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True))
                for d in different_values(a, b, f"{path}/{i}")]  # fmt: skip
    if hasattr(one, "__dataclass_fields__"):
        return different_values(vars(one), vars(other), path)
    return [] if repr(one) == repr(other) else [f"{path}: {one!r} and {other!r}"]
