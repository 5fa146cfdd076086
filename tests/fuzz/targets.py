"""Fuzzing targets: every input must be read, or refused with one clean message.

A target takes bytes and raises only if a guarantee is broken: an error that is not Trivium's own, a
message without its place or with control characters, inconsistent counts, more than two seconds of
CPU time. ``run`` passes the targets to a fuzzer; ``test_fuzz_findings`` tests what was found.
"""

from __future__ import annotations

import atexit
import gzip
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from fuzz.feed import WORDS, Feed, to_json
from helpers.data_tokenizers import chatml_tokenizer
from pydantic import ValidationError

import trivium
from trivium.config.base import Configuration, dump, load_configuration
from trivium.data import files as data_files
from trivium.data.demonstrations import DemonstrationsConfig, read_demonstrations
from trivium.data.preferences import (
    PreferencesConfig,
    StepLabelsConfig,
    read_preferences,
    read_step_labels,
)
from trivium.data.preview import survey
from trivium.data.prompts import PromptsConfig, read_prompts
from trivium.data.rankings import RankingsConfig, read_rankings
from trivium.data.rows import Row, RowsConfig, collect, read_rows
from trivium.errors import ConfigurationError, DataError, ModelError, TriviumError, one_line

MAX_SECONDS = 2.0
_STOP_MESSAGE = "reading stopped after"


@cache
def folder() -> Path:
    """Return the directory of the input files, in memory if the system supports it."""
    memory = Path("/dev/shm")
    directory = tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


@contextmanager
def time_limit() -> Iterator[None]:
    """Fail if the block takes too much CPU time; wall time would depend on other processes."""
    start_time = time.process_time()
    yield
    spent = time.process_time() - start_time
    assert spent < MAX_SECONDS, f"took {spent:.1f} s"


def check_message(error: TriviumError, place: str) -> None:
    """Check that each line is one fault with its place and without control characters."""
    lines = str(error).split("\n")
    for line in lines:
        assert line.isprintable(), f"control characters in {line!r}"
        has_place = line.startswith((place, _STOP_MESSAGE))
        assert has_place and len(line) > len(place) + 10, f"no place or no reason in {line!r}"


# --- rows of data ---------------------------------------------------------------------------------

KINDS = [".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz"]


def files(data: bytes) -> None:
    """Fuzz the bytes of a data file. The first two bytes choose its format and compression."""
    feed = Feed(data)
    kind, style = feed.pick(KINDS), feed.below(8)
    content = feed.rest()
    if kind.endswith(".gz") and style < 6:
        content = gzip.compress(content, 1, mtime=0)
        content = content[: -1 - style] if style > 3 else content
    _read(folder() / f"rows{kind}", content)


def parquet(data: bytes) -> None:
    """Fuzz the bytes of a Parquet file."""
    _read(folder() / "rows.parquet", data)


def _read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    config = RowsConfig(path=str(path))
    with time_limit():
        rows, error = _until_error(read_rows(config))
    for row in rows:
        if isinstance(row, DataError):
            assert str(row).startswith(str(path))
        else:
            assert isinstance(row, Row) and row.where.startswith(str(path))
    if error is not None:
        check_message(error, str(path))
    first, _ = _until_error(read_rows(config.model_copy(update={"limit": 2})))
    assert len(first) == min(2, len(rows))
    valid = all(isinstance(row, Row) for row in rows) and error is None and bool(rows)
    try:
        items, report = collect(config, lambda row, notes: row)
    except DataError as collect_error:
        assert not valid
        check_message(collect_error, str(path))
    else:
        assert valid and len(items) == len(rows) == report.rows == report.kept


def _until_error(rows: Iterator[Any]) -> tuple[list[Any], DataError | None]:
    read = []
    try:
        for row in rows:
            read.append(row)
    except DataError as error:
        return read, error
    return read, None


def sources(data: bytes) -> None:
    """Fuzz `path`, `subset` and `split` of a data source, next to a few files, offline."""
    feed = Feed(data)
    subset = one_line(feed.text()) if feed.chance(64) else None
    split = feed.pick(["train", "test", one_line(feed.text())]) if feed.chance(128) else None
    text = feed.rest().decode("utf-8", "surrogateescape").replace("\n", "").replace("..", ".")
    source = text.lstrip("/").replace("@", str(_tree()))
    home = mock.patch.dict(os.environ, HOME=str(_tree()))
    hub = mock.patch.object(data_files, "_hub_dataset", _no_hub)
    with home, hub, chdir(_tree()), time_limit():
        try:
            config = RowsConfig(path=source, subset=subset, split=split)
            list(config.inputs())
            list(read_rows(config))
        except (ConfigurationError, DataError) as error:
            check_message(error, "")


def _no_hub(name: str, subset: str | None, split: str | None) -> Iterator[Any]:
    raise DataError(f"{name}: hub datasets are not available here")


@cache
def _tree() -> Path:
    root = folder() / "tree"
    (root / "several").mkdir(parents=True)
    (root / "empty").mkdir()
    for name in ("one.jsonl", "several/train.jsonl", "several/test-0.csv", "several/test-1.csv"):
        (root / name).write_text('{"a": 1}\n' if name.endswith("jsonl") else "a\n1\n")
    (root / "several" / "train.jsonl.gz").write_bytes(b"no gzip")
    (root / "unknown.txt").write_text("?")
    (root / "loop.jsonl").symlink_to("loop.jsonl")
    (root / "folder.jsonl").mkdir()
    os.mkfifo(root / "pipe.jsonl")
    return root


# --- loaders --------------------------------------------------------------------------------------

_TRIMMING = "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '\n' }}{% endfor %}"
LOADERS: list[tuple[type[RowsConfig], Callable[..., Any], list[str]]] = [
    (PromptsConfig, read_prompts, ["prompt", "question"]),
    (PromptsConfig, read_prompts, ["messages"]),
    (PromptsConfig, read_prompts, ["chosen", "rejected"]),
    (DemonstrationsConfig, read_demonstrations, ["prompt", "completion"]),
    (DemonstrationsConfig, read_demonstrations, ["messages"]),
    (DemonstrationsConfig, read_demonstrations, ["text"]),
    (PreferencesConfig, read_preferences, ["prompt", "chosen", "rejected"]),
    (PreferencesConfig, read_preferences, ["chosen", "rejected"]),
    (StepLabelsConfig, read_step_labels, ["prompt", "completions", "labels"]),
    (RankingsConfig, read_rankings, ["prompt", "responses", "scores"]),
]


@cache
def _tokenizers() -> list[Any]:
    with_bos = chatml_tokenizer()
    with_bos.add_special_tokens({"bos_token": "<|endoftext|>"})
    without_eos = chatml_tokenizer(_TRIMMING)
    without_eos.eos_token = None
    plain, trimming = chatml_tokenizer(None), chatml_tokenizer(_TRIMMING)
    return [chatml_tokenizer(), plain, trimming, with_bos, without_eos]


def loaders(data: bytes) -> None:
    """Fuzz the rows of every loader, with random options of its configuration."""
    feed = Feed(data)
    config_class, read, columns = feed.pick(LOADERS)
    tokenizer = _tokenizers()[max(0, feed.byte() - 251)]
    options = _options(feed, config_class)
    rows = [feed.row(columns) for _ in range(1 + feed.below(4))]
    path = folder() / "rows.jsonl"
    path.write_text("".join(to_json(row) + "\n" for row in rows))
    try:
        config = config_class(path=str(path), **options)
    except ValidationError:
        return
    preview_error = _preview_error(config)
    with time_limit():
        try:
            items, report = read(config, tokenizer)
        except DataError as error:
            check_message(error, str(path))
            return
        except ModelError as error:
            check_message(error, "the tokenizer of ")
            return
    assert preview_error is None, f"the preview refused what the loader read: {preview_error}"
    assert report.rows == len(rows) == report.kept + sum(report.dropped.values())
    assert report.kept == len(items) > 0 and str(report).isprintable()
    for item in items:
        _check_item(item, config)


def _preview_error(config: RowsConfig) -> DataError | None:
    """Return the error of the data preview before any model is loaded, or None."""
    with time_limit():
        try:
            survey(config)
        except DataError as error:
            check_message(error, config.path)
            return error
    return None


def _options(feed: Feed, config_class: type[RowsConfig]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if feed.chance(48):
        options["template"] = feed.pick(["{question}", "Q: {prompt}\n{{", "{a\nb}", feed.text()])
    if feed.chance(48):
        options["chat"] = True
    if feed.chance(48):
        options["system"] = feed.text()
    if feed.chance(48):
        options["max_prompt_tokens"] = 1 + feed.byte()
        options["long_prompts"] = feed.pick(["error", "drop"])
    if feed.chance(48) and "max_response_tokens" in config_class.model_fields:
        options["max_response_tokens"] = 1 + feed.byte()
        options["long_responses"] = feed.pick(["error", "drop", "truncate"])
    if feed.chance(24):
        options["columns"] = {feed.pick(["prompt", "text"]): feed.pick(["question", "a\nb"])}
    if feed.chance(24) and "separator" in config_class.model_fields:
        options["separator"] = feed.pick(WORDS)
    if feed.chance(24) and "assistant_mark" in config_class.model_fields:
        options["assistant_mark"] = feed.pick(WORDS)
    return options


def _check_item(item: Any, config: Any) -> None:
    """Check that nothing is empty, lengths are within limits, and labels are at distinct tokens."""
    prompt = item.tokens if hasattr(item, "tokens") else item.group.prompt
    assert 0 < len(prompt) <= (config.max_prompt_tokens or len(prompt))
    for response in item.group.responses if hasattr(item, "group") else []:
        assert 0 < len(response) <= (config.max_response_tokens or len(response))
    if hasattr(item, "loss_mask"):
        assert len(item.loss_mask) == len(item.group.responses[0]) and any(item.loss_mask)
    if hasattr(item, "ends"):
        assert item.ends == sorted(set(item.ends)) and len(item.ends) == len(item.labels) > 0
        assert item.ends[0] >= 0 and item.ends[-1] < len(item.group.responses[0])
        assert all(type(label) is float and 0 <= label <= 1 for label in item.labels)


# --- configurations -------------------------------------------------------------------------------

_NAMES = [
    *("PromptsConfig", "RewardConfig", "RunConfig", "SFTConfig", "RewardModelConfig", "PPOConfig"),
    *("DPOConfig", "GRPOConfig", "SampleConfig", "PairsConfig", "EvaluateConfig", "CompareConfig"),
    *("DemonstrationsConfig", "PreferencesConfig", "StepLabelsConfig", "OptimizerConfig"),
]
CONFIGURATIONS: list[type[Configuration]] = [getattr(trivium, name) for name in _NAMES]


def configuration(data: bytes) -> None:
    """Fuzz the YAML file of a command and its arguments, separated by NUL bytes."""
    feed = Feed(data)
    config_class = feed.pick(CONFIGURATIONS)
    text, *arguments = feed.rest().split(b"\0")
    path = folder() / "config.yaml"
    path.write_bytes(text)
    overrides = [argument.decode("utf-8", "surrogateescape") for argument in arguments]
    with time_limit():
        try:
            config = load_configuration(config_class, path, overrides)
        except ConfigurationError as error:
            _check_faults(error, str(path))
            return
    path.write_text(dump(config))
    assert load_configuration(config_class, path) == config
    assert dump(load_configuration(config_class, path)) == dump(config)


def _check_faults(error: ConfigurationError, path: str) -> None:
    first, *more = str(error).split("\n  - ")
    faults = more or [first]
    assert first.startswith((path, "argument `")), f"no place in {first!r}"
    for fault in faults:
        assert fault.startswith((path, "argument `")), f"no place in {fault!r}"
        assert len(fault) > len("argument ` `: ") and fault.isprintable(), f"unclean: {fault!r}"


TARGETS: dict[str, Callable[[bytes], None]] = {
    "files": files,
    "parquet": parquet,
    "sources": sources,
    "loaders": loaders,
    "configuration": configuration,
}
