"""The reference's log-probs of pairs from a file, kept on disk for further runs over the same.

A file is named by the SHA-256 of all that its numbers depend on: weights, tokens and how they are
cut, temperature, versions, this package's own source, and the processor. So a run that finds them
ends with the same bits as one that computes them. A file that is torn or altered is told and
computed again; one that cannot be written is told, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trivium.config.paths import cache_directory
from trivium.data.batch import Grouped
from trivium.models.cpu.linear import matmul_backend
from trivium.models.loading import has_lora, unwrap_peft
from trivium.models.oom import score_logprobs
from trivium.models.policy import Policy
from trivium.runs.files import is_left_over, write_bytes
from trivium.runs.provenance import source_digest, versions

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 30
"""Of all files together; those that were used longest ago make room."""
_VALUES, _SEAL = "logprobs_T", "sha256"
_LEFT_OVER_AFTER = 3600.0
"""Seconds after which a file that is still being written belongs to a process that was killed."""


def cached_logprobs(policy: Policy, data: Grouped, parts: Sequence[Sequence[int]]) -> Tensor:
    """``score_logprobs`` of a policy that is still as it was loaded; from disk where it is there.

    A model whose code came with its checkpoint is always asked: nothing says when that changes.
    """
    if not type(unwrap_peft(policy.model)).__module__.startswith("transformers."):
        return score_logprobs(policy, data, parts)
    key = cache_key(policy, data, parts)
    try:
        path = cache_directory() / "reference" / f"{key}.safetensors"
    except RuntimeError as error:
        logger.warning("the reference's log-probs cannot be kept: %s; set TRIVIUM_CACHE", error)
        return score_logprobs(policy, data, parts)
    found_T = _read(path, key, len(data.groups))
    if found_T is not None:
        return found_T.to(policy.device)
    logprobs_T = score_logprobs(policy, data, parts)
    _write(path, key, logprobs_T.cpu())
    return logprobs_T


def cache_key(policy: Policy, data: Grouped, parts: Sequence[Sequence[int]]) -> str:
    """One number for all that the log-probs depend on, to the last bit."""
    model = unwrap_peft(policy.model)
    about = model.config.to_dict()
    environment = {
        "class": type(model).__name__,
        "config": {k: v for k, v in about.items() if k not in ("_name_or_path", "name_or_path")},
        "attention": [policy.shared, model.config._attn_implementation],
        "temperature": policy.temperature,
        "packages": versions(),
        "source": source_digest(),
        "processor": _processor(policy.device),
        "threads": torch.get_num_threads(),
        "products": [matmul_backend.name, torch.get_float32_matmul_precision()],
    }
    total = hashlib.sha256(json.dumps(environment, sort_keys=True, default=str).encode())
    for numbers in (*(s for g in data.groups for s in (g.prompt, *g.responses, ())), *parts):
        total.update(array("q", [len(numbers), *numbers]).tobytes())
    for name, tensor in _weights(policy):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The reference's weights and buffers: adapters that are not trained yet change nothing."""
    adapted = has_lora(policy.model)
    for name, parameter in policy.model.named_parameters():
        if not (adapted and parameter.requires_grad):
            yield name, parameter.detach()
    yield from policy.model.named_buffers()


def _processor(device: torch.device) -> str:
    """What computes: another one may round differently."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    lines = Path("/proc/cpuinfo")
    named = lines.read_text().splitlines() if lines.exists() else []
    names = [line for line in named if line.startswith("model name")] or [platform.processor()]
    return f"{device.type} {names[0]} {torch.backends.cpu.get_cpu_capability()}"


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()


def _seal(key: str, values_T: Tensor) -> Tensor:
    total = hashlib.sha256(f"{key} {values_T.dtype} {len(values_T)}\n".encode())
    total.update(_bytes(values_T))
    return torch.tensor(list(total.digest()), dtype=torch.uint8)


def _read(path: Path, key: str, pairs: int) -> Tensor | None:
    """The log-probs of a file that is whole; None where there is none."""
    try:
        held = load(path.read_bytes())
        values_T = held[_VALUES].clone()
        if not torch.equal(held[_SEAL], _seal(key, values_T)):
            raise ValueError("its SHA-256 does not fit")
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: cannot be read: %s; it is computed again", path, error.strerror)
        return None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        logger.warning("%s: is torn or altered (%s); it is computed again", path, error)
        return None
    with suppress(OSError):  # It is of use where it may not be written, too.
        path.touch()
    logger.info(
        "the reference's log-probs of %d pairs are those of an earlier run: %s", pairs, path
    )
    return values_T


def _write(path: Path, key: str, values_T: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({_VALUES: values_T, _SEAL: _seal(key, values_T)}))
        _make_room(path.parent)
    except OSError as error:
        logger.warning(
            "%s: cannot be written: %s; further runs compute the reference's log-probs again. Make "
            "room, name another place in TRIVIUM_CACHE, or set reference_cache: false",
            path,
            error.strerror or error,
        )


def _make_room(directory: Path) -> None:
    """Delete what was used longest ago, and what a killed process left half written."""
    files = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # Another process may be making room, too.
            about = path.stat()
            files.append((about.st_mtime, about.st_size, path))
    for at, _, path in files:
        if is_left_over(path) and time.time() - at > _LEFT_OVER_AFTER:
            path.unlink(missing_ok=True)
    kept = sorted((f for f in files if f[2].suffix == ".safetensors"), reverse=True)
    ends = accumulate(size for _, size, _ in kept)
    for (_, _, path), end in list(zip(kept, ends, strict=True))[1:]:
        if end > MOST_BYTES:
            path.unlink(missing_ok=True)
