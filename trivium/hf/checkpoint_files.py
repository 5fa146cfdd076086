"""Checks of a checkpoint's directory before anything in it is loaded.

They find incomplete and damaged files, and files that run code when they are read. This module does
not import torch and reads only the headers of weights, so faults are found at once. It does not
check hub names or the values of weights (``hf.loading``).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trivium.config.paths import looked_up
from trivium.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LONGEST_HEADER = 100_000_000
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def local_directory(path: str) -> Path | None:
    """Return the directory at ``path``; None for a hub name. Raise ModelError if it is missing."""
    directory = looked_up(path)
    if directory.is_dir():
        return directory
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or directory.exists():
        raise ModelError(
            f"there is no checkpoint directory {path}: name a directory with config.json, weights "
            "and tokenizer, or a hub name"
        )
    return None


def require_checkpoint(path: str) -> None:
    """Raise unless ``path`` is a directory with a configuration, or a hub name."""
    directory = local_directory(path)
    if directory is not None:
        read_config(directory)


def check_checkpoint(path: str) -> None:
    """Raise ModelError if a local checkpoint is incomplete or damaged."""
    directory = local_directory(path)
    if directory is None:
        return
    read_config(directory)
    faults = [*weight_faults(directory), *_tokenizer_faults(directory)]
    if faults:
        raise ModelError("\n".join(faults))


def read_config(directory: Path) -> dict[str, Any]:
    """Return the checkpoint's config.json; raise ModelError if it is missing or damaged."""
    file = directory / "config.json"
    if not file.is_file():
        adapter = (directory / "adapter_config.json").is_file()
        remedy = (
            "; it holds only adapters: merge them into their base and name the result"
            if adapter
            else ": name one, such as a run's `final`"
        )
        raise ModelError(
            f"{directory} is a directory without config.json, so it is not a checkpoint{remedy}"
        )
    return _json_object(file)


def context_of(path: str) -> int | None:
    """Return a local checkpoint's longest context in tokens, if its configuration names one."""
    directory = local_directory(path)
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
    if (directory / SINGLE).is_file():
        yield from _safetensors_faults(directory / SINGLE)
    elif (directory / INDEX).is_file():
        yield from _shard_faults(directory / INDEX)
    else:
        pickled = sorted(f.name for f in directory.iterdir() if f.suffix in _PICKLED)
        if pickled:
            yield (
                f"{directory} holds its weights as {pickled[0]}, a pickle, which can run any code "
                "when it is read, and is not loaded: use the checkpoint's safetensors, or convert "
                "it where that is safe (save_pretrained writes model.safetensors)"
            )
        else:
            yield f"{directory} holds no weights: put {SINGLE} beside its config.json"


def _shard_faults(index: Path) -> Iterator[str]:
    """Yield the faults of the files that an index names; they must be in its directory."""
    try:
        shards = _json_object(index).get("weight_map")
    except ModelError as error:
        yield str(error)
        return
    if not isinstance(shards, dict) or not shards:
        yield f"{index}: has no `weight_map` from weights to files: copy the checkpoint again"
        return
    for name in sorted({str(name) for name in shards.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            yield (
                f"{index}: names the file {name!r}, which is not a .safetensors file beside it, "
                "so it is not read: take the checkpoint from a source you trust"
            )
        elif not (index.parent / name).is_file():
            yield f"{index}: names {name}, which is not there: copy the checkpoint again"
        else:
            yield from _safetensors_faults(index.parent / name)


def _safetensors_faults(file: Path) -> Iterator[str]:
    """Yield the faults that the header of a safetensors file shows."""
    remedy = "copy the checkpoint again"
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, max(size - 8, 0)):
            yield f"{file}: is truncated or not a safetensors file ({size:,} bytes): {remedy}"
            return
        text = opened.read(length)
    try:
        header = json.loads(text)
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        stated = max(ends, default=0)
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        yield f"{file}: its header is damaged: {remedy}"
        return
    if stated != size - 8 - length:
        yield (
            f"{file}: holds {size - 8 - length:,} bytes of weights where its header says "
            f"{stated:,}: {remedy}"
        )


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


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
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
