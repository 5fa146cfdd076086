"""Checkpoints: written atomically, loaded bit by bit, and never loaded when damaged."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.group import Group
from trivium.data.response import Response
from trivium.errors import CheckpointError
from trivium.runs import files
from trivium.runs.checkpoint import MANIFEST, STATE, TENSORS, Checkpoints, SavePoint
from trivium.runs.files import remove_partial_writes
from trivium.serialization import Serializer, deserialize

RUN_ID = "0123456789abcdef"


def state(step: int) -> dict[str, Any]:
    """Return a state that differs in every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "loop_state": {"done": step, "spent": {"flops": 0.1 * step}, "nothing": None},
        "model": {"weight": torch.randn(7, 5, generator=generator), "bias": torch.zeros(0)},
        "optimizer": {"moments": {0: {"step": torch.tensor(float(step))}, 1: {}}},
    }


def write_checkpoints(directory: Path, *steps: int, run_id: str = RUN_ID) -> Checkpoints:
    checkpoints = Checkpoints(directory, run_id)
    for step in steps:
        checkpoints.write(SavePoint(step), state(step))
    return checkpoints


# --- Serialization --------------------------------------------------------------------------------

SHARED_OBJECTS = [object(), object()]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.integers() | st.tuples(st.text(), st.integers()), inner)
    ),
    max_leaves=20,
)


def round_trip(value: Any, shared_objects: list[object] | None = None) -> Any:
    """Serialize a value to JSON text and deserialize it."""
    serializer = Serializer(shared_objects or ())
    text = json.dumps(serializer.pack(value, "value"), allow_nan=False)
    return deserialize(json.loads(text), serializer.tensors.__getitem__, shared_objects or ())


def exact(value: Any) -> str:
    """Return a text that also shows differences that == ignores (1 and True, 0.0 and −0.0)."""
    return repr(value)


@given(values)
@settings(deadline=None)
def test_any_value_survives_a_round_trip(value: Any) -> None:
    assert exact(round_trip(value)) == exact(value)


def test_numbers_keep_every_bit() -> None:
    numbers = [0.1 + 0.2, -0.0, 5e-324, math.nan, math.inf, -math.inf, 1 << 80]
    assert exact(round_trip(numbers)) == exact(numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_keep_type_shape_and_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (torch.arange(12).view(3, 4) * 0.37).to(dtype)
    checkpoints = Checkpoints(tmp_path, RUN_ID)
    checkpoints.write(
        SavePoint(1), {"x": [tensor, tensor.t(), tensor[1], torch.tensor(1).to(dtype)]}
    )
    latest = checkpoints.latest()
    assert latest is not None
    for loaded, saved in zip(latest.load("x"), [tensor, tensor.t(), tensor[1]], strict=False):
        assert loaded.dtype == dtype and torch.equal(loaded, saved)
        assert loaded.is_contiguous()


def test_dataclasses_and_shared_objects_survive_a_round_trip() -> None:
    group = Group([1], [[2, 3]])
    response = Response([1], [-0.5], "eos", "x")
    assert round_trip([group, response]) == [group, response]
    first, second = round_trip((SHARED_OBJECTS[1], SHARED_OBJECTS[0]), SHARED_OBJECTS)
    assert first is SHARED_OBJECTS[1] and second is SHARED_OBJECTS[0]


def test_value_that_cannot_be_serialized_is_named_by_its_path() -> None:
    with pytest.raises(TypeError, match=r"loop_state\.x\.0: object cannot be packed"):
        Serializer().pack({"x": [object()]}, "loop_state")


@pytest.mark.parametrize(
    "tree", [{"!": "Path", "=": "x"}, {"!": "os.system", "=": {}}, {"!": "tuple"}, {"!": 3, "=": 1}]
)
def test_only_declared_types_are_deserialized(tree: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a packed value|is not registered"):
        deserialize(tree, lambda name: torch.zeros(1))


# --- Writing --------------------------------------------------------------------------------------


def test_latest_checkpoint_is_loaded(tmp_path: Path) -> None:
    latest = write_checkpoints(tmp_path, 1, 12, 3).latest()
    assert latest is not None and latest.save_point == SavePoint(12)
    assert latest.load("loop_state") == state(12)["loop_state"]
    assert torch.equal(latest.load("model")["weight"], state(12)["model"]["weight"])
    assert list(latest.load("optimizer")["moments"]) == [0, 1]


def test_save_points_inside_a_step_sort_between_its_neighbors(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, RUN_ID)
    for save_point in (
        SavePoint(3),
        SavePoint(2, 1),
        SavePoint(2, 11),
        SavePoint(2),
        SavePoint(10),
    ):
        checkpoints.write(save_point, state(1))
    names = [path.name for path in checkpoints.paths()]
    assert names == ["00000002", "00000002-p001", "00000002-p011", "00000003", "00000010"]


def test_pruning_keeps_the_last_checkpoints_and_the_protected_one(tmp_path: Path) -> None:
    checkpoints = write_checkpoints(tmp_path, 1, 2, 3, 4, 5)
    checkpoints.prune(2, protected="00000001")
    assert [path.name for path in checkpoints.paths()] == ["00000001", "00000004", "00000005"]


def test_unreadable_checkpoints_after_a_save_point_are_renamed_and_kept(tmp_path: Path) -> None:
    checkpoints = write_checkpoints(tmp_path, 1, 2, 3)
    checkpoints.mark_damaged_after(SavePoint(2))
    checkpoints.write(SavePoint(3), state(3))
    checkpoints.mark_damaged_after(SavePoint(2))
    assert [path.name for path in checkpoints.paths()] == ["00000001", "00000002"]
    kept = sorted(p.name for p in checkpoints.directory.glob("damaged-*"))
    assert kept == ["damaged-00000003", "damaged-00000003-2"]


def test_failed_write_leaves_earlier_checkpoints_and_no_partial_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = write_checkpoints(tmp_path, 1)

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(SavePoint(2), state(2))
    assert [path.name for path in checkpoints.directory.iterdir()] == ["00000001"]


def test_latest_of_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, RUN_ID).latest() is None


# --- Damage ---------------------------------------------------------------------------------------

FILES = (STATE, TENSORS, MANIFEST)
Damage = Callable[[Path, random.Random], str]
"""Damages the checkpoint in a directory, and returns the path that the warning must name."""


def flip_bit(path: Path, rng: random.Random) -> str:
    file = path / rng.choice(FILES)
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return str(path)


def truncate(path: Path, rng: random.Random) -> str:
    file = path / rng.choice(FILES)
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])
    return str(path)


def empty_file(path: Path, rng: random.Random) -> str:
    (path / rng.choice(FILES)).write_bytes(b"")
    return str(path)


def append_bytes(path: Path, rng: random.Random) -> str:
    with (path / rng.choice(FILES)).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 99)))
    return str(path)


def delete_file(path: Path, rng: random.Random) -> str:
    (path / rng.choice(FILES)).unlink()
    return str(path)


def copy_from_another(path: Path, rng: random.Random) -> str:
    """Replace a file by that of another checkpoint, which is intact."""
    name = rng.choice((STATE, TENSORS))
    shutil.copy(path.parent / "00000001" / name, path / name)
    return str(path)


def rename(path: Path, rng: random.Random) -> str:
    target = path.with_name(f"{rng.randrange(3, 10**8):08d}")
    path.rename(target)
    return str(target)


def replace_by_noise(path: Path, rng: random.Random) -> str:
    file = path / rng.choice(FILES)
    file.write_bytes(rng.randbytes(file.stat().st_size))
    return str(path)


def replace_by_another_run(path: Path, rng: random.Random) -> str:
    shutil.rmtree(path)
    other = write_checkpoints(path.parents[1] / f"other-{rng.random()}", 2, run_id="another")
    shutil.move(other.directory / "00000002", path)
    return str(path)


DAMAGES: tuple[Damage, ...] = (
    flip_bit, truncate, empty_file, append_bytes, delete_file, copy_from_another, rename,
    replace_by_noise, replace_by_another_run,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage
) -> None:
    intact = write_checkpoints(tmp_path / "intact", 1, 2)
    for seed in range(80):
        run = tmp_path / "run"
        shutil.copytree(intact.directory, run / "checkpoints")
        damaged = damage(run / "checkpoints" / "00000002", random.Random(seed))
        caplog.clear()
        latest = Checkpoints(run, RUN_ID).latest()
        assert latest is not None and latest.save_point == SavePoint(1), (seed, caplog.text)
        assert torch.equal(latest.load("model")["weight"], state(1)["model"]["weight"])
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and damaged in record.getMessage()
        shutil.rmtree(run)


def test_nothing_is_loaded_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    checkpoints = write_checkpoints(tmp_path, 1, 2)
    for path in checkpoints.paths():
        (path / TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete .*run\.overwrite=true"):
        checkpoints.latest()


def test_checkpoint_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints = write_checkpoints(tmp_path, 1)
    file = checkpoints.paths()[0] / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: has format 1, not 2"):
        checkpoints.latest()


@pytest.mark.parametrize("moment", ["old moved", "new in place"])
def test_replacement_interrupted_by_a_kill_is_completed_or_undone(
    tmp_path: Path, moment: str
) -> None:
    old, new = tmp_path / "final", tmp_path / ".final-0a1b2c3d.partial"
    for path, text in ((old, "old"), (new, "new")):
        path.mkdir()
        (path / "weights").write_text(text)
    old.rename(tmp_path / ".final-9a8b7c6d.previous")
    if moment == "new in place":
        new.rename(old)
    remove_partial_writes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    expected = "old" if moment == "old moved" else "new"
    assert (tmp_path / "final" / "weights").read_text() == expected


def test_partially_written_and_partially_removed_checkpoints_are_removed(tmp_path: Path) -> None:
    checkpoints = write_checkpoints(tmp_path, 1, 2)
    for name in (".00000003-0a1b2c3d.partial", ".00000001.removed"):
        shutil.copytree(checkpoints.directory / "00000002", checkpoints.directory / name)
    latest = checkpoints.latest()
    assert latest is not None and latest.save_point == SavePoint(2)
    remove_partial_writes(checkpoints.directory)
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    assert names == ["00000001", "00000002"]
