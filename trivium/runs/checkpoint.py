"""Checkpoints: a run's whole state in a directory of its own, there whole or not at all.

    checkpoints/00000012/            after step 12; 00000012-p003: inside step 13, at its 3rd pause
        state.json                   the state, with tensors by name
        tensors.safetensors          the tensors
        manifest.json                what the two files are (size, SHA-256), of which run and step

It is written under another name, flushed to the disk, and renamed; what is torn or altered is
recognized before anything is read from it. Left out: what the state is (``training.run_loop``), and
how values become trees (``trivium.serialization``).
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from trivium.runs.files import flush_to_disk, placing, remove_aside
from trivium.serialization import Serializer, deserialize

logger = logging.getLogger(__name__)

DIRECTORY = "checkpoints"
STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
FORMAT = 2
_NAME = re.compile(r"\d{8,}(-p\d{3,})?")


@dataclass(frozen=True)
class Place:
    """Where in a run a checkpoint was taken: after ``step`` steps, at a pause of the next (0: none
    of it is done)."""

    step: int
    pause: int = 0

    @property
    def name(self) -> str:
        return f"{self.step:08d}" + (f"-p{self.pause:03d}" if self.pause else "")

    def __str__(self) -> str:
        return f"inside step {self.step + 1}" if self.pause else f"step {self.step}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole; its parts are read one by one, so that memory holds one.

    Attributes:
        path: its directory.
        place: where in the run it was taken.
    """

    path: Path
    place: Place

    @cached_property
    def _trees(self) -> dict[str, Any]:
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))

    def __contains__(self, part: str) -> bool:
        return part in self._trees

    def part(self, name: str, shared_objects: Sequence[object] = ()) -> Any:
        """One part of the state."""
        try:
            return deserialize(self._trees[name], self._tensor, shared_objects)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / STATE}: {name!r} cannot be read ({error}): it was written by "
                "another version of Trivium, or altered"
            ) from error

    def _tensor(self, name: str) -> Tensor:
        """A tensor in memory of its own: opened anew each time, nothing of the file stays held."""
        with safe_open(self.path / TENSORS, framework="pt", backend="pread") as file:
            return file.get_tensor(name).clone()


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: the run's directory.
        identity: the run's own id, so that another's checkpoint is not taken for one of its own.
    """

    def __init__(self, run: Path, identity: str) -> None:
        self.directory = run / DIRECTORY
        self.identity = identity

    def write(
        self, place: Place, parts: Mapping[str, Any], shared_objects: Sequence[object] = ()
    ) -> Checkpoint:
        """Save a state; whole and on the disk when this returns.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        packer = Serializer(shared_objects)
        trees = {name: packer.pack(value, name) for name, value in parts.items()}
        target = self.directory / place.name
        with placing(target) as partial:
            text = json.dumps(trees, ensure_ascii=False, allow_nan=False)
            (partial / STATE).write_text(text, encoding="utf-8")
            _write_tensors(packer.tensors, partial / TENSORS)
            (partial / MANIFEST).write_text(self._manifest(place, partial), encoding="utf-8")
        return Checkpoint(target, place)

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that is whole; None if the run has none.

        Raises:
            CheckpointError: there are some, and none is whole.
        """
        damages = []
        for path in reversed(self.paths()):
            try:
                return self.opened(path)
            except CheckpointError as error:
                damages.append(str(error))
                logger.warning("%s; the checkpoint before it is used", error)
        if damages:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole ({damages[0]}): to begin the run anew, "
                "write run.overwrite=true"
            )
        return None

    def paths(self) -> list[Path]:
        """The directories that are called as checkpoints are, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(p for p in self.directory.iterdir() if _NAME.fullmatch(p.name))

    def opened(self, path: Path) -> Checkpoint:
        """A checkpoint of this run, its files checked against its manifest.

        Raises:
            CheckpointError: it is torn, altered, or another's.
        """
        manifest = _read_manifest(path)
        place = Place(manifest["step"], manifest["pause"])
        if manifest["run"] != self.identity:
            raise CheckpointError(f"{path}: is a checkpoint of another run ({manifest['run']})")
        if place.name != path.name:
            raise CheckpointError(f"{path}: was renamed; it is {place.name}")
        for name, about in manifest["files"].items():
            _check_file(path / name, about["bytes"], about["sha256"])
        return Checkpoint(path, place)

    def prune(self, keep: int, spare: str | None = None) -> None:
        """Delete all but the last ``keep`` and the one called ``spare``."""
        for path in self.paths()[:-keep]:
            if path.name != spare:
                remove_aside(path)

    def set_aside_after(self, place: Place) -> None:
        """Rename what could not be read after a place, now that the run goes on from there.

        It is kept: what cannot be read now may be readable again, or worth a look.
        """
        for path in self.paths():
            if path.name > place.name:
                path.rename(_free(path.with_name(f"damaged-{path.name}")))

    def _manifest(self, place: Place, directory: Path) -> str:
        about = {
            "format": FORMAT,
            "run": self.identity,
            **asdict(place),
            "files": {name: _measured(directory / name) for name in (STATE, TENSORS)},
        }
        return json.dumps({**about, "seal": _seal(about)}, indent=2) + "\n"


def _free(path: Path) -> Path:
    """A path that is not taken, numbered where it is."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return next(p for p in chain([path], numbered) if not p.exists())


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(_unshared(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    flush_to_disk(path)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share memory with one before them copied: the file allows none."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def _measured(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, if it is as it was written."""
    where = path / MANIFEST
    try:
        manifest = json.loads(where.read_bytes())
        seal = manifest.pop("seal")
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{where}: is torn or altered") from None
    if seal != _seal(manifest):
        raise CheckpointError(f"{where}: was altered: its seal does not fit")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{where}: has the format {manifest['format']}, not {FORMAT}")
    return manifest


def _check_file(path: Path, size: int, digest: str) -> None:
    try:
        found = path.stat().st_size
        if found != size:
            raise CheckpointError(f"{path}: is torn: it has {found:,} bytes of {size:,}")
        if _sha256(path) != digest:
            raise CheckpointError(f"{path}: was altered: its SHA-256 does not fit")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
