"""Fixtures and settings for all tests."""

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.fast_path import FAST_PATH, MODELS
from hypothesis import settings

from trivium.models.cpu.linear import matmul_backend

# One thread keeps the order of sums fixed, and small tensors are no faster with more threads.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Every run uses the same examples; `--hypothesis-profile=search` draws new ones.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("reproducible")

_CACHES = count()

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _separate_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give each test its own cache directory, separate from other tests and the user's."""
    path = tmp_path_factory.getbasetemp() / f"cache-{next(_CACHES)}"
    monkeypatch.setenv("TRIVIUM_CACHE", str(path))


@pytest.fixture(autouse=True)
def _fast_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build models with the fast path that TRIVIUM_FAST_PATH names, unless a test is about it."""
    fast_path = "auto" if request.node.get_closest_marker("fast_path") else FAST_PATH
    for model in MODELS:
        monkeypatch.setitem(model.__init__.__kwdefaults__, "fast_path", fast_path)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Return the folder of real checkpoints and data beside the repository; skip without one."""
    for candidate in (REPOSITORY.parent / "shared", REPOSITORY / "shared"):
        if (candidate / "checkpoints").is_dir() and (candidate / "datasets").is_dir():
            return candidate
    pytest.skip("no shared/ folder with real checkpoints and data beside the repository")


@pytest.fixture(params=["onednn", "torch"])
def each_product(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the test with each backend for float32 matrix products, whichever is faster here."""
    previous = matmul_backend.name
    matmul_backend.use(request.param)
    yield
    matmul_backend.use(previous)
