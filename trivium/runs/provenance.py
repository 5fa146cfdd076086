"""Provenance of a run: its configuration, its input files, and the code that computes it.

A run resumes only if none of these has changed, or if the user allows the changes. Input files are
identified by their content, large files by samples of it: the purpose is to notice a different
file, not to detect forgery. Checkpoints have checksums of their own (``runs.checkpoint``).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trivium.config.base import Configuration
from trivium.config.yaml_source import YamlSource
from trivium.errors import ConfigurationError, DataError
from trivium.runs.files import open_regular

PACKAGES = ("trivium", "torch", "transformers", "tokenizers", "safetensors", "peft")
IGNORED_SETTINGS = frozenset(
    "run.directory run.overwrite run.resume run.allow_changes run.push run.trackers "
    "run.checkpoints run.measure_memory reference_cache parallel".split()
)
"""Settings that do not affect the results of a run."""
_FULL_DIGEST_BYTES, _NUM_SAMPLES, _SAMPLE_BYTES = 1 << 26, 64, 1 << 16
_NOT_SET = "(not set)"
MODEL_CARD = "README.md"
"""Text beside a model that does not affect results, and differs between equal runs."""


def environment(config: Configuration) -> dict[str, Any]:
    """Return everything that a run depends on besides its configuration, as run.json stores it."""
    return {
        "from": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "source": source_digest(),
        "inputs": {str(path): digest(path) for path in sorted(set(config.inputs()))},
    }


def differences(saved: Mapping[str, Any], directory: Path, config: Configuration) -> list[str]:
    """Describe how configuration, inputs and code differ from those of the run in ``directory``."""
    old = _flat_settings(_read_settings(directory / "config.yaml"))
    new = settings_that_matter(config)
    changes = [
        f"{name}: {_format_setting(old, name)} → {_format_setting(new, name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name, _NOT_SET) != new.get(name, _NOT_SET)
    ]
    current = environment(config)
    for name, current_digest in current["inputs"].items():
        if saved["inputs"].get(name, current_digest) != current_digest:
            changes.append(f"{name}: its content changed")
    if saved["python"].split(".")[:2] != current["python"].split(".")[:2]:
        changes.append(f"python: version {saved['python']} → {current['python']}")
    for name, installed in current["packages"].items():
        if saved["packages"].get(name) != installed:
            changes.append(f"{name}: version {saved['packages'].get(name)} → {installed}")
    if saved["source"] != current["source"]:
        changes.append("trivium: its source code changed")
    return changes


def settings_that_matter(config: Configuration) -> dict[str, Any]:
    """Return the settings that affect the results of a run, by their dotted names."""
    return _flat_settings(config.model_dump(mode="json"))


def versions() -> dict[str, str | None]:
    """Return the installed versions of the packages that affect results."""
    return {name: _version(name) for name in PACKAGES}


@cache
def source_digest() -> str:
    """Return a digest of Trivium's source code, which changes more often than its version."""
    package = Path(__file__).parent.parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def digest(path: Path) -> str:
    """Return a digest of a file, or of all files in a directory.

    A large file is digested by its size and samples of its content.
    """
    total = hashlib.sha256()
    for file in sorted(_files(path)):
        total.update(str(file.relative_to(path)).encode())
        total.update(str(file.stat().st_size).encode())
        for chunk in _chunks(file):
            total.update(chunk)
    return total.hexdigest()[:16]


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (f for f in path.rglob("*") if f.is_file() and f.name != MODEL_CARD)
    else:
        yield path


def _chunks(file: Path) -> Iterator[bytes]:
    """Yield the content of a file; of a large file, samples at equal distances."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _FULL_DIGEST_BYTES:
            yield stream.read()
            return
        for number in range(_NUM_SAMPLES):
            stream.seek(number * (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
            yield stream.read(_SAMPLE_BYTES)


def _read_settings(path: Path) -> Any:
    try:
        open_regular(path).close()
        source = YamlSource(path)
    except OSError as error:
        reason = f"{error.strerror}; restore the file"
        raise DataError(f"{path}: the run cannot be resumed: {reason}") from None
    except ConfigurationError as error:
        raise DataError(f"{path}: is damaged, so the run cannot be resumed: {error}") from None
    if source.faults:
        raise DataError(f"{path}: is damaged, so the run cannot be resumed: {source.faults[0]}")
    return source.values


def _flat_settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a configuration by dotted name, without the ignored settings."""
    settings: dict[str, Any] = {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        name = f"{prefix}{key}"
        if name in IGNORED_SETTINGS:
            continue
        if isinstance(value, dict | list) and value:
            settings |= _flat_settings(value, f"{name}.")
        else:
            settings[name] = value
    return settings


def _format_setting(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return _NOT_SET
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
