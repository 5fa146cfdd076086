"""Run one case with TRL in a separate process, in an environment without Trivium.

    python theirs.py TASK WORLD OUTPUT

TASK is a case (``cases.py``) as JSON. TRL's trainers run unmodified, with the settings that are
fastest on one core: no gradient checkpointing, no half precision (the core does not support it), no
evaluation, saving or logging. A setting that changes only the speed has its fastest value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import meter
from datasets import Dataset
from reward import share_of_a
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    TrainerCallback,
)

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 1e-8,
    "lr_scheduler_type": "constant",
}


def main() -> None:
    task, world, output = meter.begin()
    measured = meter.Meter(output, memory=task["memory"])
    if task["lean_head"]:
        use_head_on_responses_only()
    METHODS[task["method"]](task, world, output, measured)
    measured.report()


def use_head_on_responses_only() -> None:
    """Make TRL apply its head only to response positions on the CPU, as it does on GPUs."""
    from trl.trainer import utils

    utils._use_triton = lambda device: True


class MeterCallback(TrainerCallback):
    """Callback that reports the start of training and every n-th optimizer step to the meter."""

    def __init__(self, measured: meter.Meter, every: int = 1) -> None:
        self.measured, self.every, self.steps = measured, every, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.measured.loaded()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.measured.step()


def rows(task: dict[str, Any], world: Path, columns: dict[str, str]) -> Dataset:
    """Return the rows that the steps need, with TRL's column names."""
    lines = (world / "data.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    if task["method"] in ("dpo", "sft", "reward-model"):
        records = records[: task["prompts"] * steps(task)]
    return Dataset.from_list([{new: row[old] for new, old in columns.items()} for row in records])


def steps(task: dict[str, Any]) -> int:
    return task["steps"] + task["warm_up"]


def batches(task: dict[str, Any], rows: int) -> dict[str, int]:
    """Return the rows per forward pass and the passes per optimizer step."""
    size = task["their_rows_per_pass"] or rows
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size}


def language_model(world: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(world / "model")


def scorer(world: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(world / "scorer", num_labels=1)


def grpo(task: dict[str, Any], world: Path, output: Path, measured: meter.Meter) -> None:
    from trl import GRPOConfig, GRPOTrainer

    lengths: list[int] = []

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        return share_of_a(completions)

    responses = task["prompts"] * task["samples"]
    config = GRPOConfig(
        **COMMON,
        **batches(task, responses),
        output_dir=str(output),
        seed=task["seed"],
        max_steps=steps(task) * task["epochs"],
        num_generations=task["samples"],
        num_iterations=task["epochs"],
        max_completion_length=task["response"],
        beta=task["beta"],
        loss_type="grpo",
        use_bias_correction_kl=False,
        **task["their_settings"],
    )
    trainer = GRPOTrainer(
        str(world / "model"),
        reward,
        config,
        rows(task, world, {"prompt": "prompt"}),
        processing_class=tokenizer(world),
        callbacks=[MeterCallback(measured, every=task["epochs"])],
    )
    trainer.train()
    measured.note(tokens=lengths)


def generation(task: dict[str, Any], world: Path, output: Path, measured: meter.Meter) -> None:
    """Sample as GRPOTrainer does: repeat prompts, and drop tokens after the first end token."""
    import torch

    words, model = tokenizer(world), language_model(world)
    config = GenerationConfig(
        max_new_tokens=task["response"],
        do_sample=True,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        disable_compile=True,
        **task["their_settings"],
    )
    prompts = [row["prompt"] for row in rows(task, world, {"prompt": "prompt"})]
    size = task["their_rows_per_pass"] or task["prompts"] * task["samples"]
    torch.manual_seed(task["seed"])
    measured.loaded()
    tokens = []
    for step in range(steps(task)):
        chosen = prompts[step * task["prompts"] :][: task["prompts"]]
        repeated = [prompt for prompt in chosen for _ in range(task["samples"])]
        count = 0
        for first in range(0, len(repeated), size):
            batch = words(
                repeated[first : first + size],
                return_tensors="pt",
                padding=True,
                padding_side="left",
            )
            with torch.no_grad():
                sequences = model.generate(**batch, generation_config=config)
            responses = sequences[:, batch["input_ids"].shape[1] :]
            count += int(until_end(responses, words).sum())
        measured.step()
        tokens.append(count)
    measured.note(tokens=tokens)


def until_end(responses: Any, words: Any) -> Any:
    """Return a mask of the tokens up to and including the first end token."""
    ends = (responses == words.eos_token_id).int()
    return ends.cumsum(1) - ends == 0


def dpo(task: dict[str, Any], world: Path, output: Path, measured: meter.Meter) -> None:
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        **COMMON,
        **batches(task, task["prompts"]),
        output_dir=str(output),
        seed=task["seed"],
        num_train_epochs=1,
        precompute_ref_log_probs=task["precomputed"],
        **task["their_settings"],
    )
    pairs = rows(task, world, {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
    trainer = DPOTrainer(
        str(world / "model"),
        args=config,
        train_dataset=pairs,
        processing_class=tokenizer(world),
        callbacks=[MeterCallback(measured)],
    )
    data = trainer.train_dataset
    responses = [ids for side in ("chosen_ids", "rejected_ids") for ids in data[side]]
    note_tokens(task, measured, sum(map(len, responses)))
    trainer.train()


def sft(task: dict[str, Any], world: Path, output: Path, measured: meter.Meter) -> None:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        **COMMON,
        **batches(task, task["prompts"]),
        output_dir=str(output),
        seed=task["seed"],
        num_train_epochs=1,
        **task["their_settings"],
    )
    trainer = SFTTrainer(
        str(world / "model"),
        args=config,
        train_dataset=rows(task, world, {"prompt": "prompt", "completion": "chosen"}),
        processing_class=tokenizer(world),
        callbacks=[MeterCallback(measured)],
    )
    rows_of_labels = trainer.train_dataset["labels"]
    trained = sum(label != -100 for labels in rows_of_labels for label in labels)
    note_tokens(task, measured, trained)
    trainer.train()


def reward_model(task: dict[str, Any], world: Path, output: Path, measured: meter.Meter) -> None:
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(
        **COMMON,
        **batches(task, task["prompts"]),
        output_dir=str(output),
        seed=task["seed"],
        num_train_epochs=1,
        center_rewards_coefficient=0.01,
        **task["their_settings"],
    )
    trainer = RewardTrainer(
        scorer(world),
        config,
        train_dataset=rows(
            task, world, {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
        ),
        processing_class=tokenizer(world),
        callbacks=[MeterCallback(measured)],
    )
    data = trainer.train_dataset
    total = sum(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in data[side])
    note_tokens(task, measured, total - 2 * len(data) * task["prompt"])
    trainer.train()


def note_tokens(task: dict[str, Any], measured: meter.Meter, total: int) -> None:
    """Record the mean number of response tokens per step, from the total of all steps."""
    measured.note(tokens=[total / steps(task)] * steps(task))


def ppo(task: dict[str, Any], world: Path, output: Path, measured: meter.Meter) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    lengths: list[int] = []
    truncate = ppo_trainer.truncate_response

    def counted(stop: int, padding: int, responses: Any) -> Any:
        truncated = truncate(stop, padding, responses)
        lengths.append(int((truncated != padding).sum()))
        return truncated

    ppo_trainer.truncate_response = counted
    responses = task["prompts"] * task["samples"]
    config = PPOConfig(
        **COMMON,
        **batches(task, responses),
        output_dir=str(output),
        seed=task["seed"],
        total_episodes=responses * steps(task),
        num_ppo_epochs=task["epochs"],
        num_mini_batches=1,
        local_rollout_forward_batch_size=responses,
        num_sample_generations=0,
        response_length=task["response"],
        stop_token="eos",
        temperature=1.0,
        kl_coef=task["beta"],
        vf_coef=0.5,
        **task["their_settings"],
    )
    words = tokenizer(world)
    prompts = rows(task, world, {"prompt": "prompt"})
    tokens = Dataset.from_list(
        [{"input_ids": words(text)["input_ids"]} for text in prompts["prompt"]]
    )
    trainer = PPOTrainer(
        config,
        words,
        language_model(world),
        language_model(world),
        scorer(world),
        tokens,
        scorer(world),
        eval_dataset=tokens,
        callbacks=[MeterCallback(measured)],
    )
    trainer.train()
    measured.note(tokens=lengths)


def tokenizer(world: Path) -> Any:
    return AutoTokenizer.from_pretrained(world / "model")


METHODS = {
    "grpo": grpo,
    "generation": generation,
    "dpo": dpo,
    "sft": sft,
    "reward-model": reward_model,
    "ppo": ppo,
}

if __name__ == "__main__":
    main()
