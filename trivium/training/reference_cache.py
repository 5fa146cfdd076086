"""Cache on disk of the reference's log-probs of preference pairs, shared by runs.

A cached file is named by the SHA-256 of everything its numbers depend on: weights, tokens and
micro-batches, temperature, versions, this package's source, and the processor. So a run that reads
the cache ends with the same bits as one that computes the log-probs. A truncated or altered file is
reported and computed again; a file that cannot be written is reported, and the run continues.
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

from trivium import distributed
from trivium.config.paths import cache_directory
from trivium.data.batch import Grouped
from trivium.data.oom import score_logprobs
from trivium.hf.adapters import has_lora, starts_at_base, unwrap_peft
from trivium.models.policy import Policy
from trivium.numerics import numerics_state
from trivium.runs.files import is_partial_write, write_bytes
from trivium.runs.provenance import source_digest, versions

logger = logging.getLogger(__name__)

MAX_BYTES = 1 << 30
"""Total size of all files; the least recently used are deleted first."""
_VALUES, _DIGEST = "logprobs_T", "sha256"
_STALE_SECONDS = 3600.0
"""Age after which a partly written file is assumed to belong to a killed process."""


def cached_logprobs(policy: Policy, data: Grouped, parts: Sequence[Sequence[int]]) -> Tensor:
    """Return ``score_logprobs`` of a policy that has not been trained yet, from disk if cached.

    A model whose code came with its checkpoint is never cached: changes of that code go unnoticed.
    Of several processes the first reads and writes the cache.
    """
    if not type(unwrap_peft(policy.model)).__module__.startswith("transformers."):
        return score_logprobs(policy, data, parts)
    place: list[tuple[Path, str]] = []

    def read() -> Tensor | None:
        key = cache_key(policy, data, parts)
        try:
            path = cache_directory() / "reference" / f"{key}.safetensors"
        except RuntimeError as error:
            reason = "the reference's log-probs cannot be cached: %s; set TRIVIUM_CACHE"
            logger.warning(reason, error)
            return None
        place.append((path, key))
        return _read(path, key, len(data.groups))

    cached_T = distributed.from_rank_0("cached log-probs", read)
    if cached_T is not None:
        return cached_T.to(policy.device)
    logprobs_T = score_logprobs(policy, data, parts)
    for path, key in place:
        _write(path, key, logprobs_T.cpu())
    return logprobs_T


def cache_key(policy: Policy, data: Grouped, parts: Sequence[Sequence[int]]) -> str:
    """Return a digest of everything that the log-probs depend on, to the last bit."""
    model = unwrap_peft(policy.model)
    config = model.config.to_dict()
    environment = {
        "class": type(model).__name__,
        "config": {k: v for k, v in config.items() if k not in ("_name_or_path", "name_or_path")},
        "attention": [policy.shared, model.config._attn_implementation],
        "temperature": policy.temperature,
        "packages": versions(),
        "source": source_digest(),
        "processor": _processor(policy.device),
        "threads": torch.get_num_threads(),
        "numerics": [policy.fast_path, numerics_state(), torch.get_float32_matmul_precision()],
    }
    total = hashlib.sha256(json.dumps(environment, sort_keys=True, default=str).encode())
    for numbers in (*(s for g in data.groups for s in (g.prompt, *g.responses, ())), *parts):
        total.update(array("q", [len(numbers), *numbers]).tobytes())
    for name, tensor in _weights(policy):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(_bytes(tensor))
    return total.hexdigest()


def _weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Yield the reference's weights and buffers; new adapters change nothing."""
    adapted = has_lora(policy.model) and starts_at_base(policy.model)
    for name, parameter in policy.model.named_parameters():
        if not (adapted and parameter.requires_grad):
            yield name, parameter.detach()
    yield from policy.model.named_buffers()


def _processor(device: torch.device) -> str:
    """Return the processor's name; another processor may round differently."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} {torch.version.cuda}"
    lines = Path("/proc/cpuinfo")
    named = lines.read_text().splitlines() if lines.exists() else []
    names = [line for line in named if line.startswith("model name")] or [platform.processor()]
    return f"{device.type} {names[0]} {torch.backends.cpu.get_cpu_capability()}"


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()


def _checksum(key: str, values_T: Tensor) -> Tensor:
    total = hashlib.sha256(f"{key} {values_T.dtype} {len(values_T)}\n".encode())
    total.update(_bytes(values_T))
    return torch.tensor(list(total.digest()), dtype=torch.uint8)


def _read(path: Path, key: str, pairs: int) -> Tensor | None:
    """Return the log-probs of a whole file; None if there is no such file."""
    try:
        tensors = load(path.read_bytes())
        values_T = tensors[_VALUES].clone()
        if not torch.equal(tensors[_DIGEST], _checksum(key, values_T)):
            raise ValueError("its SHA-256 does not fit")
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: cannot be read: %s; scoring the pairs again", path, error.strerror)
        return None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        logger.warning("%s: is truncated or altered (%s); scoring the pairs again", path, error)
        return None
    with suppress(OSError):  # A read-only cache can still be read.
        path.touch()
    logger.info("the reference's log-probs of %d pairs were read from the cache: %s", pairs, path)
    return values_T


def _write(path: Path, key: str, values_T: Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save({_VALUES: values_T, _DIGEST: _checksum(key, values_T)}))
        _evict_old_files(path.parent)
    except OSError as error:
        logger.warning(
            "%s: cannot be written: %s; further runs compute the reference's log-probs again. Make "
            "room, name another place in TRIVIUM_CACHE, or set reference_cache: false",
            path,
            error.strerror or error,
        )


def _evict_old_files(directory: Path) -> None:
    """Delete the least recently used files, and partial files of killed processes."""
    files = []
    for path in directory.iterdir():
        with suppress(FileNotFoundError):  # Another process may evict files, too.
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    for at, _, path in files:
        if is_partial_write(path) and time.time() - at > _STALE_SECONDS:
            path.unlink(missing_ok=True)
    kept = sorted((f for f in files if f[2].suffix == ".safetensors"), reverse=True)
    ends = accumulate(size for _, size, _ in kept)
    for (_, _, path), end in list(zip(kept, ends, strict=True))[1:]:
        if end > MAX_BYTES:
            path.unlink(missing_ok=True)
