"""The package's imports: they point down, form no circle, and keep fast paths guests."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType

import pytest
from helpers.stoppable_runs import grpo_process_config
from helpers.tiny_models import World

import trivium
from trivium.algorithms import grpo
from trivium.algorithms.grpo_config import GRPOConfig
from trivium.config.base import Configuration

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parent / "trivium"
LAYERS = [
    ["errors"],
    ["rank_status"],
    ["distributed"],
    ["config", "serialization", "numerics", "maths"],
    ["data"],
    ["hf"],
    ["models"],
    ["rewards"],
    ["rollout"],
    ["evaluation", "monitoring"],
    ["runs"],
    ["training"],
    ["algorithms"],
    ["memory", "report", "tasks"],
    ["commands"],
    ["preflight"],
    ["jobs"],
    ["pipelines"],
    ["compare"],
    ["demo"],
    ["cli"],
    ["__init__", "__main__"],
]
"""Packages and modules, the lowest first. Those of one layer do not import each other."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
CPU = "trivium.models.cpu"
INSTALLS_CPU = {"trivium.models.fast_path"}
"""The module that installs the CPU's fast path."""


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path, *, at_import_time: bool = False) -> set[str]:
    """The modules of the package that a file imports, those in functions and for types included."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if at_import_time else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            own = module_of(path).rpartition(".")[0]
            base = f"{own}.{node.module}" if node.module else own
            found |= {f"{base}.{a.name}" for a in node.names} | {base}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name in MODULES and name != module_of(path)}


def layer_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_package_has_a_layer() -> None:
    assert {layer_of(module) for module in MODULES} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    own = layer_of(module)
    upward = [
        name
        for name in imports(MODULES[module])
        if name != "trivium" and layer_of(name) != own and LEVEL[layer_of(name)] >= LEVEL[own]
    ]
    assert upward == []


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    edges = {
        module: {name for name in imports(path) if MODULES[name].name != "__init__.py"}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    finished: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " → ".join([*chain[chain.index(module) :], module])
        if module not in finished:
            for name in sorted(edges.get(module, ())):
                visit(name, (*chain, module))
            finished.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_algorithms_do_not_import_each_other() -> None:
    names = ("sft", "reward_model", "ppo", "dpo", "grpo")
    loops = {f"trivium.algorithms.{name}" for name in names}
    for loop in loops:
        assert not imports(MODULES[loop]) & loops


def test_the_equations_import_torch_and_nothing_else() -> None:
    for module, path in MODULES.items():
        if layer_of(module) == "maths":
            assert all(name.startswith("trivium.maths") for name in imports(path))


def test_only_the_installing_modules_import_the_cpu_path() -> None:
    importers = {
        module
        for module, path in MODULES.items()
        if not module.startswith(CPU) and any(n.startswith(CPU) for n in imports(path))
    }
    assert importers <= INSTALLS_CPU


def test_functions_and_files_are_short() -> None:
    long_functions = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert long_functions == []
    lengths = {
        module: len(path.read_text(encoding="utf-8").splitlines())
        for module, path in MODULES.items()
    }
    assert {m: n for m, n in lengths.items() if n > 400} == {}
    loops = ("sft", "reward_model", "ppo", "dpo", "grpo")
    assert {
        n: lengths[f"trivium.algorithms.{n}"]
        for n in loops
        if lengths[f"trivium.algorithms.{n}"] > 320
    } == {}
    reference_path = [
        n for m, n in lengths.items() if m.startswith("trivium.models") and not m.startswith(CPU)
    ]
    assert sum(reference_path) < 2100, "the reference path of models/ should shrink, not grow"


def test_the_whole_configuration_of_grpo_enters_few_files(tmp_path: Path) -> None:
    """Most functions take the section or the values that they need."""
    world = World(tmp_path / "world")
    whole: dict[str, set[str]] = defaultdict(set)
    sections: dict[str, set[str]] = defaultdict(set)
    root = str(Path(trivium.__file__).parent)

    def note_arguments(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(root):
            return
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            value = frame.f_locals.get(name)
            if isinstance(value, Configuration) and name != "self":
                entered = whole if isinstance(value, GRPOConfig) else sections
                entered[code.co_filename.removeprefix(root)].add(code.co_qualname)

    config = grpo_process_config(world, tmp_path / "run")
    before = sys.getprofile()
    sys.setprofile(note_arguments)
    try:
        grpo.train(config)
    finally:
        sys.setprofile(before)
    assert "/algorithms/grpo.py" in whole, "the trace saw nothing"
    assert len(whole) <= 10, dict(whole)
    assert len(whole | sections) <= 30, dict(whole | sections)


def test_no_test_measures_time() -> None:
    """A busy machine must not fail a test: they wait with ``helpers.waiting`` and count calls."""
    clocks = {"monotonic", "perf_counter", "process_time", "thread_time"}
    readers = [
        f"{path.relative_to(TESTS)}:{node.lineno}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "time"
        and node.attr in clocks
    ]
    assert readers == []
