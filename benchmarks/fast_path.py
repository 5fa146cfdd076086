"""Measure the gain of the CPU fast path in a whole step.

    python benchmarks/fast_path.py [--model S|M|DIRECTORY] [--work sft,dpo,grpo,ppo,sample]
        [--repetitions 5] [--prompts 4] [--responses 8] [--memory] [--output FILE]

Two sets of models with the same weights run the same work in turn, in one process and on one
thread: one set has the fast path, the other has ``model.fast_path: off``. The gain is the processor
time without the fast path divided by the processor time with it, or with ``--memory`` the same
ratio of the growth of peak resident memory. The script prints a Markdown table with the median, the
lowest and the highest gain of all repetitions after a warm-up, and writes all measurements to a
JSON file.

``sft``, ``dpo``, ``grpo`` and ``ppo`` are one optimizer step of the trainers' own code: forward and
backward pass, clipping and AdamW. GRPO and PPO also compute advantages and the log-probs of the
reference, and PPO the values of its separate critic. DPO scores the reference before its first
step, which is not measured. ``sample`` generates the responses. Prompts have 80 tokens and
responses 64. With P prompts of R responses, DPO has P·R/4 pairs and SFT P·R/2 rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent / "speed"))

import torch
from results import processor
from shares import measure, processor_seconds
from worlds import SIZES, write_world

from trivium.algorithms import dpo, grpo, ppo, sft
from trivium.algorithms.actor_critic import make_critic, parameter_sets
from trivium.algorithms.dpo_config import DPOConfig
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.algorithms.ppo_config import PPOConfig
from trivium.algorithms.ppo_equations import Objective, Returns
from trivium.algorithms.sft_config import SFTConfig
from trivium.algorithms.supervision import Supervision
from trivium.data.batch import Grouped
from trivium.data.group import Group
from trivium.data.oom import score_logprobs
from trivium.data.prompts import Prompt
from trivium.data.response import Response
from trivium.hf.loading import trained_parameters
from trivium.hf.model_config import FastPath, ModelConfig
from trivium.memory.stages import components
from trivium.models.cpu.linear import matmul_backend
from trivium.models.critic import Critic, SeparateCritic
from trivium.models.policy import Policy
from trivium.models.reference import Reference
from trivium.rewards.reward import Scores
from trivium.rollout.local_engine import LocalEngine
from trivium.rollout.rollouts import Rollouts
from trivium.rollout.sampling import Sampling
from trivium.runs.peak_memory import PeakMemory
from trivium.training.experience import WeightedGroups
from trivium.training.micro_batch import MicroBatch
from trivium.training.optimizer import Optimizer, ParameterSet
from trivium.training.options import AGGREGATION, load_option
from trivium.training.protocols import Updates

SPEED = Path(__file__).resolve().parent / "speed"
PROMPT_TOKENS, RESPONSE_TOKENS = 80, 64
OPTIMIZER = {"learning_rate": 1e-8, "schedule": "constant"}
Step = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: the models of a checkpoint, and a step's data.

    Attributes:
        model: directory of the checkpoint.
        fast_path: as in ``ModelConfig``.
        prompts: prompts per step.
        responses: responses per prompt.
    """

    model: str
    fast_path: FastPath
    prompts: int
    responses: int

    def settings(self, **options: Any) -> dict[str, Any]:
        """Return the settings that all methods share, and ``options``."""
        model = {"path": self.model, "device": "cpu", "fast_path": self.fast_path}
        return {
            "model": model,
            "data": {"path": "unused.jsonl"},
            "optimizer": OPTIMIZER,
            **options,
        }

    def on_policy_settings(self, **options: Any) -> dict[str, Any]:
        """Return the settings of a step of GRPO or PPO with one optimizer step."""
        return self.settings(
            rewards=[{"function": f"{SPEED / 'reward.py'}:share_of_a"}],
            sampling={"max_tokens": RESPONSE_TOKENS},
            prompts_per_step=self.prompts,
            responses_per_prompt=self.responses,
            epochs=1,
            minibatches=1,
            **options,
        )

    def policy(self) -> Policy:
        return Policy.load(ModelConfig.model_validate(self.settings()["model"]))

    def critic(self, config: PPOConfig, policy: Policy) -> Critic:
        critic = make_critic(config.critic, config.model, policy)
        assert isinstance(critic, SeparateCritic), "PPO's default critic is separate"
        return critic

    def groups(self, policy: Policy, count: int, responses: int) -> list[Group]:
        """Return ``count`` groups of random tokens."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = len(policy.base.get_input_embeddings().weight)

        def tokens(length: int) -> list[int]:
            return torch.randint(vocabulary, (length,), generator=generator).tolist()

        return [
            Group(tokens(PROMPT_TOKENS), [tokens(RESPONSE_TOKENS) for _ in range(responses)])
            for _ in range(count)
        ]

    def rollouts(self, policy: Policy) -> Rollouts:
        """Return a rollout batch of random tokens, with a different reward for every response."""
        groups = self.groups(policy, self.prompts, self.responses)
        sampler_logprobs = [-1.0] * RESPONSE_TOKENS
        return Rollouts(
            prompts=[Prompt(group.prompt, "", {}, i) for i, group in enumerate(groups)],
            responses=[
                [Response(tokens, sampler_logprobs, "length", "") for tokens in group.responses]
                for group in groups
            ],
            scores=Scores([float(i) for i in range(self.prompts * self.responses)], None, {}, {}),
            seconds={},
        )


# --- Work -----------------------------------------------------------------------------------------


def sft_step(side: Side) -> Step:
    """Return one optimizer step of supervised fine-tuning."""
    config = SFTConfig.model_validate(side.settings())
    policy = side.policy()
    groups = side.groups(policy, max(1, side.prompts * side.responses // 2), 1)
    mask_T = torch.ones(len(groups) * RESPONSE_TOKENS, dtype=torch.bool)
    data = WeightedGroups(groups, loss_mask_T=mask_T)
    aggregation = load_option(AGGREGATION, config.aggregation)
    optimizer = new_optimizer([(config.optimizer, trained_parameters(policy.model))])

    def step() -> None:
        parts = data.split(config.tokens_per_micro_batch)
        micro_batches = data.split_with_token_weights(parts, aggregation)
        optimizer.step([MicroBatch(x, partial(sft.loss, policy)) for x in micro_batches])
        optimizer.zero_grad()

    return step


def dpo_step(side: Side) -> Step:
    """Return one optimizer step of DPO."""
    config = DPOConfig.model_validate(side.settings())
    policy = side.policy()
    objective = dpo.Objective.of(config)
    pairs = dpo.PairData(side.groups(policy, max(1, side.prompts * side.responses // 4), 2))
    pairs = dpo.with_reference(config, pairs, partial(score_logprobs, policy))
    optimizer = new_optimizer([(config.optimizer, trained_parameters(policy.model))])

    def step() -> None:
        max_tokens = config.tokens_per_micro_batch
        optimizer.step(dpo.micro_batches(objective, policy, pairs, max_tokens))
        optimizer.zero_grad()

    return step


def grpo_step(side: Side) -> Step:
    """Return the stages of a GRPO step after scoring."""
    config = GRPOConfig.model_validate(side.on_policy_settings())
    policy = side.policy()
    objective, supervision = grpo.Objective.of(config), Supervision.of(config)
    models = components(policy, Reference(policy))
    learner = grpo.Learner.of(config, objective, supervision, models)
    optimizer = new_optimizer([(config.optimizer, trained_parameters(policy.model))])
    rollouts = side.rollouts(policy)

    def step() -> None:
        experience = learner.prepare(rollouts, 1)
        learner.update(optimizer, experience, Updates(learner.plan(experience, 1)))
        optimizer.zero_grad()

    return step


def ppo_step(side: Side) -> Step:
    """Return the stages of a PPO step after scoring."""
    critic_settings = {"optimizer": OPTIMIZER}
    config = PPOConfig.model_validate(side.on_policy_settings(critic=critic_settings))
    policy = side.policy()
    critic = side.critic(config, policy)
    models = components(policy, Reference(policy))
    learner = ppo.Learner.of(config, Objective.of(config), Returns.of(config), models, critic)
    optimizer = new_optimizer(parameter_sets(config, policy, critic))
    rollouts = side.rollouts(policy)

    def step() -> None:
        minibatches = learner.schedule.plan(Grouped(rollouts.groups), 1)
        experience = learner.prepare(rollouts, minibatches, config.beta)
        learner.update(optimizer, experience, Updates(minibatches), True, None)
        optimizer.zero_grad()

    return step


def sample_step(side: Side) -> Step:
    """Return the sampling of one rollout batch; no token ends a response early."""
    policy = side.policy()
    engine, sampling = LocalEngine(policy, end_tokens=()), Sampling(max_tokens=RESPONSE_TOKENS)
    prompts = side.rollouts(policy).prompts
    return partial(engine.generate, prompts, side.responses, sampling, seed=0, step=1)


def new_optimizer(sets: list[ParameterSet]) -> Optimizer:
    """Return an optimizer whose schedule is constant, so that any number of steps will do."""
    return Optimizer(sets, total_steps=1)


WORK: dict[str, Callable[[Side], Step]] = {
    "sft": sft_step,
    "dpo": dpo_step,
    "grpo": grpo_step,
    "ppo": ppo_step,
    "sample": sample_step,
}


# --- Measurement and results ----------------------------------------------------------------------


def peak_bytes(work: Step) -> float:
    """Return the growth of peak resident memory in one call."""
    memory = PeakMemory(torch.device("cpu"))
    work()
    return float(memory.bytes())


@dataclass(frozen=True)
class Result:
    """Costs of one kind of work with and without the fast path, one pair per repetition."""

    work: str
    costs: list[tuple[float, float]]

    @property
    def ratios(self) -> list[float]:
        return [cost_without / max(cost_with, 1e-9) for cost_with, cost_without in self.costs]

    def record(self) -> dict[str, Any]:
        """Return the entry of the JSON file."""
        ratios = self.ratios
        summary = {"gain": median(ratios), "low": min(ratios), "high": max(ratios)}
        return asdict(self) | summary

    def cell(self) -> str:
        """Return the cell of the Markdown table."""
        ratios = self.ratios
        return f"{median(ratios):.2f}× ({min(ratios):.2f} – {max(ratios):.2f})"


def compare(model: str, work: list[str], options: argparse.Namespace) -> Iterator[Result]:
    """Yield the result of every kind of work."""
    cost = peak_bytes if options.memory else processor_seconds
    for kind in work:
        accelerated, plain = (
            WORK[kind](Side(model, fast_path, options.prompts, options.responses))
            for fast_path in ("auto", "off")
        )
        costs = measure(accelerated, plain, nullcontext, options.repetitions, cost)
        yield Result(kind, costs)
        del accelerated, plain
        gc.collect()  # A module and its replaced forward refer to each other.


def table(results: list[Result]) -> str:
    """Return a Markdown table: one column per kind of work."""
    rows = [
        [result.work for result in results],
        ["---"] * len(results),
        [result.cell() for result in results],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(results: list[Result], options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the JSON file."""
    return {
        "commit": commit(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul_backend": matmul_backend.name,
        "model": Path(options.model).name,
        "prompts": options.prompts,
        "responses": options.responses,
        "prompt_tokens": PROMPT_TOKENS,
        "response_tokens": RESPONSE_TOKENS,
        "repetitions": options.repetitions,
        "cost": "bytes" if options.memory else "seconds",
        "results": [result.record() for result in results],
    }


def commit() -> str:
    """Return the commit of the measured code, with a mark if files differ from the commit."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=SPEED, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


@contextmanager
def checkpoint(model: str) -> Iterator[str]:
    """Yield the directory of the checkpoint; write that of a benchmark size."""
    if model not in SIZES:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        write_world(world, SIZES[model], prompt_tokens=PROMPT_TOKENS, rows=1)
        yield str(world / "model")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="S", help="S, M or the directory of a checkpoint")
    parser.add_argument("--work", default=",".join(WORK), help="kinds of work, with commas")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4, help="prompts per step")
    parser.add_argument("--responses", type=int, default=8, help="responses per prompt")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if unknown := set(options.work.split(",")) - set(WORK):
        parser.error(f"--work: {sorted(unknown)} are unknown: choose from {', '.join(WORK)}")
    if options.model not in SIZES and not Path(options.model).is_dir():
        parser.error(f"--model: {options.model} is not a directory: choose S, M or a checkpoint")
    return options


def main() -> None:
    """Measure; write the file after every comparison, since a run may take hours."""
    options = arguments()
    torch.set_num_threads(1)
    results: list[Result] = []
    with checkpoint(options.model) as model:
        for result in compare(model, options.work.split(","), options):
            results.append(result)
            print(f"{result.work}: {result.cell()}", file=sys.stderr, flush=True)
            options.output.write_text(json.dumps(report(results, options), indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
