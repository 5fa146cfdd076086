"""Operation counts of fixed workloads have not risen (``benchmarks/operations.py``)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.fast_path
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "operations.py"


@pytest.fixture(scope="module")
def operations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operations", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_workload_needs_more_operations_than_recorded(operations: ModuleType) -> None:
    recorded = json.loads(operations.RECORDED.read_text())
    measured = operations.measure()
    assert measured.keys() == recorded.keys()
    assert operations.faults(measured, recorded) == []


def test_counts_outside_the_allowed_range_are_faults(operations: ModuleType) -> None:
    recorded = {"work": {"calls": 1000, "written": 10_000, "flops": 10_000}}
    for kind, count in (("calls", 1021), ("written", 10_201), ("flops", 10_300), ("flops", 8_900)):
        (fault,) = operations.faults({"work": recorded["work"] | {kind: count}}, recorded)
        assert fault.startswith(f"work: {count:,} {kind}")
    assert operations.faults({"other work": {"calls": 1}}, recorded)


def test_views_count_as_nothing_and_matrix_products_are_counted(operations: ModuleType) -> None:
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with operations.Counter() as counter:
        a.t().view(4, 3)[1:]
        a @ b
    assert counter.counts == {"calls": 1, "written": 15, "flops": 2 * 3 * 4 * 5}
