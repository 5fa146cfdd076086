"""``trivium label-steps``: labels for the steps of solutions, without a person (Math-Shepherd).

From the end of each step the model samples N completions, and a reward says which of the completed
solutions are right (Wang et al. 2024, eq. 3 and 4):

    hard:  y_k = 1 if any completion is right      soft:  y_k = share of right completions

The last step is complete already: its label is whether the solution is right. The rows are training
data of a process reward model (``reward-model`` with ``steps``).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trivium.commands.journal import Batch, Journal, identity
from trivium.commands.label_steps_config import LabelStepsConfig
from trivium.commands.output import require_free
from trivium.commands.sample import load_sampler, total_rewards, write_counts
from trivium.commands.solutions import COLUMN, EMPTY, no_steps, solutions_of, split_steps
from trivium.data.chat import decode_response
from trivium.data.encoder import Encoder
from trivium.data.preferences import token_ends
from trivium.data.prompts import Prompt, load_prompts
from trivium.data.response import FinishReason, Response
from trivium.data.rows import Row
from trivium.errors import ConfigurationError, DataError
from trivium.hf.loading import context_length, load_tokenizer
from trivium.models import flops
from trivium.monitoring.progress import Progress
from trivium.rewards.reward import Rewards
from trivium.rollout.engine import EVAL_STEP, Engine
from trivium.runs.budget import BudgetTracker
from trivium.training.setup import load_rewards, local_engine, max_prompt_length

logger = logging.getLogger("trivium")

SOLUTIONS_PER_BATCH = 32
"""Solutions between two writes of the journal. The labels do not depend on it."""
LABEL_COLUMNS = ("completions", "labels", "values")
"""Columns of a written row, in addition to the prompt and its own columns."""
COMPLETIONS_STEP = EVAL_STEP - 1
"""Step number of completions, whose random numbers are separate from those of solutions."""
_BITS = 32
"""Bits of a step's and of a solution's number in the index of a prefix."""


@dataclass
class Solution:
    """A solution to a prompt, and the end of each step in its tokens.

    `values` gets the share of right completions of each step.
    """

    prompt: Prompt
    number: int
    response: Response
    steps: list[str]
    ends: list[int]
    values: list[float] = field(default_factory=list)

    def prefixes(self) -> list[Prompt]:
        """Return prompt and solution up to the end of each step except the last, as prompts."""
        first = (self.prompt.index << _BITS | self.number) << _BITS
        return [
            Prompt(self.prompt.tokens + self.response.tokens[: end + 1], "", {}, first | step)
            for step, end in enumerate(self.ends[:-1])
        ]


def run(config: LabelStepsConfig) -> Path:
    """Label the steps, write them, and return the file's path.

    An interrupted run continues when it is started again, with the same labels. A file
    ``….counts.json`` beside the output records the numbers of solutions, steps and completions.

    Raises:
        DataError: no solution has several steps, or none is left.
    """
    require_free(config.output, config.overwrite)
    depends_on = identity(config, {"output", "overwrite", "budget"})
    journal = Journal(config.output, depends_on, overwrite=config.overwrite)
    tokenizer = load_tokenizer(config.model)
    prompts = _load_prompts(config, tokenizer)
    steps = StepSplitter(config.separator, tokenizer, config.data.template_arguments)
    given, left_out = None, Counter[str]()
    if config.solutions is None:
        given, left_out = _given_solutions(config, prompts, steps)
    rewards, _ = load_rewards(config.rewards, prompts, tokenizer)
    policy = load_sampler(config.model, tokenizer, config.sampling)
    labeler = Labeler(config, local_engine(policy), rewards, steps)
    if given is None:
        size = max(1, SOLUTIONS_PER_BATCH // (config.solutions or 1))
        batches = [partial(labeler.sample_and_label, part) for part in _parts(prompts, size)]
    else:
        batches = [partial(labeler.label, part) for part in _parts(given, SOLUTIONS_PER_BATCH)]
    counts, spending = _label(batches, journal, left_out, BudgetTracker(config.budget))
    summary = _summary(config, counts)
    if counts["steps"] == counts["solutions"]:
        journal.discard()
        raise no_steps(config, counts["solutions"]) if counts["steps"] else DataError(summary)
    journal.finish()
    write_counts(config.output, counts, spending)
    logger.info("%s", summary)
    return config.output


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _label(
    batches: Sequence[Callable[[], Batch]],
    journal: Journal,
    left_out: Counter[str],
    spending: BudgetTracker,
) -> tuple[Counter[str], BudgetTracker]:
    """Label the batches that the journal does not have; return the counts and the cost of all."""
    counts, done = Counter(left_out), len(journal.batches)
    for batch in journal.batches:
        counts.update(batch["counts"])
        spending.add(batch["spent"])
    if done:
        logger.info("resumed: %d of %d batches were done", done, len(batches))
    with Progress("label-steps", len(batches), done=done) as progress:
        for number, label in enumerate(batches[done:], done):
            if spending.exhausted:
                logger.info("stopped after %d of %d batches: %s", number, len(batches), spending)
                break
            start_time, flops_before = time.perf_counter(), flops.total()
            try:
                batch = label()
            except KeyboardInterrupt:
                raise KeyboardInterrupt("interrupted: rerun the command to resume") from None
            batch["spent"] |= {
                "time/total": time.perf_counter() - start_time,
                "flops": flops.total() - flops_before,
            }
            journal.add(batch)
            counts.update(batch["counts"])
            spending.add(batch["spent"])
            progress.advance({"right": batch["right"]})
    return counts, spending


class StepSplitter:
    """Splits solutions into steps, in text and in tokens.

    Args:
        separator: the text between two steps.
        tokenizer: the model's tokenizer.
        template_arguments: variables for its chat template.
    """

    def __init__(
        self,
        separator: str,
        tokenizer: PreTrainedTokenizerBase,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.separator = separator
        self.encoder = Encoder(tokenizer, template_arguments)

    def solution(self, prompt: Prompt, number: int, response: Response) -> Solution | None:
        """Return the solution with its steps; None if two steps end in one token."""
        steps = split_steps(response.text, self.separator)
        text, tokens = self.separator.join(steps), response.tokens
        try:
            ends = token_ends(steps, text, self.separator, tokens, self.encoder)
        except DataError as error:
            logger.warning("row %d: a solution is left out: %s", prompt.index, error)
            return None
        return Solution(prompt, number, response, steps, ends)

    def response(self, tokens: list[int], finish_reason: FinishReason) -> Response:
        """Return tokens as a response. It has no log-probs: it is only scored."""
        text = decode_response(self.encoder.tokenizer, tokens)
        return Response(tokens, [], finish_reason, text)


def _given_solutions(
    config: LabelStepsConfig, prompts: Sequence[Prompt], steps: StepSplitter
) -> tuple[list[Solution], Counter[str]]:
    """Return the solutions in the data, and the number of those left out, by reason.

    Raises DataError for a row without a solution, or if no solution has two steps.
    """
    context, left_out = context_length(config.model), Counter[str]()
    found: list[Solution] = []
    for prompt in prompts:
        where = f"row {prompt.index}"
        try:
            texts = solutions_of(Row(prompt.columns, prompt.index, where))
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        for number, text in enumerate(texts):
            if not text.strip():
                left_out["empty"] += 1
                continue
            tools = None if isinstance(prompt.text, str) else prompt.columns.get("tools")
            tokens = steps.encoder.exchange(prompt.text, text, tools).response
            _check_context(where, len(prompt.tokens) + len(tokens), config, context)
            solution = steps.solution(prompt, number, steps.response(tokens, "eos"))
            left_out["indivisible"] += solution is None
            found += [] if solution is None else [solution]
    if found and all(len(solution.steps) == 1 for solution in found):
        raise no_steps(config, len(found))
    return found, left_out


def _check_context(where: str, length: int, config: LabelStepsConfig, context: int | None) -> None:
    """Raise DataError if prompt, solution and a completion might exceed the model's context."""
    longest = length + config.sampling.max_tokens
    if context is not None and longest > context:
        raise DataError(
            f"{where}: prompt, solution and a completion have up to {longest} tokens, and the "
            f"model's context holds {context}: lower sampling.max_tokens, or remove the row"
        )


class Labeler:
    """Labels the steps of solutions: samples completions and scores them."""

    def __init__(
        self, config: LabelStepsConfig, engine: Engine, rewards: Rewards, steps: StepSplitter
    ) -> None:
        self.config, self.engine, self.rewards, self.steps = config, engine, rewards, steps

    def sample_and_label(self, prompts: Sequence[Prompt]) -> Batch:
        """Sample solutions to the prompts, and return their labels as ``label`` does."""
        groups = self._sample(prompts, self.config.solutions or 1, EVAL_STEP)
        solutions: list[Solution] = []
        left_out = Counter[str]()
        for prompt, responses in zip(prompts, groups, strict=True):
            for number, response in enumerate(responses):
                if response.finish_reason == "length" or not response.text.strip():
                    left_out["truncated" if response.text.strip() else "empty"] += 1
                    continue
                solution = self.steps.solution(prompt, number, response)
                left_out["indivisible"] += solution is None
                solutions += [] if solution is None else [solution]
        batch = self.label(solutions)
        batch["counts"] |= left_out
        batch["spent"]["tokens/generated"] += _tokens(groups)
        return batch

    def label(self, solutions: Sequence[Solution]) -> Batch:
        """Return the rows of the solutions, with their counts and their cost in tokens.

        The prefixes of a solution follow each other, so the engine computes each of its tokens
        once.
        """
        prefixes = [prefix for solution in solutions for prefix in solution.prefixes()]
        groups = self._sample(prefixes, self.config.completions, COMPLETIONS_STEP)
        self._set_values(solutions, groups)
        values = [value for solution in solutions for value in solution.values]
        return {
            "rows": [self._row(solution) for solution in solutions],
            "counts": {
                "solutions": len(solutions),
                "steps": len(values),
                "one_step": sum(len(solution.steps) == 1 for solution in solutions),
                "completions": sum(map(len, groups)),
            },
            "spent": {"tokens/generated": _tokens(groups)},
            "right": sum(values) / len(values) if values else 0.0,
        }

    def _set_values(
        self, solutions: Sequence[Solution], groups: Sequence[Sequence[Response]]
    ) -> None:
        """Set the share of right completions of every step; the last step has one, the solution."""
        completions = iter(groups)
        completed: list[tuple[Solution, list[Response]]] = []
        for solution in solutions:
            for end in solution.ends[:-1]:
                beginning = solution.response.tokens[: end + 1]
                whole = [
                    self.steps.response(beginning + r.tokens, r.finish_reason)
                    for r in next(completions)
                ]
                completed.append((solution, whole))
            completed.append((solution, [solution.response]))
        prompts = [solution.prompt for solution, whole in completed for _ in whole]
        right = iter(self._right(prompts, [r for _, whole in completed for r in whole]))
        for solution, whole in completed:
            solution.values.append(sum(next(right) for _ in whole) / len(whole))

    def _right(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[bool]:
        """Return whether each response is right."""
        if not responses:
            return []
        scores = self.rewards.score(prompts, responses)
        if scores.steps is not None:
            raise ConfigurationError(
                "rewards: one of them scores steps, and the labels come from whole solutions: name "
                "a reward of the final answer"
            )
        totals, threshold = total_rewards(scores), self.config.pass_threshold
        odd = next((total for total in totals if total not in (0, 1)), None)
        if threshold is None and odd is not None:
            raise ConfigurationError(
                f"pass_threshold = null: a solution has the reward {odd:g}, which is neither 1 "
                "(right) nor 0 (wrong): set pass_threshold to the smallest reward of a right "
                "solution"
            )
        return [total >= (1 if threshold is None else threshold) for total in totals]

    def _sample(self, prompts: Sequence[Prompt], samples: int, step: int) -> list[list[Response]]:
        return self.engine.generate(
            prompts, samples, self.config.sampling, seed=self.config.seed, step=step
        )

    def _row(self, solution: Solution) -> dict[str, Any]:
        hard = self.config.labels == "hard"
        columns = {k: v for k, v in solution.prompt.columns.items() if k != COLUMN}
        return {
            **columns,
            "prompt": solution.prompt.text,
            "completions": solution.steps,
            "labels": [value > 0 for value in solution.values] if hard else solution.values,
            "values": solution.values,
        }


def _tokens(groups: Sequence[Sequence[Response]]) -> float:
    return float(sum(len(response.tokens) for group in groups for response in group))


def _load_prompts(config: LabelStepsConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return the prompts that leave space in the context for a solution and a completion."""
    needed = config.sampling.max_tokens * (2 if config.solutions else 1)
    prompts = load_prompts(
        config.data, tokenizer, max_prompt_length(context_length(config.model), needed)
    )
    columns = {column for prompt in prompts for column in prompt.columns}
    taken = [name for name in LABEL_COLUMNS if name in columns]
    if taken:
        raise DataError(
            f"the data has the columns {', '.join(taken)}, which the output uses for the labels: "
            "rename them in the data"
        )
    return prompts


def _summary(config: LabelStepsConfig, counts: Counter[str]) -> str:
    parts = [
        f"{config.output}: {counts['steps']:,} steps of {counts['solutions']:,} solutions, from "
        f"{counts['completions']:,} completions"
    ]
    reasons = {
        "truncated": f"truncated at {config.sampling.max_tokens} tokens",
        "empty": EMPTY,
        "indivisible": "two steps end in one token",
    }
    parts += [f"{counts[name]:,} left out: {why}" for name, why in reasons.items() if counts[name]]
    if counts["one_step"]:
        parts.append(f"{counts['one_step']:,} solutions of one step, which need no completions")
    return "; ".join(parts)
