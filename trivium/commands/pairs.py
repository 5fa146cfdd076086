"""``trivium pairs``: preference pairs from responses that differ in reward.

The responses are sampled from a model and scored, or rows of data carry several already, each with
a number that says how good it is. What is learned from the pairs is for ``dpo`` and
``reward-model``.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from trivium.algorithms.parts import load_rewards
from trivium.commands.pairs_config import CandidateConfig, PairsConfig
from trivium.commands.sample import (
    load_sampler,
    require_free,
    rows_written,
    sampled,
    total_rewards,
    write_counts,
)
from trivium.data.chat import Messages
from trivium.data.files import nearest, shortened
from trivium.data.prompts import explicit_prompt, load_prompts
from trivium.data.rows import Row, checked_text, collect
from trivium.errors import DataError
from trivium.models.loading import load_tokenizer
from trivium.models.model_config import ModelConfig
from trivium.rollout.rollouts import Rollouts
from trivium.runs.budget import Spending

logger = logging.getLogger("trivium")


@dataclass(frozen=True)
class Candidates:
    """A prompt, the number of its row, and scored responses to it."""

    prompt: str | Messages
    index: int
    responses: list[str]
    scores: list[float]


def run(config: PairsConfig) -> Path:
    """Find the pairs and write them; returns the file's path.

    Beside it, ``….counts.json`` says how many prompts, responses and tokens it took.

    Raises DataError where no prompt yields a pair.
    """
    require_free(config.output, config.overwrite)
    counts: Counter[str] = Counter()
    spending = Spending(config.budget)
    if config.model is not None:
        found = _from_model(config, config.model, counts, spending)
    else:
        found = _from_rows(config)
    with rows_written(config.output) as write:
        for candidates in found:
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
                "rewards that tell them apart"
                if config.model
                else f"{summary}; do the scores differ within a row?"
            )
    write_counts(config.output, counts, spending)
    logger.info("%s", summary)
    return config.output


def contrasts(candidates: Candidates, config: PairsConfig) -> list[dict[str, Any]]:
    """The rows of one prompt's pairs: the widest gap first, ties in an order drawn by the seed."""
    texts, scores = candidates.responses, candidates.scores
    usable = [i for i, text in enumerate(texts) if text.strip()]
    gaps = {(i, j): scores[i] - scores[j] for i, j in permutations(usable, 2)}
    differing = [
        (i, j)
        for (i, j), gap in gaps.items()
        if gap > 0 and gap >= config.minimum_gap and texts[i] != texts[j]
    ]
    random.Random(f"{config.seed}/{candidates.index}").shuffle(differing)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for better, worse in sorted(differing, key=lambda pair: -gaps[pair]):
        row = {
            "prompt": candidates.prompt,
            "chosen": texts[better],
            "rejected": texts[worse],
            "chosen_reward": scores[better],
            "rejected_reward": scores[worse],
        }
        rows.setdefault((texts[better], texts[worse]), row)
    return list(rows.values())[: config.pairs_per_prompt]


def _summary(config: PairsConfig, counts: Counter[str]) -> str:
    parts = [f"{config.output}: {counts['pairs']:,} pairs from {counts['prompts']:,} prompts"]
    if counts["without"]:
        parts.append(f"{counts['without']:,} prompts without two responses that differ enough")
    if counts["cut_off"]:
        parts.append(
            f"{counts['cut_off']:,} of {counts['responses']:,} responses left out, which the limit "
            f"of {config.sampling.max_tokens} tokens cut off (see keep_cut_off)"
        )
    return "; ".join(parts)


# --- From a model ---------------------------------------------------------------------------------


def _from_model(
    config: PairsConfig, model: ModelConfig, counts: Counter[str], spending: Spending
) -> Iterator[Candidates]:
    tokenizer = load_tokenizer(model)
    prompts = load_prompts(config.data, tokenizer)
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
        counts["cut_off"] += 0 if config.keep_cut_off else int(rollouts.cut_off_N.sum())
        yield from _scored(rollouts, config.keep_cut_off)


def _scored(rollouts: Rollouts, keep_cut_off: bool) -> Iterator[Candidates]:
    totals = iter(total_rewards(rollouts.scores))
    for prompt, responses in zip(rollouts.prompts, rollouts.responses, strict=True):
        scored = [(response, next(totals)) for response in responses]
        used = [(r.text, total) for r, total in scored if keep_cut_off or r.ended != "length"]
        texts, scores = [text for text, _ in used], [total for _, total in used]
        yield Candidates(prompt.text, prompt.index, texts, scores)


# --- From rows ------------------------------------------------------------------------------------


def _from_rows(config: PairsConfig) -> Iterator[Candidates]:
    def convert(row: Row, notes: Counter[str]) -> Candidates:
        responses: list[str] = []
        scores: list[float] = []
        for candidate in config.candidates:
            texts, numbers = _texts_and_scores(row, candidate)
            responses += texts
            scores += numbers
        return Candidates(explicit_prompt(row, config.data), row.index, responses, scores)

    return iter(collect(config.data, convert)[0])


def _texts_and_scores(row: Row, candidate: CandidateConfig) -> tuple[list[str], list[float]]:
    found = [field_of(row.columns, name) for name in (candidate.response, candidate.score)]
    texts, numbers = (value if isinstance(value, list) else [value] for value in found)
    if len(texts) != len(numbers):
        raise DataError(
            f"`{candidate.response}` holds {len(texts)} responses and `{candidate.score}` "
            f"{len(numbers)} scores; each response needs one"
        )
    return (
        [checked_text(text, f"`{candidate.response}`") for text in texts],
        [_number(number, candidate.score) for number in numbers],
    )


def field_of(columns: dict[str, Any], name: str) -> Any:
    """A column, or a field in it by its dotted name; of a list, the field of every entry."""
    return columns[name] if name in columns else _inside(columns, name.split("."), name)


def _inside(value: Any, keys: Sequence[str], name: str) -> Any:
    if not keys:
        return value
    if isinstance(value, list):
        return [_inside(entry, keys, name) for entry in value]
    if isinstance(value, dict) and keys[0] in value:
        return _inside(value[keys[0]], keys[1:], name)
    held = f"there are {', '.join(map(str, value))}" if isinstance(value, dict) else ""
    near = nearest(keys[0], value) if isinstance(value, dict) else None
    guess = f"; did you mean `{near}`?" if near else ""
    raise DataError(
        f"`candidates` names `{name}`, and there is no `{keys[0]}`: "
        f"{held or f'what should hold it is {shortened(value)}'}{guess}"
    )


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"`{name}` is {shortened(value)}; a score is true, false or a finite number"
        )
    return float(value)
