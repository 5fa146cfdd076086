"""``trivium evaluate``: measure a model on held-out prompts, and its KL to a reference.

The measurement is that of a training run (``evaluation.evaluator``), for any checkpoint, with a
confidence interval for each single reward. Comparing runs is left to ``trivium compare``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from trivium.commands.evaluate_config import EvaluateConfig
from trivium.commands.output import require_free, unwritable
from trivium.commands.sample import RESPONSES_PER_BATCH
from trivium.data.prompts import Prompt, load_prompts
from trivium.errors import ConfigurationError, ModelError
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.evaluation.evaluator import Evaluated, Evaluator
from trivium.evaluation.selection import ANSWER, by_prompt, read_answers, selections
from trivium.hf.loading import context_length, load_tokenizer
from trivium.maths.intervals import Interval, mean_interval
from trivium.models.policy import Policy
from trivium.monitoring.progress import printable
from trivium.rewards.reward import Rewards
from trivium.rollout.rollouts import Rollouts
from trivium.training.setup import load_rewards, local_engine, max_prompt_length

logger = logging.getLogger("trivium")


@dataclass(frozen=True)
class Measured:
    """Results of an evaluation, with the interval of each single reward by its name.

    A reward that applies to no response has no interval.
    """

    config: EvaluateConfig
    evaluation: Evaluated
    greedy_rewards: dict[str, Interval]
    sampled_rewards: dict[str, Interval]
    selections: dict[str, Interval] = field(default_factory=dict)

    @property
    def _rewards(self) -> dict[str, dict[str, Interval]]:
        return {"greedy": self.greedy_rewards, "sampled": self.sampled_rewards}

    def record(self) -> dict[str, Any]:
        """Return all results and the configuration as plain values."""
        reward_intervals = {
            name: {
                key: asdict(intervals[name]) if name in intervals else None
                for key, intervals in self._rewards.items()
            }
            for name in self.evaluation.greedy.scores.components
        }
        return {
            **self.evaluation.record(),
            "outcomes": self.evaluation.outcomes(),
            "rewards": reward_intervals,
            "selections": {name: asdict(i) for name, i in self.selections.items()},
            "config": self.config.model_dump(mode="json"),
        }

    def __rich__(self) -> Table:
        """Return a table of the means and their 95 % confidence intervals."""
        results = self.evaluation.record()
        table = Table(
            title=f"{printable(self.config.model.path)} on {results['n']:,} prompts",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("")
        table.add_column("mean", justify="right")
        table.add_column("95 % interval", justify="right")
        _add(table, "reward, greedy", self.evaluation.greedy_reward)
        _add(table, "reward, sampled", self.evaluation.sampled_reward)
        names = list(self.evaluation.greedy.scores.components)
        for name in names if len(names) > 1 else ():
            for key, intervals in self._rewards.items():
                if name in intervals:
                    _add(table, f"{name}, {key}", intervals[name])
        for name, interval in self.selections.items():
            _add(table, f"{name}, of {self.config.samples}", interval)
        for k, share in results["pass_at"].items():
            table.add_row(f"pass@{k}", f"{share:.1%}")
        if self.evaluation.kl is not None:
            _add(table, "KL to the reference", self.evaluation.kl)
            table.add_row("reference log-prob per token", f"{results['reference_logprob']:.3f}")
        table.add_row("tokens per response", f"{results['length']:.1f}")
        table.add_row("truncated", f"{results['truncated']:.1%}")
        table.add_row("distinct words", f"{results['distinct']:.1%}")
        table.add_row("repeated 3-grams", f"{results['repetition']:.1%}")
        return table


def run(config: EvaluateConfig) -> Measured:
    """Evaluate the model, and write the results to the output file if one is set."""
    if config.output is not None:
        require_free(config.output, config.overwrite)
    tokenizer = load_tokenizer(config.model)
    max_length = max_prompt_length(context_length(config.model), config.max_tokens)
    prompts = load_prompts(config.data, tokenizer, max_length)
    rewards, _ = load_rewards(config.rewards, prompts, tokenizer)
    selector = Selector(config, prompts, tokenizer)
    policy = Policy.load(config.model, tokenizer, temperature=config.temperature)
    reference = _load_reference(config, policy)
    settings = EvaluationConfig(
        data=config.data,
        rewards=config.rewards,
        samples=config.samples,
        pass_threshold=config.pass_threshold,
        max_tokens=config.max_tokens,
        stop=config.stop,
        stop_tokens=config.stop_tokens,
        seed=config.seed,
    )
    evaluator = Evaluator(settings, prompts, rewards, local_engine(policy), policy, reference)
    logger.info("generating greedy and sampled responses to %d prompts", len(prompts))
    measured = measure(config, evaluator.evaluate(), selector)
    if config.output is not None:
        _write(config.output, measured.record())
        logger.info("written to %s", config.output)
    return measured


def measure(config: EvaluateConfig, evaluated: Evaluated, selector: Selector) -> Measured:
    """Return the results of an evaluation, with an interval for each reward and selection."""
    return Measured(
        config,
        evaluated,
        _intervals(evaluated.greedy),
        _intervals(evaluated.sampled),
        selector.select(evaluated.sampled),
    )


class Selector:
    """Chooses one of each prompt's samples, by majority vote and by each reward of `rerank`."""

    def __init__(
        self, config: EvaluateConfig, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.vote = config.vote
        self.answers_of = None if config.vote is None else ANSWER.load(config.vote)
        self.rewards: Rewards | None = None
        if config.rerank:
            self.rewards, _ = load_rewards(config.rerank, prompts, tokenizer)

    def select(self, sampled: Rollouts) -> dict[str, Interval]:
        """Return the reward of the chosen responses by the way to choose; {} without one."""
        count = len(sampled.prompts)
        answers, scores = None, {}
        if self.vote is not None and self.answers_of is not None:
            texts = [response.text for response in sampled.flat]
            answers = by_prompt(read_answers(self.vote, self.answers_of, texts), count)
        if self.rewards is not None:
            scores = {n: by_prompt(v, count) for n, v in _scores(self.rewards, sampled).items()}
        if answers is None and not scores:
            return {}
        return selections(by_prompt(sampled.totals_N.tolist(), count), answers, scores)


def _scores(rewards: Rewards, sampled: Rollouts) -> dict[str, list[float]]:
    """Return each reward's value of every response. A call has as many responses as in `sample`."""
    prompts = [p for p, g in zip(sampled.prompts, sampled.responses, strict=True) for _ in g]
    scores: dict[str, list[float]] = {name: [] for name in rewards.names}
    for start in range(0, len(prompts), RESPONSES_PER_BATCH):
        part = slice(start, start + RESPONSES_PER_BATCH)
        found = rewards.score(prompts[part], sampled.flat[part])
        if found.steps is not None:
            raise ConfigurationError(
                "rerank: one of the rewards scores steps, and a response is chosen by one score: "
                "return one number per response"
            )
        for name, values in found.components.items():
            numbers = [value for value in values if value is not None]
            if len(numbers) < len(values):
                raise ConfigurationError(
                    f"rerank: {name} has no value for a response (None), so it cannot choose: "
                    "return a number for every response"
                )
            scores[name] += numbers
    return scores


def _intervals(rollouts: Rollouts) -> dict[str, Interval]:
    """Return each reward's interval. The mean of a prompt's samples is one observation.

    A reward that applies to no response is left out.
    """
    size = len(rollouts.flat) // len(rollouts.prompts)
    intervals = {}
    for name, values in rollouts.scores.components.items():
        groups = [values[at : at + size] for at in range(0, len(values), size)]
        applied = [[value for value in group if value is not None] for group in groups]
        means = [sum(group) / len(group) for group in applied if group]
        if means:
            intervals[name] = mean_interval(means)
    return intervals


def _load_reference(config: EvaluateConfig, policy: Policy) -> Policy | None:
    if config.reference is None:
        return None
    reference = Policy.load(config.reference, temperature=config.temperature)
    if reference.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            f"reference.path = {config.reference.path}: its tokenizer differs from that of "
            f"{config.model.path}, so their KL divergence is undefined: name a model with the same "
            "vocabulary, or leave reference out"
        )
    return reference


def _add(table: Table, name: str, interval: Interval) -> None:
    low, high = interval.ends()
    bounds = "–" if low is None else f"{low:.3f} – {high:.3f}"
    table.add_row(Text(printable(name)), f"{interval.mean:.3f}", bounds)


def _write(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from None
