"""Checkpoints: the whole state of a run in one directory, complete or absent.

    checkpoints/00000012/            after step 12; 00000012-p003: inside step 13, third save point
        state.json                   the state, with tensors replaced by their names
        tensors.safetensors          the tensors
        manifest.json                size and SHA-256 of both files, the run's id and the step

A checkpoint is written under a temporary name, flushed to the disk and renamed. A truncated or
altered checkpoint is detected before anything is loaded from it. The contents of the state
(``training.run_loop``) and the conversion of values to JSON (``trivium.serialization``) are defined
elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trivium.errors import CheckpointError
from trivium.runs.files import (
    atomic_directory,
    flush_to_disk,
    open_regular,
    parse_json,
    read_regular,
    remove_atomically,
)
from trivium.serialization import Serializer, deserialize

logger = logging.getLogger(__name__)

DIRECTORY = "checkpoints"
STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
FORMAT = 2
_MAX_STATE_BYTES = 1 << 40  # its manifest has its size
_NAME = re.compile(r"\d{8,}(-p\d{3,})?")


@dataclass(frozen=True)
class SavePoint:
    """Point of a run at which its state can be saved.

    Attributes:
        step: number of completed training steps.
        index: number of the save point inside the next step, from 1; 0 between two steps.
    """

    step: int
    index: int = 0

    @property
    def name(self) -> str:
        return f"{self.step:08d}" + (f"-p{self.index:03d}" if self.index else "")

    def __str__(self) -> str:
        return f"inside step {self.step + 1}" if self.index else f"step {self.step}"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. Its entries are loaded one by one, so that memory holds one at a time.

    Attributes:
        path: directory of the checkpoint.
        save_point: point of the run at which the checkpoint was saved.
    """

    path: Path
    save_point: SavePoint

    @cached_property
    def entries(self) -> dict[str, Any]:
        """The serialized entries by name, without their tensors."""
        try:
            return parse_json(read_regular(self.path / STATE, _MAX_STATE_BYTES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path / STATE}: cannot be read: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def load(self, name: str, shared_objects: Sequence[object] = ()) -> Any:
        """Return one entry of the state.

        Raises:
            CheckpointError: the entry cannot be deserialized.
        """
        try:
            return deserialize(self.entries[name], self._load_tensor, shared_objects)
        except (
            ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError,
            SafetensorError, OSError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{self.path / STATE}: {name!r} cannot be read ({error}): it was written by "
                "another version of Trivium, or altered"
            ) from error

    def _load_tensor(self, name: str) -> Tensor:
        """Return a tensor in memory of its own. The file is closed again, so it is not kept open
        or mapped."""
        with safe_open(self.path / TENSORS, framework="pt", backend="pread") as file:
            return file.get_tensor(name).clone()


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run directory.
        run_id: id of the run. A checkpoint of another run is rejected by its id.
    """

    def __init__(self, run: Path, run_id: str) -> None:
        self.directory = run / DIRECTORY
        self.run_id = run_id

    def write(
        self,
        save_point: SavePoint,
        state: Mapping[str, Any],
        shared_objects: Sequence[object] = (),
    ) -> Checkpoint:
        """Write a checkpoint. It is complete and on the disk when this method returns.

        Raises:
            OSError: the disk is full, or the checkpoint cannot be written.
        """
        serializer = Serializer(shared_objects)
        entries = {name: serializer.pack(value, name) for name, value in state.items()}
        target = self.directory / save_point.name
        with atomic_directory(target) as partial:
            text = json.dumps(entries, ensure_ascii=False, allow_nan=False)
            (partial / STATE).write_text(text, encoding="utf-8")
            _write_tensors(serializer.tensors, partial / TENSORS)
            (partial / MANIFEST).write_text(self._manifest(save_point, partial), encoding="utf-8")
        return Checkpoint(target, save_point)

    def latest(self) -> Checkpoint | None:
        """Return the most recent complete checkpoint; None if there are no checkpoints.

        Raises:
            CheckpointError: there are checkpoints, and none of them is complete.
        """
        errors = []
        for path in reversed(self.paths()):
            try:
                return self.open(path)
            except CheckpointError as error:
                errors.append(str(error))
                logger.warning("%s; the checkpoint before it is used", error)
        if errors:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is complete ({errors[0]}): write "
                "run.overwrite=true to start the run from the beginning"
            )
        return None

    def paths(self) -> list[Path]:
        """Return the directories that are named like checkpoints, oldest first."""
        if not self.directory.is_dir():
            if os.path.lexists(self.directory):
                raise CheckpointError(
                    f"{self.directory}: is not a directory: restore it, or write "
                    "run.overwrite=true to start the run from the beginning"
                )
            return []
        return sorted(p for p in self.directory.iterdir() if _NAME.fullmatch(p.name))

    def open(self, path: Path) -> Checkpoint:
        """Open a checkpoint of this run after checking its files against its manifest.

        Raises:
            CheckpointError: the checkpoint is truncated or altered, or belongs to another run.
        """
        manifest = _read_manifest(path)
        save_point = SavePoint(manifest["step"], manifest["index"])
        if manifest["run"] != self.run_id:
            raise CheckpointError(f"{path}: is a checkpoint of another run ({manifest['run']})")
        if save_point.name != path.name:
            raise CheckpointError(f"{path}: was renamed; its name was {save_point.name}")
        for name, record in manifest["files"].items():
            _check_file(path / name, record["bytes"], record["sha256"])
        return Checkpoint(path, save_point)

    def prune(self, keep: int, protected: str | None = None) -> None:
        """Delete all checkpoints but the last ``keep`` and the one named ``protected``."""
        paths = self.paths()
        for path in paths[: max(0, len(paths) - keep)]:
            if path.name != protected:
                remove_atomically(path)

    def mark_damaged_after(self, save_point: SavePoint) -> None:
        """Rename the checkpoints after a save point, from which the run resumes, to ``damaged-…``.

        They could not be read. They are kept, because the user may still want to examine or repair
        them.
        """
        for path in self.paths():
            if path.name > save_point.name:
                path.rename(_unused_path(path.with_name(f"damaged-{path.name}")))

    def _manifest(self, save_point: SavePoint, directory: Path) -> str:
        manifest = {
            "format": FORMAT,
            "run": self.run_id,
            **asdict(save_point),
            "files": {name: _file_record(directory / name) for name in (STATE, TENSORS)},
        }
        return json.dumps({**manifest, "sha256": _manifest_digest(manifest)}, indent=2) + "\n"


def _unused_path(path: Path) -> Path:
    """Return the path, with a number appended if it exists."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(_without_shared_memory(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    flush_to_disk(path)


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with an earlier one: safetensors does not allow sharing."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def _file_record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint after checking its format and its own digest."""
    file = path / MANIFEST
    try:
        manifest = parse_json(read_regular(file))
        version = manifest["format"]
        digest = manifest.pop("sha256", None)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: is truncated or altered") from None
    if version != FORMAT:
        raise CheckpointError(f"{file}: has format {version}, not {FORMAT}")
    if digest != _manifest_digest(manifest):
        raise CheckpointError(f"{file}: was altered: its SHA-256 does not match")
    if not _is_manifest(manifest):
        raise CheckpointError(f"{file}: is truncated or altered")
    return manifest


def _is_manifest(manifest: Mapping[str, Any]) -> bool:
    """Return whether a manifest has all fields, and names the files of a checkpoint."""
    counts = [manifest.get(name) for name in ("step", "index")]
    files = manifest.get("files")
    return (
        all(type(number) is int and 0 <= number < 1 << 63 for number in counts)
        and isinstance(files, dict)
        and files.keys() == {STATE, TENSORS}
        and all(isinstance(r, dict) and r.keys() == {"bytes", "sha256"} for r in files.values())
    )


def _check_file(path: Path, size: int, digest: str) -> None:
    try:
        actual_size = path.stat().st_size
        if actual_size != size:
            raise CheckpointError(f"{path}: is truncated: it has {actual_size:,} of {size:,} bytes")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path}: was altered: its SHA-256 does not match")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
