"""What makes a run the run it is: its configuration, its inputs, and the code that it runs.

A run may only go on where none of these changed, or where the user allows it. Files are told by
their content, large ones by samples of it: what matters is that another file is noticed, not that
a forgery is. Left out: checkpoints, which are told by checksums of all they hold.
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

import yaml

from trivium.config.base import Configuration
from trivium.errors import DataError

PACKAGES = ("trivium", "torch", "transformers", "tokenizers", "safetensors", "peft")
FREE = frozenset(
    "run.directory run.overwrite run.resume run.allow_changes run.trackers run.checkpoints "
    "run.measure_memory reference_cache".split()
)
"""Settings that decide nothing of what a run computes."""
_WHOLE, _SAMPLES, _SAMPLE = 1 << 26, 64, 1 << 16
_ABSENT = "(not set)"


def environment(config: Configuration) -> dict[str, Any]:
    """What a run depends on besides its configuration, as ``run.json`` keeps it."""
    return {
        "from": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "source": source_digest(),
        "inputs": {str(path): digest(path) for path in sorted(set(config.inputs()))},
    }


def differences(saved: Mapping[str, Any], directory: Path, config: Configuration) -> list[str]:
    """How a configuration, its inputs and the code differ from those of the run in a directory."""
    settings = _settings(_read_settings(directory / "config.yaml"))
    now = _settings(config.model_dump(mode="json"))
    found = [
        f"{name}: {_shown(settings, name)} → {_shown(now, name)}"
        for name in dict.fromkeys([*settings, *now])
        if settings.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]
    about = environment(config)
    for name, digest_now in about["inputs"].items():
        if saved["inputs"].get(name, digest_now) != digest_now:
            found.append(f"{name}: its content changed")
    if saved["python"].split(".")[:2] != about["python"].split(".")[:2]:
        found.append(f"python: version {saved['python']} → {about['python']}")
    for name, installed in about["packages"].items():
        if saved["packages"].get(name) != installed:
            found.append(f"{name}: version {saved['packages'].get(name)} → {installed}")
    if saved["source"] != about["source"]:
        found.append("trivium: its source code changed")
    return found


def versions() -> dict[str, str | None]:
    """The installed versions of what computes."""
    return {name: _version(name) for name in PACKAGES}


@cache
def source_digest() -> str:
    """Trivium's own code in one number; its version alone says little while it is developed."""
    package = Path(__file__).parent.parent
    total = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(str(path.relative_to(package)).encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


def digest(path: Path) -> str:
    """A file's content, or that of all files in a directory, in one number; of a large file its
    size and samples of it."""
    total = hashlib.sha256()
    for file in sorted(_files(path)):
        total.update(str(file.relative_to(path)).encode())
        total.update(str(file.stat().st_size).encode())
        for piece in _pieces(file):
            total.update(piece)
    return total.hexdigest()[:16]


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    else:
        yield path


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE:
            yield stream.read()
            return
        for place in range(_SAMPLES):
            stream.seek(place * (size - _SAMPLE) // (_SAMPLES - 1))
            yield stream.read(_SAMPLE)


def _read_settings(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: is damaged, so the run cannot go on: {error}") from None


def _settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration's values by their dotted names, without those that decide nothing."""
    found: dict[str, Any] = {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        name = f"{prefix}{key}"
        if name in FREE:
            continue
        if isinstance(value, dict | list) and value:
            found |= _settings(value, f"{name}.")
        else:
            found[name] = value
    return found


def _shown(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return _ABSENT
    text = json.dumps(settings[name], ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
