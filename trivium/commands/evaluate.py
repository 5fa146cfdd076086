"""``trivium evaluate``: how good a model is on held-out prompts, and how far from its reference.

The same measurement that a run makes while it trains (``evaluation.evaluator``), for any checkpoint, with
intervals for each reward alone. Comparing runs is left out.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from trivium.commands.evaluate_config import EvaluateConfig
from trivium.commands.output import require_free, unwritable
from trivium.data.prompts import load_prompts
from trivium.errors import ModelError
from trivium.evaluation.evaluation_config import EvaluationConfig
from trivium.evaluation.evaluator import Evaluated, Evaluator
from trivium.evaluation.statistics import Interval, mean_interval
from trivium.models.loading import context_length, load_tokenizer
from trivium.models.policy import Policy
from trivium.monitoring.progress import printable
from trivium.rollout.rollouts import Rollouts
from trivium.training.setup import load_rewards, local_engine, max_prompt_length

logger = logging.getLogger("trivium")


@dataclass(frozen=True)
class Measured:
    """An evaluation's numbers, with those of each reward alone by its name."""

    config: EvaluateConfig
    evaluation: Evaluated
    greedy_rewards: dict[str, Interval]
    sampled_rewards: dict[str, Interval]

    def record(self) -> dict[str, Any]:
        """Everything as plain values, with what it was measured on."""
        of_each = {
            name: {"greedy": asdict(greedy), "sampled": asdict(self.sampled_rewards[name])}
            for name, greedy in self.greedy_rewards.items()
        }
        return {
            **self.evaluation.record(),
            "outcomes": self.evaluation.outcomes(),
            "rewards": of_each,
            "config": self.config.model_dump(mode="json"),
        }

    def __rich__(self) -> Table:
        """A table of the means and their 95 % intervals."""
        measured = self.evaluation.record()
        table = Table(
            title=f"{printable(self.config.model.path)} on {measured['n']:,} prompts",
            title_justify="left",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("")
        table.add_column("mean", justify="right")
        table.add_column("95 % interval", justify="right")
        _add(table, "reward, greedy", self.evaluation.greedy_reward)
        _add(table, "reward, sampled", self.evaluation.sampled_reward)
        if len(self.greedy_rewards) > 1:
            for name, greedy in self.greedy_rewards.items():
                _add(table, f"{name}, greedy", greedy)
                _add(table, f"{name}, sampled", self.sampled_rewards[name])
        for k, share in measured["pass_at"].items():
            table.add_row(f"pass@{k}", f"{share:.1%}")
        if self.evaluation.kl is not None:
            _add(table, "KL to the reference", self.evaluation.kl)
            table.add_row("reference log-prob per token", f"{measured['reference_logprob']:.3f}")
        table.add_row("tokens per response", f"{measured['length']:.1f}")
        table.add_row("cut off", f"{measured['truncated']:.1%}")
        table.add_row("distinct words", f"{measured['distinct']:.1%}")
        table.add_row("repeated 3-grams", f"{measured['repetition']:.1%}")
        return table


def run(config: EvaluateConfig) -> Measured:
    """Evaluate, and write the numbers if a file is named."""
    if config.output is not None:
        require_free(config.output, config.overwrite)
    tokenizer = load_tokenizer(config.model)
    room = max_prompt_length(context_length(config.model), config.max_tokens)
    prompts = load_prompts(config.data, tokenizer, room)
    rewards, _ = load_rewards(config.rewards, prompts, tokenizer)
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
    logger.info("answering %d prompts, greedily and sampled", len(prompts))
    measured = measure(config, evaluator.evaluate())
    if config.output is not None:
        _write(config.output, measured.record())
        logger.info("written to %s", config.output)
    return measured


def measure(config: EvaluateConfig, evaluated: Evaluated) -> Measured:
    """The numbers of an evaluation, with intervals for each reward."""
    return Measured(
        config,
        evaluated,
        _intervals(evaluated.greedy),
        _intervals(evaluated.sampled),
    )


def _intervals(rollouts: Rollouts) -> dict[str, Interval]:
    """Each reward's mean and interval; a prompt's samples are one observation, their mean."""
    size = len(rollouts.flat) // len(rollouts.prompts)
    return {
        name: mean_interval(
            [sum(values[at : at + size]) / size for at in range(0, len(values), size)]
        )
        for name, values in rollouts.scores.components.items()
    }


def _load_reference(config: EvaluateConfig, policy: Policy) -> Policy | None:
    if config.reference is None:
        return None
    reference = Policy.load(config.reference, temperature=config.temperature)
    if reference.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ModelError(
            f"reference.path = {config.reference.path}: its tokenizer is not that of "
            f"{config.model.path}, so the two give no KL divergence: name a model with the same "
            "vocabulary, or leave reference out"
        )
    return reference


def _add(table: Table, name: str, interval: Interval) -> None:
    bounds = f"{interval.low:.3f} – {interval.high:.3f}"
    table.add_row(Text(printable(name)), f"{interval.mean:.3f}", bounds)


def _write(path: Path, record: dict[str, Any]) -> None:
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from None
