"""Whether each stage uses what earlier stages produce as what it is: a policy, a reward model, or
rows of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trivium.commands import COMMANDS
from trivium.config.base import Configuration
from trivium.data.rows import RowsConfig
from trivium.hf.model_config import ModelConfig
from trivium.jobs.job import Job
from trivium.rewards.reward_config import LEARNED, RewardConfig

POLICY, REWARD_MODEL, ROWS = "a policy", "a reward model", "rows of data"
_SCORERS = ("critic",)
"""Sections whose model may be a reward model."""


def product_faults(jobs: Mapping[str, Job], configs: Sequence[Configuration]) -> list[str]:
    """Return the settings that name an output of another kind than they need."""
    kinds = {str(job.product): (name, _kind(job)) for name, job in jobs.items()}
    faults = []
    for (name, job), config in zip(jobs.items(), configs, strict=True):
        for place, path, needed in _uses(config, job.command):
            stage, kind = kinds.get(path, ("", ""))
            if kind and kind not in needed:
                faults.append(
                    f"stage {name}: {place} is the output of {stage}, {kind}, and needs "
                    f"{' or '.join(needed)}: name another stage"
                )
    return faults


def _kind(job: Job) -> str:
    if COMMANDS[job.command].trains:
        return REWARD_MODEL if job.command == "reward-model" else POLICY
    return "the result of an evaluation" if job.command == "evaluate" else ROWS


def _uses(
    config: Configuration, command: str, name: str = ""
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield the dotted name of every path in a configuration, the path, and what it may be."""
    for field in type(config).model_fields:
        value = getattr(config, field)
        place = f"{name}.{field}" if name else field
        for index, item in enumerate(value if isinstance(value, tuple) else (value,)):
            where = f"{place}.{index}" if isinstance(value, tuple) else place
            if isinstance(item, ModelConfig):
                scorer = name.endswith(_SCORERS) or command == "reward-model"
                yield f"{where}.path", item.path, (POLICY, REWARD_MODEL) if scorer else (POLICY,)
            elif isinstance(item, RowsConfig):
                for number, source in enumerate(item.sources):
                    inside = f".mixture.{number}" if item.mixture else ""
                    yield f"{where}{inside}.path", source.path, (ROWS,)
            elif isinstance(item, RewardConfig):
                if item.function in LEARNED:
                    yield f"{where}.arguments.path", str(item.arguments["path"]), (REWARD_MODEL,)
            elif isinstance(item, Configuration):
                yield from _uses(item, command, where)
