"""GRPO steps of TRL on the prompts of ``run.py``: seconds of each step as JSON.

python trl_grpo.py WORLD DEVICE PROMPTS SAMPLES RESPONSE STEPS
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Clock(TrainerCallback):
    """Records the end of every step."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    world, device, *numbers = sys.argv[1:]
    prompts, samples, response, steps = map(int, numbers)
    rows = [json.loads(line) for line in (Path(world) / "data.jsonl").read_text().splitlines()]
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in rows[: prompts * (steps + 1)]])
    clock, gpu = Clock(), device == "cuda"
    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            str(Path(world) / "model"),
            reward_funcs=lambda completions, **_: [
                text.count("a") / (len(text) + 1) for text in completions
            ],
            args=GRPOConfig(
                output_dir=output,
                use_cpu=not gpu,
                bf16=gpu,
                per_device_train_batch_size=min(prompts * samples, 8 * samples),
                gradient_accumulation_steps=max(1, prompts // 8),
                num_generations=samples,
                max_completion_length=response,
                max_steps=steps + 1,
                learning_rate=1e-8,
                beta=0.0,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
            ),
            train_dataset=data,
            callbacks=[clock],
        )
        clock.ends = [time.perf_counter()]
        trainer.train()
    seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False)]
    print(json.dumps({"seconds": seconds[1:]}))


if __name__ == "__main__":
    main()
