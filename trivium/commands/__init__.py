"""Table of the commands that take a configuration file.

The command line reads this table without importing torch. A command's own modules are imported when
it runs. `chat`, `demo` and the other commands without a configuration file are not in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from trivium import distributed
from trivium.config.base import Configuration


@dataclass(frozen=True)
class Command:
    """One command: its help text, an example, and its configuration class and function.

    `config` and `function` are written ``module:name``. They are in separate modules, so that a
    configuration can be validated before torch is imported.
    """

    help: str
    config: str
    function: str
    example: str
    arguments: str
    trains: bool = False
    """Whether the command writes a run, which can be resumed."""
    product: str = ""
    """File or directory that later stages of a pipeline use, in the stage's directory; empty: the
    command cannot be a stage."""

    def config_class(self) -> type[Configuration]:
        """Return the configuration class. The import is fast."""
        return _import(self.config)

    def load(self) -> Callable[[Any], Any]:
        """Return the function that runs the command. The import takes seconds."""
        return _import(self.function)

    def run(self, config: Any) -> Any:
        """Run the preflight checks, and then the command; of several processes one checks."""
        if not distributed.is_first():
            return self.load()(config)
        if self.trains:
            kind = next(name for name, command in COMMANDS.items() if command is self)
            _import("trivium.runs.run_directory:claim_directory")(kind, config.run, config)
        _import("trivium.preflight:preflight")(config)
        if self.trains and config.run.push is not None:
            _import("trivium.runs.hub:require_writable")(config.run.push)
        return self.load()(config)


def _import(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(import_module(module), name)


_SFT = """\
model: {path: Qwen/Qwen2.5-0.5B}
data: {path: train.jsonl, template: "Question: {question}\\nAnswer:", columns: {completion: answer}}
optimizer: {learning_rate: 2e-5, schedule: cosine, warmup_steps: 20}
"""
_REWARD_MODEL = """\
model: {path: runs/sft/final}
pairs: {path: pairs.jsonl}
run: {directory: runs/reward}
"""
_PPO = """\
model: {path: runs/sft/final}
critic: {model: {path: runs/reward/final}}
data: {path: prompts.jsonl}
rewards:
  - {function: reward_model, arguments: {path: runs/reward/final}}
beta: 0.05
"""
_DPO = """\
model: {path: runs/sft/final}
data: {path: pairs.jsonl}
beta: 0.1
"""
_GRPO = """\
model: {path: runs/sft/final}
data: {path: train.jsonl, template: "Question: {question}\\nAnswer:"}
rewards:
  - {function: gsm8k}
  - {function: my_rewards.py:brevity, weight: 0.1}
responses_per_prompt: 8
"""
_SAMPLE = """\
model: {path: runs/sft/final}
data: {path: test.jsonl, template: "Question: {question}\\nAnswer:"}
samples: 4
rewards: [{function: gsm8k}]
output: responses.jsonl
"""
_PAIRS = """\
model: {path: runs/sft/final}
data: {path: train.jsonl, template: "Question: {question}\\nAnswer:"}
samples: 8
rewards: [{function: gsm8k}]
output: pairs.jsonl
"""
_LABEL_STEPS = """\
model: {path: runs/sft/final}
data: {path: train.jsonl, template: "Question: {question}\\nAnswer:"}
solutions: 4
rewards: [{function: gsm8k}]
completions: 8
output: labels.jsonl
"""
_EVALUATE = """\
model: {path: runs/grpo/final}
reference: {path: runs/sft/final}
data: {path: test.jsonl, template: "Question: {question}\\nAnswer:"}
rewards: [{function: gsm8k}]
output: evaluation.json
"""

_COMPARE = """\
model: {path: runs/sft/final}
data: {path: train.jsonl}
rewards: [{function: gsm8k}]
evaluation: {data: {path: test.jsonl}, every: 10}
budget: {currency: seconds, amount: 600}
seeds: [0, 1, 2]
methods:
  - {name: GRPO, stages: [{command: grpo}]}
  - {name: DPO, stages: [{command: pairs, share: 0.4}, {command: dpo}]}
  - {name: best of 8, best_of: 8}
"""

_RUN = """\
model: {path: Qwen/Qwen2.5-0.5B}
data: {path: openai/gsm8k, subset: main, split: train, template: "Question: {question}\\nAnswer:"}
rewards: [{function: gsm8k}]
evaluation: {data: {split: test}}
directory: runs/mine
stages:
  sft: {data: {columns: {completion: answer}}, epochs: 2.0}
  pairs: {model: {path: "${sft}"}, samples: 8}
  dpo: {model: {path: "${sft}"}, data: {path: "${pairs}"}}
  evaluate: {model: {path: "${dpo}"}, reference: {path: "${sft}"}}
"""

COMMANDS = {
    "sft": Command(
        help="fine-tune a model on demonstrations",
        config="trivium.algorithms.sft_config:SFTConfig",
        function="trivium.algorithms.sft:train",
        example=_SFT,
        arguments="epochs=2",
        trains=True,
        product="final",
    ),
    "reward-model": Command(
        help="train a reward model on preference pairs, or a process reward model on labeled steps",
        config="trivium.algorithms.reward_model_config:RewardModelConfig",
        function="trivium.algorithms.reward_model:train",
        example=_REWARD_MODEL,
        arguments="optimizer.learning_rate=5e-6",
        trains=True,
        product="final",
    ),
    "ppo": Command(
        help="train a policy with PPO: a critic, and the KL penalty in the reward",
        config="trivium.algorithms.ppo_config:PPOConfig",
        function="trivium.algorithms.ppo:train",
        example=_PPO,
        arguments="steps=200 run.seed=1",
        trains=True,
        product="final",
    ),
    "dpo": Command(
        help="train a policy with DPO, on pairs from a file or sampled during training",
        config="trivium.algorithms.dpo_config:DPOConfig",
        function="trivium.algorithms.dpo:train",
        example=_DPO,
        arguments="loss=ipo",
        trains=True,
        product="final",
    ),
    "grpo": Command(
        help="train a policy with GRPO, on outcome or process rewards",
        config="trivium.algorithms.grpo_config:GRPOConfig",
        function="trivium.algorithms.grpo:train",
        example=_GRPO,
        arguments="rewards.1.weight=0.2 run.seed=1",
        trains=True,
        product="final",
    ),
    "sample": Command(
        help="write a model's responses to prompts, with their rewards",
        config="trivium.commands.sample_config:SampleConfig",
        function="trivium.commands.sample:run",
        example=_SAMPLE,
        arguments="sampling.temperature=0.7",
        product="rows.jsonl",
    ),
    "pairs": Command(
        help="write preference pairs, from sampled responses or from scored candidates in the data",
        config="trivium.commands.pairs_config:PairsConfig",
        function="trivium.commands.pairs:run",
        example=_PAIRS,
        arguments="pairs_per_prompt=4",
        product="rows.jsonl",
    ),
    "label-steps": Command(
        help="label the steps of solutions by completing each of them, for a process reward model",
        config="trivium.commands.label_steps_config:LabelStepsConfig",
        function="trivium.commands.label_steps:run",
        example=_LABEL_STEPS,
        arguments="completions=16 labels=soft",
        product="rows.jsonl",
    ),
    "evaluate": Command(
        help="evaluate a model on held-out prompts, with 95 % confidence intervals",
        config="trivium.commands.evaluate_config:EvaluateConfig",
        function="trivium.commands.evaluate:run",
        example=_EVALUATE,
        arguments="samples=4",
        product="evaluation.json",
    ),
    "compare": Command(
        help="run several methods from one base model at equal budget, and recommend one",
        config="trivium.compare.config:CompareConfig",
        function="trivium.compare.run:run",
        example=_COMPARE,
        arguments="budget.amount=900 parallel=1",
    ),
    "run": Command(
        help="run a pipeline: named stages, each on what earlier ones produced",
        config="trivium.pipelines.config:PipelineConfig",
        function="trivium.pipelines.run:run",
        example=_RUN,
        arguments="stages.dpo.beta=0.3 seed=1",
    ),
}
