"""Checks of a checkpoint's directory before anything in it is loaded.

They find incomplete and damaged files, and files that run code when they are read. This module does
not import torch and reads only the headers of weights, so faults are found at once. It does not
check hub names or the values of weights (``hf.loading``).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trivium.config.paths import looked_up
from trivium.errors import ModelError
from trivium.hf.kinds import kind_fault

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_HEADER = 100_000_000
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def local_directory(path: str) -> Path | None:
    """Return the directory at ``path``; None for a hub name. Raise ModelError if it is missing.

    A name is a path, and never looked up on the hub, if it has the form of one, if its first part
    is a directory, or if a directory of almost the same name exists.
    """
    directory = looked_up(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ModelError(f"{path} is a file: name a directory with config.json and the weights")
    is_path = path.startswith((".", "/", "~")) or path.endswith("/") or path.count("/") > 1
    is_path = is_path or "\\" in path or ("/" in path and directory.parent.is_dir())
    near = _nearest(directory, 0.6 if is_path else 0.7 if "/" in path else 0.8)
    if is_path or near is not None:
        meant = "" if near is None else f"did you mean {near}? Otherwise "
        raise ModelError(
            f"there is no checkpoint directory {path}: {meant}name a directory with config.json, "
            "weights and tokenizer, or a hub name (OWNER/NAME)"
        )
    return None


def _nearest(path: Path, likeness: float) -> Path | None:
    """Return the existing directory whose parts are closest to those of a missing path."""
    parent = path.parent if path.parent.is_dir() else _nearest(path.parent, likeness)
    try:
        entries = [] if parent is None else [x for x in parent.iterdir() if x.is_dir()]
    except OSError:
        return None
    names = {entry.name.lower(): entry for entry in entries}
    closest = get_close_matches(path.name.lower(), names, 1, likeness)
    return names[closest[0]] if closest else None


@dataclass(frozen=True)
class Adapter:
    """A local directory with adapters alone.

    Attributes:
        directory: the directory.
        base: directory or hub name of the checkpoint that they belong to.
        revision: the base's branch, tag or commit on the hub.
    """

    directory: Path
    base: str
    revision: str | None


def adapter_at(path: str) -> Adapter | None:
    """Return the adapters at ``path``; None if it is a whole checkpoint, or a hub name."""
    directory = looked_up(path)
    if not holds_only_adapters(directory):
        return None
    settings, file = adapter_settings(directory), directory / ADAPTER_CONFIG
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{file}: names no base: write its path as base_model_name_or_path")
    if holds_only_adapters(looked_up(base)):
        raise ModelError(f"{file}: its base {base} holds only adapters: merge them first")
    try:
        require_checkpoint(base)
    except ModelError as error:
        raise ModelError(f"{file}: base_model_name_or_path is {base!r}: {error}") from None
    return Adapter(directory, base, revision if isinstance(revision, str) else None)


def holds_only_adapters(directory: Path) -> bool:
    """Return whether a directory holds adapters without their base."""
    return (directory / ADAPTER_CONFIG).is_file() and not (directory / "config.json").is_file()


def adapter_settings(directory: Path) -> dict[str, Any]:
    """Return the content of an adapter's configuration file."""
    return _json_object(directory / ADAPTER_CONFIG)


def require_checkpoint(path: str) -> None:
    """Raise unless ``path`` is a directory with a configuration or adapters, or a hub name."""
    directory = local_directory(path)
    if directory is not None and adapter_at(path) is None:
        read_config(directory)


def check_checkpoint(path: str) -> None:
    """Raise ModelError if a local checkpoint is incomplete or damaged."""
    directory = local_directory(path)
    if directory is None:
        return
    adapter = adapter_at(path)
    if adapter is not None:
        if faults := [*adapter_faults(directory)]:
            raise ModelError("\n".join(faults))
        try:
            check_checkpoint(adapter.base)
        except ModelError as error:
            raise ModelError(f"{path} has the base {adapter.base}: {error}") from None
        return
    fault = kind_fault(read_config(directory))
    faults = [f"{path} {fault}"] if fault else []
    faults += [*weight_faults(directory), *_tokenizer_faults(directory)]
    if faults:
        raise ModelError("\n".join(faults))


def read_config(directory: Path) -> dict[str, Any]:
    """Return the checkpoint's config.json; raise ModelError if it is missing or damaged."""
    file = directory / "config.json"
    if not file.is_file():
        inner = sorted(x.parent for x in directory.glob("*/config.json"))
        example = inner[-1] if inner else "a run's `final`"
        remedy = f": name one, such as {example}"
        raise ModelError(
            f"{directory} is a directory without config.json, so it is not a checkpoint{remedy}"
        )
    return _json_object(file)


def context_of(path: str) -> int | None:
    """Return a local checkpoint's longest context in tokens, if its configuration names one."""
    adapter = adapter_at(path)
    directory = local_directory(path if adapter is None else adapter.base)
    if directory is None:
        return None
    return longest_context(read_config(directory))


def longest_context(config: Mapping[str, Any]) -> int | None:
    """Return the longest context in tokens that a configuration names, scaled by its rotary kind.

    YaRN multiplies ``original_max_position_embeddings`` by its factor, dynamic NTK
    ``max_position_embeddings``, which it needs to be the original one. For other kinds
    ``max_position_embeddings`` is the whole context.
    """
    text = config.get("text_config")
    sources = [source for source in (text, config) if isinstance(source, Mapping)]
    for source in sources:
        for name in _CONTEXTS:
            if type(longest := source.get(name)) is int:
                return max(longest, *(_scaled(rope, longest) for rope in _ropes(source)))
    return None


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the settings of rotary embeddings, of which there may be one per type of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = rope.values() if all(isinstance(x, Mapping) for x in rope.values()) else [rope]
    return [*found, {}]


def _scaled(rope: Mapping[str, Any], longest: int) -> int:
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    if isinstance(factor, int | float) and kind in ("yarn", "dynamic"):
        return int(factor * (original if kind == "yarn" and original else longest))
    return 0


def weight_faults(directory: Path) -> Iterator[str]:
    """Yield the faults of a checkpoint's weight files."""
    names = sorted(file.name for file in directory.iterdir())
    shards = {name for name in names if _SHARD.fullmatch(name)}
    if ADAPTER_CONFIG in names:
        yield (
            f"{directory} holds adapters ({ADAPTER_CONFIG}) beside a model, and transformers would "
            "load the base that they name instead: move the adapters to a directory of their own"
        )
    if SINGLE in names:
        if others := sorted(shards | ({INDEX} & {*names})):
            yield (
                f"{directory} holds {SINGLE} and also {others[0]}, so it is unclear which weights "
                "are meant: remove those of the other model"
            )
        yield from _header(directory / SINGLE)[1]
    elif INDEX in names:
        yield from _shard_faults(directory / INDEX, shards)
    else:
        yield _without_weights(directory, names, shards)


def adapter_faults(directory: Path) -> Iterator[str]:
    """Yield the faults of the weight file of adapters."""
    if (directory / ADAPTER_WEIGHTS).is_file():
        yield from _header(directory / ADAPTER_WEIGHTS)[1]
    else:
        yield (
            f"{directory} holds no {ADAPTER_WEIGHTS}: copy the adapters again, or convert their "
            "adapter_model.bin where that is safe (a pickle can run any code and is not loaded)"
        )


def _without_weights(directory: Path, names: list[str], shards: set[str]) -> str:
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if shards:
        return (
            f"{directory} holds {len(shards)} shards of weights without {INDEX}, which says what "
            "is in them: copy the checkpoint again"
        )
    if pickled:
        return (
            f"{directory} holds its weights as {pickled[0]}, a pickle, which can run any code "
            "when it is read, and is not loaded: use the checkpoint's safetensors, or convert "
            "it where that is safe (save_pretrained writes model.safetensors)"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return (
            f"{directory} holds its weights as {gguf[0]}, which is made for inference: name the "
            "checkpoint that it was converted from"
        )
    return f"{directory} holds no weights: put {SINGLE} beside its config.json"


def _shard_faults(index: Path, present: set[str]) -> Iterator[str]:
    """Yield the faults of the files that an index names; they must be in its directory."""
    try:
        shards = _json_object(index, unique=True).get("weight_map")
    except ModelError as error:
        yield str(error)
        return
    if not isinstance(shards, dict) or not shards:
        yield f"{index}: has no `weight_map` from weights to files: copy the checkpoint again"
        return
    named: dict[str, set[str]] = {}
    for weight, name in shards.items():
        named.setdefault(str(name), set()).add(weight)
    for name in sorted(named):
        if Path(name).name != name or not name.endswith(".safetensors"):
            yield (
                f"{index}: names the file {name!r}, which is not a .safetensors file beside it, "
                "so it is not read: take the checkpoint from a source you trust"
            )
        elif not (index.parent / name).is_file():
            yield f"{index}: names {name}, which is not there: copy the checkpoint again"
        else:
            held, faults = _header(index.parent / name)
            yield from faults or _index_faults(index, name, named[name], held)
    if extra := sorted(present - named.keys()):
        yield (
            f"{index.parent} also holds {extra[0]}, which its index does not name: remove what is "
            "left of another checkpoint, or copy this one again"
        )


def _index_faults(index: Path, shard: str, named: set[str], held: set[str]) -> Iterator[str]:
    """Yield the differences between a shard's weights and those that the index places in it."""
    for found, where in ((named - held, "does not hold"), (held - named, "also holds")):
        if found:
            yield (
                f"{index}: {shard} {where} {min(found)}"
                f"{f' and {len(found) - 1} more weights' if len(found) > 1 else ''}, so index and "
                "shards are of different checkpoints: copy the checkpoint again"
            )


def _header(file: Path) -> tuple[set[str], list[str]]:
    """Return the names of a safetensors file's weights, and the faults that its header shows."""
    remedy = "copy the checkpoint again"
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start == b"version ":
            return set(), [f"{file}: is a pointer of Git LFS, not the weights: run `git lfs pull`"]
        if not 2 <= length <= min(_LONGEST_HEADER, max(size - 8, 0)):
            fault = f"is truncated or not a safetensors file ({size:,} bytes)"
            return set(), [f"{file}: {fault}: {remedy}"]
        text = opened.read(length)
    try:
        header = json.loads(text)
        tensors = {name: t for name, t in header.items() if name != "__metadata__"}
        stated = max((t["data_offsets"][1] for t in tensors.values()), default=0)
        matches = stated == size - 8 - length
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return set(), [f"{file}: its header is damaged: {remedy}"]
    if not matches:
        fault = f"holds {size - 8 - length:,} bytes of weights where its header says {stated:,}"
        return set(), [f"{file}: {fault}: {remedy}"]
    return set(tensors), []


def _tokenizer_faults(directory: Path) -> Iterator[str]:
    names = [file.name for file in directory.iterdir()]
    marks = ("tokenizer", "vocab", "spiece", "tiktoken")
    if not any(mark in name for name in names for mark in marks):
        yield (
            f"{directory} has no tokenizer: put tokenizer.json and tokenizer_config.json beside "
            "the weights"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name in names:
            try:
                _json_object(directory / name)
            except ModelError as error:
                yield str(error)


def _json_object(file: Path, *, unique: bool = False) -> dict[str, Any]:
    """Return the object in a file; with ``unique``, no name may occur twice in it."""
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=_unique if unique else None)
    except _RepeatedNameError as error:
        raise ModelError(
            f"{file}: names {error} twice, so it is unclear which is meant; copy the checkpoint "
            "again"
        ) from None
    except OSError as error:
        raise ModelError(
            f"{file}: cannot be read: {error.strerror}; check its permissions"
        ) from None
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{file}:{error.lineno}: not valid JSON: {error.msg}; copy the checkpoint again"
        ) from None
    except (ValueError, RecursionError):
        raise ModelError(f"{file}: not readable as JSON; copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: is not a JSON object; copy the checkpoint again")
    return content


class _RepeatedNameError(Exception):
    """An object in JSON has a name twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(next(name for name in names if names.count(name) > 1))
    return found
