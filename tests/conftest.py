"""Fixtures that every test file may use."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from trivium.models.cpu.linear import matmul_backend

# One thread: sums are then added in one order, and small tensors gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The same examples in every run; `--hypothesis-profile=search` draws new ones.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("reproducible")

_CACHES = count()

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _cache_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test finds what another, or the user, kept; the directory is made when it is written."""
    place = tmp_path_factory.getbasetemp() / f"cache-{next(_CACHES)}"
    monkeypatch.setenv("TRIVIUM_CACHE", str(place))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real checkpoints and data beside the repository; skips where there is none."""
    for candidate in (REPOSITORY.parent / "shared", REPOSITORY / "shared"):
        if (candidate / "checkpoints").is_dir() and (candidate / "datasets").is_dir():
            return candidate
    pytest.skip("no shared/ folder with real checkpoints and data beside the repository")


@pytest.fixture(params=["onednn", "torch"])
def each_product(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to multiply float32 matrices, whichever is faster here."""
    before = matmul_backend.name
    matmul_backend.use(request.param)
    yield
    matmul_backend.use(before)
