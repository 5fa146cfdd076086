"""Checkpoints: written whole, read back bit by bit, and never read where they are damaged."""

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
from trivium.errors import CheckpointError
from trivium.rollout.engine import Response
from trivium.runs import files
from trivium.runs.checkpoint import MANIFEST, STATE, TENSORS, Checkpoints, Place
from trivium.runs.files import tidy
from trivium.serialization import Serializer, deserialize

RUN = "0123456789abcdef"


def state(step: int) -> dict[str, Any]:
    """A state that differs in every step."""
    generator = torch.Generator().manual_seed(step)
    return {
        "frame": {"done": step, "spent": {"flops": 0.1 * step}, "nothing": None},
        "model": {"weight": torch.randn(7, 5, generator=generator), "bias": torch.zeros(0)},
        "optimizer": {"moments": {0: {"step": torch.tensor(float(step))}, 1: {}}},
    }


def written(directory: Path, *steps: int, identity: str = RUN) -> Checkpoints:
    checkpoints = Checkpoints(directory, identity)
    for step in steps:
        checkpoints.write(Place(step), state(step))
    return checkpoints


# --- Packing --------------------------------------------------------------------------------------

KNOWN = [object(), object()]
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


def through_json(value: Any, known: list[object] | None = None) -> Any:
    packer = Serializer(known or ())
    text = json.dumps(packer.pack(value, "value"), allow_nan=False)
    return deserialize(json.loads(text), packer.tensors.__getitem__, known or ())


def exact(value: Any) -> str:
    """Types, order and every bit: what == would overlook (1 and True, 0.0 and −0.0)."""
    return repr(value)


@given(values)
@settings(deadline=None)
def test_any_value_comes_back_as_it_was(value: Any) -> None:
    assert exact(through_json(value)) == exact(value)


def test_numbers_keep_every_bit() -> None:
    numbers = [0.1 + 0.2, -0.0, 5e-324, math.nan, math.inf, -math.inf, 1 << 80]
    assert exact(through_json(numbers)) == exact(numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_keep_type_shape_and_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (torch.arange(12).view(3, 4) * 0.37).to(dtype)
    found = Checkpoints(tmp_path, RUN)
    found.write(Place(1), {"x": [tensor, tensor.t(), tensor[1], torch.tensor(1).to(dtype)]})
    latest = found.latest()
    assert latest is not None
    for back, given_ in zip(latest.part("x"), [tensor, tensor.t(), tensor[1]], strict=False):
        assert back.dtype == dtype and torch.equal(back, given_)
        assert back.is_contiguous()


def test_dataclasses_and_known_objects_come_back() -> None:
    group = Group([1], [[2, 3]])
    response = Response([1], [-0.5], "eos", "x")
    assert through_json([group, response]) == [group, response]
    first, second = through_json((KNOWN[1], KNOWN[0]), KNOWN)
    assert first is KNOWN[1] and second is KNOWN[0]


def test_what_cannot_be_packed_is_told_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"frame\.x\.0: object cannot be packed"):
        Serializer().pack({"x": [object()]}, "frame")


@pytest.mark.parametrize(
    "tree", [{"!": "Path", "=": "x"}, {"!": "os.system", "=": {}}, {"!": "tuple"}, {"!": 3, "=": 1}]
)
def test_tree_cannot_make_what_is_not_declared(tree: Any) -> None:
    with pytest.raises(ValueError, match=r"is not a packed value|is not registered"):
        deserialize(tree, lambda name: torch.zeros(1))


# --- Writing --------------------------------------------------------------------------------------


def test_last_checkpoint_is_read_back(tmp_path: Path) -> None:
    latest = written(tmp_path, 1, 12, 3).latest()
    assert latest is not None and latest.place == Place(12)
    assert latest.part("frame") == state(12)["frame"]
    assert torch.equal(latest.part("model")["weight"], state(12)["model"]["weight"])
    assert list(latest.part("optimizer")["moments"]) == [0, 1]


def test_places_inside_a_step_lie_between_its_neighbors(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, RUN)
    for place in (Place(3), Place(2, 1), Place(2, 11), Place(2), Place(10)):
        checkpoints.write(place, state(1))
    names = [path.name for path in checkpoints.paths()]
    assert names == ["00000002", "00000002-p001", "00000002-p011", "00000003", "00000010"]


def test_only_the_last_and_the_spared_stay(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2, 3, 4, 5)
    checkpoints.prune(2, spare="00000001")
    assert [path.name for path in checkpoints.paths()] == ["00000001", "00000004", "00000005"]


def test_what_could_not_be_read_after_a_place_is_kept_under_another_name(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2, 3)
    checkpoints.set_aside_after(Place(2))
    checkpoints.write(Place(3), state(3))
    checkpoints.set_aside_after(Place(2))
    assert [path.name for path in checkpoints.paths()] == ["00000001", "00000002"]
    kept = sorted(p.name for p in checkpoints.directory.glob("damaged-*"))
    assert kept == ["damaged-00000003", "damaged-00000003-2"]


def test_failed_write_leaves_the_checkpoints_before_it_and_no_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = written(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(Place(2), state(2))
    assert [path.name for path in checkpoints.directory.iterdir()] == ["00000001"]


def test_no_checkpoints_are_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, RUN).latest() is None


# --- Damage ---------------------------------------------------------------------------------------

FILES = (STATE, TENSORS, MANIFEST)
Damage = Callable[[Path, random.Random], str]


def flip(path: Path, chance: random.Random) -> str:
    file = path / chance.choice(FILES)
    data = bytearray(file.read_bytes())
    at = chance.randrange(len(data))
    data[at] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return str(path)


def truncate(path: Path, chance: random.Random) -> str:
    file = path / chance.choice(FILES)
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data))])
    return str(path)


def empty(path: Path, chance: random.Random) -> str:
    (path / chance.choice(FILES)).write_bytes(b"")
    return str(path)


def lengthen(path: Path, chance: random.Random) -> str:
    with (path / chance.choice(FILES)).open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 99)))
    return str(path)


def lose(path: Path, chance: random.Random) -> str:
    (path / chance.choice(FILES)).unlink()
    return str(path)


def exchange(path: Path, chance: random.Random) -> str:
    """A file of another checkpoint, whole in itself."""
    name = chance.choice((STATE, TENSORS))
    shutil.copy(path.parent / "00000001" / name, path / name)
    return str(path)


def misname(path: Path, chance: random.Random) -> str:
    target = path.with_name(f"{chance.randrange(3, 10**8):08d}")
    path.rename(target)
    return str(target)


def replace_by_noise(path: Path, chance: random.Random) -> str:
    file = path / chance.choice(FILES)
    file.write_bytes(chance.randbytes(file.stat().st_size))
    return str(path)


def take_anothers(path: Path, chance: random.Random) -> str:
    shutil.rmtree(path)
    other = written(path.parents[1] / f"other-{chance.random()}", 2, identity="another")
    shutil.move(other.directory / "00000002", path)
    return str(path)


DAMAGES: tuple[Damage, ...] = (
    flip, truncate, empty, lengthen, lose, exchange, misname, replace_by_noise, take_anothers,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage
) -> None:
    whole = written(tmp_path / "whole", 1, 2)
    for seed in range(80):
        run = tmp_path / "run"
        shutil.copytree(whole.directory, run / "checkpoints")
        where = damage(run / "checkpoints" / "00000002", random.Random(seed))
        caplog.clear()
        latest = Checkpoints(run, RUN).latest()
        assert latest is not None and latest.place == Place(1), (seed, caplog.text)
        assert torch.equal(latest.part("model")["weight"], state(1)["model"]["weight"])
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and where in record.getMessage()
        shutil.rmtree(run)


def test_where_all_are_damaged_nothing_is_loaded(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)
    for path in checkpoints.paths():
        (path / TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole .*run\.overwrite=true"):
        checkpoints.latest()


@pytest.mark.parametrize("moment", ["moved aside", "put in place"])
def test_what_a_kill_left_half_renamed_is_put_right(tmp_path: Path, moment: str) -> None:
    old, new = tmp_path / "final", tmp_path / ".final-0a1b2c3d.partial"
    for path, text in ((old, "old"), (new, "new")):
        path.mkdir()
        (path / "weights").write_text(text)
    old.rename(tmp_path / ".final-9a8b7c6d.previous")
    if moment == "put in place":
        new.rename(old)
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    expected = "old" if moment == "moved aside" else "new"
    assert (tmp_path / "final" / "weights").read_text() == expected


def test_half_written_and_half_removed_ones_are_cleared_away(tmp_path: Path) -> None:
    checkpoints = written(tmp_path, 1, 2)
    for name in (".00000003-0a1b2c3d.partial", ".00000001.removed"):
        shutil.copytree(checkpoints.directory / "00000002", checkpoints.directory / name)
    latest = checkpoints.latest()
    assert latest is not None and latest.place == Place(2)
    tidy(checkpoints.directory)
    names = sorted(path.name for path in checkpoints.directory.iterdir())
    assert names == ["00000001", "00000002"]
