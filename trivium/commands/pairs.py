"""``trivium pairs``: preference pairs from responses that differ in reward.

The responses are sampled from a model and scored, or read from rows of data that hold several
scored responses. Training on the pairs is left to ``dpo`` and ``reward-model``.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

from trivium.commands.candidates import Candidates, candidates_of
from trivium.commands.output import require_free, rows_written
from trivium.commands.pairs_config import PairsConfig
from trivium.commands.sample import load_sampler, sampled, total_rewards, write_counts
from trivium.data.prompts import load_prompts
from trivium.data.rows import collect
from trivium.errors import DataError
from trivium.hf.loading import context_length, load_tokenizer
from trivium.hf.model_config import ModelConfig
from trivium.rollout.rollouts import Rollouts
from trivium.runs.budget import BudgetTracker
from trivium.training.setup import load_rewards, max_prompt_length

logger = logging.getLogger("trivium")


def run(config: PairsConfig) -> Path:
    """Make the pairs, write them, and return the file's path.

    A file ``….counts.json`` beside it records the number of prompts, responses and tokens.

    Raises:
        DataError: no prompt gives a pair.
    """
    require_free(config.output, config.overwrite)
    counts: Counter[str] = Counter()
    spending = BudgetTracker(config.budget)
    if config.model is not None:
        candidates_by_prompt = _from_model(config, config.model, counts, spending)
    else:
        candidates_by_prompt = _from_rows(config)
    with rows_written(config.output) as write:
        for candidates in candidates_by_prompt:
            pairs = contrasts(candidates, config)
            counts["prompts"] += 1
            counts["pairs"] += len(pairs)
            counts["without"] += not pairs
            for row in pairs:
                write(row)
        summary = _summary(config, counts)
        if not counts["pairs"]:
            raise DataError(
                f"{summary}; sample more responses per prompt, at a higher temperature, or use "
                "rewards that differ between them"
                if config.model
                else f"{summary}; do the scores differ within a row?"
            )
    write_counts(config.output, counts, spending)
    logger.info("%s", summary)
    return config.output


def contrasts(candidates: Candidates, config: PairsConfig) -> list[dict[str, Any]]:
    """Return the rows of one prompt's pairs in the order of ``pairing``.

    The seed shuffles equal gaps, and with ``best_random`` the others (Tunstall et al. 2023).
    """
    texts, scores = candidates.responses, candidates.scores
    usable = [i for i, text in enumerate(texts) if text.strip()]
    gaps = {(i, j): scores[i] - scores[j] for i, j in permutations(usable, 2)}
    differing = [
        (i, j)
        for (i, j), gap in gaps.items()
        if gap > 0 and gap >= config.minimum_gap and texts[i] != texts[j]
    ]
    random.Random(f"{config.seed}/{candidates.index}").shuffle(differing)
    ordered = sorted(differing, key=lambda pair: -gaps[pair])
    if config.pairing == "best_random":
        ordered = [pair for pair in differing if pair[0] == ordered[0][0]]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for better, worse in ordered:
        row = {
            "prompt": candidates.prompt,
            "chosen": texts[better],
            "rejected": texts[worse],
            "chosen_reward": scores[better],
            "rejected_reward": scores[worse],
        }
        row |= {"tools": candidates.tools} if candidates.tools else {}
        rows.setdefault((texts[better], texts[worse]), row)
    return list(rows.values())[: config.pairs_per_prompt]


def _summary(config: PairsConfig, counts: Counter[str]) -> str:
    parts = [f"{config.output}: {counts['pairs']:,} pairs from {counts['prompts']:,} prompts"]
    if counts["without"]:
        parts.append(f"{counts['without']:,} prompts without two responses that differ enough")
    if counts["truncated"]:
        parts.append(
            f"{counts['truncated']:,} of {counts['responses']:,} responses left out because they "
            f"are truncated at {config.sampling.max_tokens} tokens (see keep_truncated)"
        )
    return "; ".join(parts)


# --- From a model ---------------------------------------------------------------------------------


def _from_model(
    config: PairsConfig, model: ModelConfig, counts: Counter[str], spending: BudgetTracker
) -> Iterator[Candidates]:
    tokenizer = load_tokenizer(model)
    max_length = max_prompt_length(context_length(model), config.sampling.max_tokens)
    prompts = load_prompts(config.data, tokenizer, max_length)
    rewards, _ = load_rewards(config.rewards, prompts, tokenizer)
    policy = load_sampler(model, tokenizer, config.sampling)
    for rollouts in sampled(
        policy,
        prompts,
        rewards,
        config.sampling,
        config.samples,
        seed=config.seed,
        title="pairs",
        spending=spending,
    ):
        counts["responses"] += len(rollouts.flat)
        counts["truncated"] += 0 if config.keep_truncated else int(rollouts.truncated_N.sum())
        yield from _scored(rollouts, config.keep_truncated)


def _scored(rollouts: Rollouts, keep_truncated: bool) -> Iterator[Candidates]:
    totals = iter(total_rewards(rollouts.scores))
    for prompt, responses in zip(rollouts.prompts, rollouts.responses, strict=True):
        scored = [(response, next(totals)) for response in responses]
        used = [
            (r.text, total) for r, total in scored if keep_truncated or r.finish_reason != "length"
        ]
        texts, scores = [text for text, _ in used], [total for _, total in used]
        tools = None if isinstance(prompt.text, str) else prompt.columns.get("tools")
        yield Candidates(prompt.text, prompt.index, texts, scores, tools)


# --- From rows ------------------------------------------------------------------------------------


def _from_rows(config: PairsConfig) -> Iterator[Candidates]:
    return iter(collect(config.data, lambda row, notes: candidates_of(row, config, notes))[0])
