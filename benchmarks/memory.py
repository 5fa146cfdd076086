"""Compare the predicted memory of every method with the measured peak, on models of three sizes.

    python benchmarks/memory.py [--sizes small,medium,large] [--methods sft,ppo] [--show-stages]

The script writes Llamas with random weights, a tokenizer of numbered words and data of fixed
lengths to a temporary directory. It predicts the memory of each run from its configuration, and
then trains in a separate process, on one thread. The measured value is the peak of resident memory
above that of the process after its imports and a first small step, which loads the libraries' code.
The script prints a Markdown table. The exit status is 1 if any prediction is more than 10 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trivium.algorithms import dpo, grpo, ppo, reward_model, sft
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.reward_model_config import RewardModelConfig
from trivium.algorithms.sft_config import SFTConfig
from trivium.memory.report import Lengths, Memory
from trivium.memory.stages import predict
from trivium.runs.peak_memory import PeakMemory

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2},
    "small": {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 6},
    "medium": {"vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8},
    "large": {"vocab_size": 32000, "hidden_size": 768, "num_hidden_layers": 12},
}
METHODS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTConfig, sft.train),
    "reward-model": (RewardModelConfig, reward_model.train),
    "ppo": (PPOConfig, ppo.train),
    "dpo": (DPOConfig, dpo.train),
    "grpo": (GRPOConfig, grpo.train),
}
PROMPT, RESPONSE = 32, 64
EXAMPLES = 64


def write_model(directory: Path, settings: dict[str, int]) -> None:
    """Write a Llama with random weights, heads of width 64 and a tokenizer of whole words.

    The directory ``reward-model`` in it gets a reward model of the same size.
    """
    words = {"<end>": 0, "<pad>": 1}
    words |= {f"w{i}": i for i in range(2, settings["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    width = settings["hidden_size"]
    torch.manual_seed(0)
    config = LlamaConfig(
        **settings,
        intermediate_size=width * 8 // 3,
        num_attention_heads=width // 64 or 1,
        num_key_value_heads=width // 64 or 1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    config.num_labels = 1
    scorer = directory / "reward-model"
    LlamaForSequenceClassification(config).save_pretrained(scorer)
    for place in (directory, scorer):
        fast.save_pretrained(place)


def write_data(directory: Path) -> None:
    """Write data for every method, with fixed numbers of words and therefore of tokens."""

    def text(words: int, first: int) -> str:
        return " ".join(f"w{2 + (first + i) % 500}" for i in range(words))

    rows = []
    for i in range(EXAMPLES):
        prompt, chosen, rejected = text(PROMPT, i), text(RESPONSE - 1, i), text(RESPONSE - 1, i + 9)
        rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    lines = {
        "pairs": rows,
        "demonstrations": [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows],
        "prompts": [{"prompt": r["prompt"]} for r in rows],
    }
    for name, records in lines.items():
        text_lines = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text_lines)


def configuration(method: str, directory: Path, model: Path) -> dict[str, Any]:
    """Return the configuration of one method's run: a few small optimizer steps."""
    pairs = {"path": str(directory / "pairs.jsonl")}
    prompts = {"path": str(directory / "prompts.jsonl")}
    common = {
        "model": {"path": str(model), "device": "cpu"},
        "run": {"directory": str(directory / "run")},
        "tokens_per_micro_batch": 1024,
    }
    on_policy = {
        **common,
        "data": prompts,
        "rewards": [
            {
                "function": "reward_model",
                "arguments": {"path": str(model / "reward-model")},
                "timeout": None,
            }
        ],
        "sampling": {"max_tokens": RESPONSE},
    }
    own: dict[str, dict[str, Any]] = {
        "sft": {
            **common,
            "data": {"path": str(directory / "demonstrations.jsonl")},
            "examples_per_step": 16,
            "steps": 2,
        },
        "reward-model": {
            **common,
            "pairs": pairs,
            "held_out_share": 0.25,
            "examples_per_step": 16,
            "epochs": 0.5,
        },
        "ppo": {**on_policy, "prompts_per_step": 16, "epochs": 1, "minibatches": 1, "steps": 2},
        "dpo": {
            **common,
            "data": pairs,
            "pairs_per_step": 16,
            "epochs": 0.5,
            "reference_cache": False,
        },
        "grpo": {
            **on_policy,
            "prompts_per_step": 4,
            "responses_per_prompt": 4,
            "beta": 0.04,
            "steps_per_iteration": 2,
        },
    }
    return own[method]


def train(method: str, path: Path) -> None:
    """Warm up, measure the baseline, train, and print the peak. Runs in the child process."""
    kind, run = METHODS[method]
    settings = json.loads(path.read_text())
    tiny = {**settings["tiny"], "run": {"directory": str(path.parent / "warm-up")}}
    run(kind.model_validate(tiny))
    peak = PeakMemory(torch.device("cpu"))
    run(kind.model_validate(settings["real"]))
    print(peak.bytes())


def measure(method: str, settings: dict[str, Any]) -> int:
    """Return the peak memory of a run in its own process, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        path.write_text(json.dumps(settings))
        command = [sys.executable, __file__, "--train", method, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{method} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def compare(method: str, directory: Path, size: str) -> tuple[Memory, int]:
    """Return the predicted memory of one run and its measured peak."""
    model_paths = {name: directory / name for name in ("tiny", size)}
    for name, path in model_paths.items():
        if not path.exists():
            write_model(path, SIZES[name])
    real = configuration(method, directory, model_paths[size])
    lengths = Lengths((PROMPT,), (RESPONSE,), held_out=16 if method == "reward-model" else 0)
    predicted = predict(method, METHODS[method][0].model_validate(real), lengths)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        real["run"] = {"directory": str(Path(folder) / "run")}
        tiny = configuration(method, directory, model_paths["tiny"])
        return predicted, measure(method, {"real": real, "tiny": tiny})


def print_stages(memory: Memory) -> None:
    """Print every stage and model of a prediction, in MiB."""
    for stage in memory.stages:
        print(f"    {stage.name}: {stage.total / 2**20:.0f}")
        for m in stage.models:
            parts = (m.parameters, m.gradients, m.optimizer, m.activations, m.cache)
            print(f"        {m.role}:", *(f"{part / 2**20:.1f}" for part in parts))


def main() -> int:
    """Compare every method on every size; return 1 if a prediction is more than 10 % off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="small,medium,large")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--show-stages", action="store_true")
    parser.add_argument("--train", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train[0], Path(options.train[1]))
        return 0
    worst = 0.0
    print("| model | method | peak stage | predicted, MiB | measured, MiB | ratio |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        for size in options.sizes.split(","):
            for method in options.methods.split(","):
                memory, measured = compare(method, Path(folder), size)
                ratio = memory.bytes / measured
                worst = max(worst, abs(ratio - 1))
                sizes = f"{memory.bytes / 2**20:,.0f} | {measured / 2**20:,.0f}"
                print(
                    f"| {size} | {method} | {memory.peak.name} | {sizes} | {ratio:.3f} |",
                    flush=True,
                )
                if options.show_stages:
                    print_stages(memory)
    return int(worst > 0.1)


if __name__ == "__main__":
    sys.exit(main())
