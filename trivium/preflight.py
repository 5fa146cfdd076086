"""Preflight: checks of the outputs, rewards, data and models that a configuration names.

A command runs these checks after its configuration is validated and before torch is imported, so
that a malformed row of data is reported at once. All faults of one kind are reported together, and
the next kind is checked only if there are none. Checks that need a tokenizer, a model or a user's
code are left to the loaders, which check everything again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trivium.commands.candidates import candidates_of
from trivium.commands.label_steps_config import LabelStepsConfig
from trivium.commands.output import require_directory, require_free
from trivium.commands.pairs_config import PairsConfig
from trivium.commands.solutions import SolutionReader
from trivium.config.base import Configuration, sections_of
from trivium.data.preview import survey
from trivium.data.rows import RowsConfig
from trivium.errors import ConfigurationError, DataError, ModelError, TriviumError
from trivium.hf.checkpoint_files import check_checkpoint, context_of
from trivium.hf.model_config import ModelConfig
from trivium.rewards.code_check import data_faults
from trivium.rewards.inspection import column_faults, source_faults
from trivium.rewards.reward_config import LEARNED, RewardConfig

logger = logging.getLogger("trivium")

Sections = dict[str, Configuration]
Columns = dict[str, frozenset[str]]


def preflight(config: Configuration, skip_below: Path | None = None) -> None:
    """Raise all faults of the first kind that has any, and warn if evaluation data is trained on.

    Paths below `skip_below` are not checked: a comparison's earlier stages will write them.

    Raises:
        ConfigurationError: an output exists, or a reward cannot be found or does not fit the data.
        DataError: a file is missing, some of its rows are malformed, or the tests in a row check
            nothing.
        ModelError: a local checkpoint is missing, damaged or unsafe, or its context is too short
            for the responses.
    """
    if config.is_template:
        # Its paths are checked in the configurations that are made from it.
        _raise_faults(ConfigurationError, _output_faults({"": config}))
        return
    sections = {name: s for name, s in sections_of(config) if not _is_below(skip_below, s)}
    if skip_below is None:
        _raise_faults(ConfigurationError, _output_faults(sections))
    _raise_faults(ConfigurationError, _reward_faults(sections))
    columns: Columns = {}
    _raise_faults(DataError, _data_faults(sections, columns))
    _raise_faults(ConfigurationError, _column_faults(sections, columns))
    _raise_faults(DataError, _test_faults(sections))
    _raise_faults(ModelError, _model_faults(sections))
    _warn_of_overlap(sections)


def reward_faults(config: Configuration) -> None:
    """Raise ConfigurationError if a reward cannot be found or takes other arguments."""
    _raise_faults(ConfigurationError, _reward_faults(dict(sections_of(config))))


def _is_below(skip_below: Path | None, section: Configuration) -> bool:
    paths = [section.path] if isinstance(section, ModelConfig) else []
    if isinstance(section, RowsConfig):
        paths = [source.path for source in section.sources]
    elif isinstance(section, RewardConfig) and section.function in LEARNED:
        paths = [section.arguments["path"]]
    if skip_below is None:
        return False
    return any(Path(str(path)).is_relative_to(str(skip_below)) for path in paths)


def _raise_faults(kind: type[TriviumError], faults: Iterable[str]) -> None:
    unique = list(dict.fromkeys(faults))
    if len(unique) > 1:
        raise kind("\n  - ".join([f"found {len(unique)} faults:", *unique]))
    if unique:
        raise kind(unique[0])


def _error_lines(check: Any, *arguments: Any) -> Iterator[str]:
    """Call a check, and yield the lines of the error that it raises, if any."""
    try:
        check(*arguments)
    except TriviumError as error:
        yield from str(error).splitlines()


# --- Outputs and rewards --------------------------------------------------------------------------


def _output_faults(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        output = getattr(section, "output", None)
        if output is not None:
            yield from _error_lines(require_free, output, getattr(section, "overwrite", False))
        directory = getattr(section, "directory", None)
        if isinstance(directory, Path):
            key = f"{name}.directory" if name else "directory"
            yield from _error_lines(require_directory, directory, f"{key} = {directory}")


def _reward_faults(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        if isinstance(section, RewardConfig):
            for fault in source_faults(section):
                yield f"{name} ({section.function}): {fault}"


# --- Data -----------------------------------------------------------------------------------------


def _data_faults(sections: Sections, columns: Columns) -> Iterator[str]:
    """Yield the faults of the data, and add the columns of valid data to `columns`."""
    seen: dict[str, frozenset[str] | None] = {}
    for name, section in sections.items():
        if not isinstance(section, RowsConfig) or (key := f"{type(section)} {section!r}") in seen:
            continue
        parent, read_row = sections[name.rpartition(".")[0]], None
        if isinstance(parent, PairsConfig) and parent.candidates:
            read_row = _candidate_reader(parent)
        if isinstance(parent, LabelStepsConfig) and parent.solutions is None:
            read_row = SolutionReader(parent)
        try:
            seen[key] = data_columns = survey(section, read_row)
            if isinstance(read_row, SolutionReader):
                read_row.require_steps()
            if data_columns is not None:
                columns[name] = data_columns - {"prompt"}
        except TriviumError as error:
            yield from str(error).splitlines()


def _candidate_reader(config: PairsConfig) -> Any:
    return lambda row, notes: candidates_of(row, config, notes)


def _column_faults(sections: Sections, columns: Columns) -> Iterator[str]:
    """Yield the columns that built-in rewards need and the prompts they score lack."""
    for reward_name, reward, data_name in _scored_data(sections):
        for fault in column_faults(reward, columns[data_name]) if data_name in columns else ():
            yield f"{reward_name} ({reward.function}), on {data_name}: {fault}"


def _test_faults(sections: Sections) -> Iterator[str]:
    """Yield the rows whose tests the reward `code` cannot use."""
    seen: set[str] = set()
    for _, reward, data_name in _scored_data(sections):
        data = sections[data_name]
        if reward.function == "code" and isinstance(data, RowsConfig):
            key = f"{reward.arguments!r} {reward.columns!r} {data!r}"
            if key not in seen:
                seen.add(key)
                yield from data_faults(reward, data)


def _scored_data(sections: Sections) -> Iterator[tuple[str, RewardConfig, str]]:
    """Yield each reward's name and configuration, and the name of a section that it scores."""
    for name, section in sections.items():
        prefix = f"{name}." if name else ""
        rewards = {f"{prefix}rewards.{n}": r for n, r in enumerate(_rewards_of(section))}
        data_names = [f"{prefix}data"]
        evaluation = getattr(section, "evaluation", None)
        if evaluation is not None and not evaluation.rewards:
            data_names.append(f"{prefix}evaluation.data")
        labeler = f"{prefix}reward_update.labeler"
        if labeler in sections:
            rewards[labeler] = sections[labeler]  # type: ignore[assignment]
        for data_name in [data_name for data_name in data_names if data_name in sections]:
            yield from ((reward_name, reward, data_name) for reward_name, reward in rewards.items())


def _rewards_of(section: Configuration) -> tuple[RewardConfig, ...]:
    return getattr(section, "rewards", ())


def _warn_of_overlap(sections: Sections) -> None:
    """Warn if held-out data is also training data."""
    data = {name: s for name, s in sections.items() if isinstance(s, RowsConfig)}
    held_out = {n for n in data if n.startswith(("evaluation.", "validation"))}
    trained = {
        (s.path, s.subset, s.split): name
        for name, section in data.items()
        for s in section.sources
        if name not in held_out
    }
    for name in sorted(held_out):
        for s in data[name].sources:
            training_name = trained.get((s.path, s.subset, s.split))
            if training_name is not None:
                logger.warning(
                    "%s is %s, which %s trains on: its results do not show generalization; use "
                    "separate held-out data",
                    name,
                    s.path,
                    training_name,
                )


# --- Models ---------------------------------------------------------------------------------------


def _model_faults(sections: Sections) -> Iterator[str]:
    for name, section in sections.items():
        path = section.path if isinstance(section, ModelConfig) else None
        if isinstance(section, RewardConfig) and section.function in LEARNED:
            name, path = f"{name}.arguments", section.arguments["path"]
        if path is not None:
            faults = [*_error_lines(check_checkpoint, path)]
            yield from (f"{name}.path: {fault}" for fault in faults)
            if name == "model" and not faults:
                yield from _context_faults(path, sections)


def _context_faults(path: str, sections: Sections) -> Iterator[str]:
    """Yield the response limits that exceed the model's context."""
    context = context_of(path)
    for name, section in sections.items() if context is not None else ():
        limit = getattr(section, "max_tokens", None)
        if limit is not None and limit >= context:
            key = f"{name}.max_tokens" if name else "max_tokens"
            yield (
                f"{key} = {limit}: the context of {path} has {context} tokens for prompt and "
                "response together: lower it"
            )
