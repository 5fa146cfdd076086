"""``trivium sample``: a model's responses to prompts, as rows of a file.

Each row keeps the columns of its prompt's row, so that the file can be used as data. Making pairs
of responses is left to ``pairs``, and measuring with confidence intervals to ``evaluate``.
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
from trivium.hf.loading import context_length, load_tokenizer
from trivium.hf.model_config import ModelConfig
from trivium.models import flops
from trivium.models.policy import Policy
from trivium.monitoring.progress import Progress
from trivium.rewards.reward import Rewards, Scores
from trivium.rollout.engine import EVAL_STEP
from trivium.rollout.rollouts import Rollouts, roll_out
from trivium.rollout.sampling import Sampling
from trivium.runs.budget import BudgetTracker
from trivium.training.setup import load_rewards, local_engine, max_prompt_length

logger = logging.getLogger("trivium")

RESPONSES_PER_BATCH = 512
"""Responses between two progress updates. The responses do not depend on it."""
RESPONSE_COLUMNS = ("response", "tokens", "finish_reason", "reward", "components", "step_rewards")
"""Columns of a written row, in addition to the prompt and its own columns."""


def run(config: SampleConfig) -> Path:
    """Sample responses, score and write them, and return the file's path.

    A file ``….counts.json`` beside it records the number of prompts, responses and tokens.

    Raises:
        DataError: no response has the minimum reward.
    """
    require_free(config.output, config.overwrite)
    tokenizer = load_tokenizer(config.model)
    max_length = max_prompt_length(context_length(config.model), config.sampling.max_tokens)
    prompts = load_prompts(config.data, tokenizer, max_length)
    _check_columns(prompts)
    rewards = load_rewards(config.rewards, prompts, tokenizer)[0] if config.rewards else None
    policy = load_sampler(config.model, tokenizer, config.sampling)
    spending = BudgetTracker(config.budget)
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


def write_counts(output: Path, counts: Counter[str], spending: BudgetTracker) -> None:
    """Write the counts and the cost to a file beside the output."""
    record = {**counts, **spending.spent}
    output.with_suffix(".counts.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


def load_sampler(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, sampling: Sampling
) -> Policy:
    """Return the policy to sample from, at the sampling temperature."""
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
    spending: BudgetTracker,
) -> Iterator[Rollouts]:
    """Yield the responses to all prompts and their rewards, in batches.

    Without reward functions every reward is 0. Each batch is added to `spending`, and sampling
    ends early when the budget is spent.
    """
    engine = local_engine(policy)
    size = max(1, RESPONSES_PER_BATCH // samples)
    starts = range(0, len(prompts), size)
    seed_and_step: dict[str, Any] = {"seed": seed, "step": EVAL_STEP}
    with Progress(title, len(starts)) as progress:
        for start in starts:
            start_time, flops_before = time.perf_counter(), flops.total()
            batch = list(prompts[start : start + size])
            if rewards is not None:
                rollouts = roll_out(engine, rewards, batch, samples, sampling, **seed_and_step)
                metrics = rollouts.metrics()
            else:
                responses = engine.generate(batch, samples, sampling, **seed_and_step)
                unscored = Scores([0.0] * (len(batch) * samples), None, {}, {})
                rollouts = Rollouts(batch, responses, unscored, {})
                metrics = {k: v for k, v in rollouts.metrics().items() if k.startswith("length/")}
            progress.advance(metrics)
            spending.add(
                {
                    "tokens/generated": float(rollouts.lengths_N.sum()),
                    "time/total": time.perf_counter() - start_time,
                    "flops": flops.total() - flops_before,
                }
            )
            yield rollouts
            if spending.exhausted:
                done = min(start + size, len(prompts))
                logger.info("stopped after %d of %d prompts: %s", done, len(prompts), spending)
                return


def rows(rollouts: Rollouts, *, scored: bool) -> Iterator[dict[str, Any]]:
    """Yield one row per response: the prompt's columns, the response and, if scored, rewards."""
    totals = iter(total_rewards(rollouts.scores))
    index = 0
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
                row |= {"reward": reward, **_reward_components(rollouts.scores, index)}
            index += 1
            yield row


def total_rewards(scores: Scores) -> list[float]:
    """Return the total reward of each response: its outcome reward plus its step rewards."""
    steps = scores.steps or [[] for _ in scores.outcomes]
    return [
        outcome + sum(value for _, value in step_rewards)
        for outcome, step_rewards in zip(scores.outcomes, steps, strict=True)
    ]


def _reward_components(scores: Scores, index: int) -> dict[str, Any]:
    components = {name: values[index] for name, values in scores.components.items()}
    if scores.steps is None:
        return {"components": components}
    return {"components": components, "step_rewards": scores.steps[index]}


def _check_columns(prompts: Sequence[Prompt]) -> None:
    """Raise DataError if a column of the data has the name of a column that is written."""
    columns = {column for prompt in prompts for column in prompt.columns}
    taken = [name for name in RESPONSE_COLUMNS if name in columns]
    if taken:
        raise DataError(
            f"the data has the columns {', '.join(taken)}, which the output uses for the response: "
            "rename them in the data"
        )
