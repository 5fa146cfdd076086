"""What a configuration names, looked at before anything slow: outputs, rewards, data, models.

A command calls this when its configuration is valid and before torch is imported, so that a broken
line of data is answered in a moment. Each kind's faults are told together, and the next kind is
looked at only when there are none. What needs a tokenizer, a model or a user's code to run is
left to the loaders, which check everything again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trivium.commands.candidates import candidates_of
from trivium.commands.output import require_directory, require_free
from trivium.commands.pairs_config import PairsConfig
from trivium.compare.config import CompareConfig
from trivium.config.base import Configuration
from trivium.data.preview import survey
from trivium.data.rows import RowsConfig
from trivium.errors import ConfigurationError, DataError, ModelError, TriviumError
from trivium.models.hf_checkpoint import check_checkpoint, context_of
from trivium.models.model_config import ModelConfig
from trivium.rewards.inspection import column_faults, source_faults
from trivium.rewards.reward_config import LEARNED, RewardConfig

logger = logging.getLogger("trivium")

Sections = dict[str, Configuration]
Columns = dict[str, frozenset[str]]


def preflight(config: Configuration, made: Path | None = None) -> None:
    """Raise with every fault of the first kind that has any; warn of held-out data that is not.

    What lies below `made` is left out: a comparison's earlier stages will write it.

    Raises:
        ConfigurationError: an output is taken, or a reward cannot be found or fitted.
        DataError: a file is missing, or rows of it are malformed.
        ModelError: a local checkpoint is missing, damaged or unsafe, or too short for the answers.
    """
    if isinstance(config, CompareConfig):
        # What it names may hold ${seed}: its jobs' own configurations say what is meant.
        _refuse(ConfigurationError, _output_faults({"": config}))
        return
    sections = {name: s for name, s in _sections(config) if not _below(made, s)}
    if made is None:
        _refuse(ConfigurationError, _output_faults(sections))
    _refuse(ConfigurationError, _reward_faults(sections))
    columns: Columns = {}
    _refuse(DataError, _data_faults(sections, columns))
    _refuse(ConfigurationError, _column_faults(sections, columns))
    _refuse(ModelError, _model_faults(sections))
    _warn_of_training_data(sections)


def _sections(config: Configuration, name: str = "") -> Iterator[tuple[str, Configuration]]:
    """Yield the configuration and all sections in it, with their dotted names."""
    yield name, config
    for field in type(config).model_fields:
        value, place = getattr(config, field), f"{name}.{field}" if name else field
        if isinstance(value, Configuration):
            yield from _sections(value, place)
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                if isinstance(item, Configuration):
                    yield from _sections(item, f"{place}.{number}")


def _below(made: Path | None, section: Configuration) -> bool:
    path = section.path if isinstance(section, RowsConfig | ModelConfig) else None
    if isinstance(section, RewardConfig) and section.function in LEARNED:
        path = section.arguments["path"]
    return None not in (made, path) and Path(str(path)).is_relative_to(str(made))


def _refuse(kind: type[TriviumError], faults: Iterable[str]) -> None:
    found = list(dict.fromkeys(faults))
    if len(found) > 1:
        raise kind("\n  - ".join([f"found {len(found)} faults:", *found]))
    if found:
        raise kind(found[0])


def _told(check: Any, *arguments: Any) -> Iterator[str]:
    """Yield what a check says that raises one error."""
    try:
        check(*arguments)
    except TriviumError as error:
        yield from str(error).splitlines()


# --- Outputs and rewards --------------------------------------------------------------------------


def _output_faults(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        output = getattr(section, "output", None)
        if output is not None:
            yield from _told(require_free, output, getattr(section, "overwrite", False))
        directory = getattr(section, "directory", None)
        if isinstance(directory, Path):
            place = f"{name}.directory" if name else "directory"
            yield from _told(require_directory, directory, f"{place} = {directory}")


def _reward_faults(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        if isinstance(section, RewardConfig):
            for fault in source_faults(section):
                yield f"{name} ({section.function}): {fault}"


# --- Data -----------------------------------------------------------------------------------------


def _data_faults(sections: Sections, columns: Columns) -> Iterator[str]:
    """Yield what is wrong with the data, and note the columns of what is right."""
    seen: dict[str, frozenset[str] | None] = {}
    for name, section in sections.items():
        if not isinstance(section, RowsConfig) or (key := f"{type(section)} {section!r}") in seen:
            continue
        owner, written = sections[name.rpartition(".")[0]], None
        if isinstance(owner, PairsConfig) and owner.candidates:
            written = _candidates(owner)
        try:
            seen[key] = found = survey(section, written)
            if found is not None:
                columns[name] = found - {"prompt"}
        except TriviumError as error:
            yield from str(error).splitlines()


def _candidates(config: PairsConfig) -> Any:
    return lambda row, _: candidates_of(row, config)


def _column_faults(sections: Sections, columns: Columns) -> Iterator[str]:
    """Yield which columns built-in rewards need and the prompts that they score do not have."""
    for name, section in sections.items():
        prefix = f"{name}." if name else ""
        rewards = {f"{prefix}rewards.{n}": r for n, r in enumerate(_rewards_of(section))}
        places = [f"{prefix}data"]
        evaluation = getattr(section, "evaluation", None)
        if evaluation is not None and not evaluation.rewards:
            places.append(f"{prefix}evaluation.data")
        labeler = f"{prefix}reward_update.labeler"
        if labeler in sections:
            rewards[labeler] = sections[labeler]  # type: ignore[assignment]
        for place in [place for place in places if place in columns]:
            for reward_name, reward in rewards.items():
                for fault in column_faults(reward, columns[place]):
                    yield f"{reward_name} ({reward.function}), on {place}: {fault}"


def _rewards_of(section: Configuration) -> tuple[RewardConfig, ...]:
    return getattr(section, "rewards", ())


def _warn_of_training_data(sections: Sections) -> None:
    """Warn where held-out data is what is trained on: it says nothing of what was not seen."""
    data = {name: s for name, s in sections.items() if isinstance(s, RowsConfig)}
    held_out = {n for n in data if n.startswith(("evaluation.", "validation"))}
    trained = {(s.path, s.subset, s.split): n for n, s in data.items() if n not in held_out}
    for name in sorted(held_out):
        s = data[name]
        same = trained.get((s.path, s.subset, s.split))
        if same is not None:
            logger.warning(
                "%s is %s, which %s trains on: what is measured there is no sign of what is "
                "learned; name data of its own",
                name,
                s.path,
                same,
            )


# --- Models ---------------------------------------------------------------------------------------


def _model_faults(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        path = section.path if isinstance(section, ModelConfig) else None
        if isinstance(section, RewardConfig) and section.function in LEARNED:
            name, path = f"{name}.arguments", section.arguments["path"]
        if path is not None:
            faults = [*_told(check_checkpoint, path)]
            yield from (f"{name}.path: {fault}" for fault in faults)
            if name == "model" and not faults:
                yield from _too_short(path, sections)


def _too_short(path: str, sections: Sections) -> Iterator[str]:
    """Yield which answers may be longer than the model's context."""
    context = context_of(path)
    for name, section in sections.items() if context is not None else ():
        limit = getattr(section, "max_tokens", None)
        if limit is not None and limit >= context:
            place = f"{name}.max_tokens" if name else "max_tokens"
            yield (
                f"{place} = {limit}: the context of {path} holds {context} tokens, the prompt's "
                "among them: lower it"
            )
