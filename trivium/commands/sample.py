"""``trivium sample``: a model's responses to prompts, as rows of a file.

Each row keeps the columns of its prompt's row, so that the file can be data again. Choosing among
responses is for ``pairs``, measuring with intervals for ``evaluate``.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trivium.commands.output import require_free, rows_written
from trivium.commands.sample_config import SampleConfig
from trivium.data.prompts import Prompt, load_prompts
from trivium.errors import DataError
from trivium.models import flops
from trivium.models.loading import context_length, load_tokenizer
from trivium.models.model_config import ModelConfig
from trivium.models.policy import Policy
from trivium.monitoring.progress import Progress
from trivium.rewards.reward import Rewards, Scores
from trivium.rollout.engine import EVAL_STEP
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.rollout.sampling import Sampling
from trivium.runs.budget import Spending
from trivium.training.setup import load_rewards, local_engine, max_prompt_length

logger = logging.getLogger("trivium")

RESPONSES_PER_BATCH = 512
"""Responses between two reports of progress; no response depends on it."""
WRITTEN = ("response", "tokens", "finish_reason", "reward", "components", "step_rewards")
"""What a row says of its response, besides the prompt."""


def run(config: SampleConfig) -> Path:
    """Sample, score and write; returns the file's path.

    Beside it, ``….counts.json`` says how many prompts, responses and tokens it took.

    Raises DataError where no response has the minimum reward.
    """
    require_free(config.output, config.overwrite)
    tokenizer = load_tokenizer(config.model)
    room = max_prompt_length(context_length(config.model), config.sampling.max_tokens)
    prompts = load_prompts(config.data, tokenizer, room)
    _refuse_taken_columns(prompts)
    rewards = load_rewards(config.rewards, prompts, tokenizer)[0] if config.rewards else None
    policy = load_sampler(config.model, tokenizer, config.sampling)
    spending = Spending(config.budget)
    batches = sampled(
        policy,
        prompts,
        rewards,
        config.sampling,
        config.samples,
        seed=config.seed,
        title="sample",
        spending=spending,
    )
    counts: Counter[str] = Counter()
    with rows_written(config.output) as write:
        for rollouts in batches:
            counts["prompts"] += len(rollouts.prompts)
            counts["responses"] += len(rollouts.flat)
            for row in rows(rollouts, scored=bool(config.rewards)):
                if config.minimum_reward is None or row["reward"] >= config.minimum_reward:
                    write(row)
                    counts["written"] += 1
        if not counts["written"]:
            raise DataError(
                f"none of {counts['responses']:,} responses has a reward of at least "
                f"{config.minimum_reward:g}: lower minimum_reward or sample more"
            )
    write_counts(config.output, counts, spending)
    return config.output


def write_counts(output: Path, counts: Counter[str], spending: Spending) -> None:
    """Write beside a file of rows what was counted, and what it cost."""
    record = {**counts, **spending.spent}
    output.with_suffix(".counts.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def load_sampler(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> Policy:
    """The policy to sample from, at the temperature it is sampled at."""
    return Policy.load(model, tokenizer, temperature=sampling.temperature or 1.0)


def sampled(
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Rewards | None,
    sampling: Sampling,
    samples: int,
    *,
    seed: int,
    title: str,
    spending: Spending,
) -> Iterator[Rollouts]:
    """Yield every prompt's responses with their rewards (0 where there are none), in batches.

    Adds to what is spent, and ends early once that is too much.
    """
    engine = local_engine(policy)
    size = max(1, RESPONSES_PER_BATCH // samples)
    starts = range(0, len(prompts), size)
    where: dict[str, Any] = {"seed": seed, "step": EVAL_STEP}
    with Progress(title, len(starts)) as progress:
        for start in starts:
            began, flops_before = time.perf_counter(), flops.total()
            batch = list(prompts[start : start + size])
            if rewards is not None:
                rollouts = roll_out(engine, rewards, batch, samples, sampling, **where)
                metrics = rollouts.metrics()
            else:
                responses = engine.generate(batch, samples, sampling, **where)
                unscored = Scores([0.0] * (len(batch) * samples), None, {}, {})
                rollouts = Rollouts(batch, responses, unscored, {})
                metrics = {k: v for k, v in rollouts.metrics().items() if k.startswith("length/")}
            progress.advance(metrics)
            spending.add(
                {
                    "tokens/generated": float(rollouts.lengths_N.sum()),
                    "time/total": time.perf_counter() - began,
                    "flops": flops.total() - flops_before,
                }
            )
            yield rollouts
            if spending.over:
                done = min(start + size, len(prompts))
                logger.info("stopped after %d of %d prompts: %s", done, len(prompts), spending)
                return


def rows(rollouts: Rollouts, *, scored: bool) -> Iterator[dict[str, Any]]:
    """Yield one row per response: the prompt's columns, its text, and what came of it."""
    totals = iter(total_rewards(rollouts.scores))
    number = 0
    for prompt, responses in zip(rollouts.prompts, rollouts.responses, strict=True):
        for response in responses:
            row = {
                **prompt.columns,
                "prompt": prompt.text,
                "response": response.text,
                "tokens": len(response.tokens),
                "finish_reason": response.finish_reason,
            }
            reward = next(totals)
            if scored:
                row |= {"reward": reward, **_parts_of_reward(rollouts.scores, number)}
            number += 1
            yield row


def total_rewards(scores: Scores) -> list[float]:
    """The whole reward of each response: its outcome and the sum of its steps."""
    steps = scores.steps or [[] for _ in scores.outcomes]
    return [
        outcome + sum(value for _, value in of_one)
        for outcome, of_one in zip(scores.outcomes, steps, strict=True)
    ]


def _parts_of_reward(scores: Scores, number: int) -> dict[str, Any]:
    components = {name: values[number] for name, values in scores.components.items()}
    if scores.steps is None:
        return {"components": components}
    return {"components": components, "step_rewards": scores.steps[number]}


def _refuse_taken_columns(prompts: Sequence[Prompt]) -> None:
    columns = {column for prompt in prompts for column in prompt.columns}
    taken = [name for name in WRITTEN if name in columns]
    if taken:
        raise DataError(
            f"the data has the columns {', '.join(taken)}, which the rows written here would have "
            "with another meaning: rename them in the data"
        )
