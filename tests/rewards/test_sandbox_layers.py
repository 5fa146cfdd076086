"""The sandbox's isolation layers: each alone, on machines that lack some, and without root."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from helpers.external import Escape, new_world, run_in_sandbox
from helpers.sandbox_escapes import ESCAPES

from trivium.errors import ConfigurationError
from trivium.rewards.sandbox import host
from trivium.rewards.sandbox.host import Sandbox, isolation_gaps, require_isolation
from trivium.rewards.sandbox.isolation import filter_program, machine
from trivium.rewards.sandbox.syscalls import MACHINES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
# Missing isolation for each set of layers, if the machine permits all layers.
GAPS_BY_LAYERS = {
    ("landlock", "seccomp", "namespaces"): (),
    ("landlock", "seccomp"): (),
    ("seccomp", "namespaces"): ("files",),
    ("landlock", "namespaces"): ("processes",),
    ("landlock",): ("network", "processes"),
    ("seccomp",): ("files",),
    (): ("files", "network", "processes"),
}


def escape_named(name: str) -> Escape:
    return next(escape for escape in ESCAPES if escape.name == name)


@pytest.fixture
def world(tmp_path):
    with new_world(tmp_path / "home") as world:
        yield world


# --- Single layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "escape"),
    [
        (("seccomp",), "TCP to loopback"),
        (("seccomp",), "UDP to loopback"),
        (("namespaces",), "TCP to loopback"),
        (("namespaces",), "UDP to loopback"),
        (("namespaces",), "abstract Unix socket"),
        (("landlock",), "TCP to loopback"),
        (("landlock",), "abstract Unix socket"),
        (("landlock",), "a signal to the caller"),
        (("landlock",), "a signal by the owner of a pipe (F_SETOWN)"),
        (("landlock",), "a file in the home folder"),
        (("landlock",), "a file outside"),
        (("landlock",), "emptying a file"),
        (("landlock",), "a symbolic link to the outside"),
        (("landlock",), "a hard link to a file outside"),
        (("landlock",), "a shell"),
        (("seccomp",), "a process of its own"),
        (("seccomp",), "another program in its place"),
        (("seccomp",), "a signal to the caller"),
        (("seccomp",), "a signal by the owner of a pipe (F_SETOWN)"),
        (("seccomp",), "chmod"),
        (("seccomp",), "utime"),
    ],
)
def test_single_layer_blocks_its_escapes(layers, escape, world):
    with Sandbox(layers) as sandbox:
        needs_version = {"TCP to loopback": 4, "abstract Unix socket": 6}.get(escape, 6)
        if layers == ("landlock",) and sandbox.layers["landlock"] < needs_version:
            pytest.skip("this kernel's Landlock covers files only")
        if layers == ("namespaces",) and not sandbox.layers["namespaces"]:
            pytest.skip("this machine permits no namespaces")
        outcome = run_in_sandbox(escape_named(escape), world, sandbox)
        assert not escape_named(escape).succeeded(world, outcome)


def test_readable_file_cannot_be_truncated_without_landlock_support(world):
    empty = f"os.open({str(world.home / 'file')!r}, os.O_RDONLY | os.O_TRUNC)"
    with Sandbox(("seccomp",)) as sandbox:
        outcome = sandbox.run(f"import os\n{empty}")
    assert "PermissionError" in outcome.error and not world.has_changed_file()
    subprocess.run([sys.executable, "-c", f"import os; {empty}"], check=True)
    assert world.has_changed_file()


def test_child_processes_are_killed_even_without_any_layer(world):
    source = world.prelude() + escape_named("a daemon that outlives the program").source
    with Sandbox(()) as sandbox:
        assert sandbox.run(source).error == ""
        time.sleep(0.4)
        assert not world.has_written_file()


def test_filter_refuses_every_call_that_is_not_listed():
    for numbers in MACHINES.values():
        program = filter_program(numbers, own_pid=7)
        assert all(
            len(program) > i + 1 + max(jt, jf)
            for i, (op, jt, jf, _) in enumerate(program)
            if op & 7 == 5
        )
        allowed = {n for n in range(1024) if _verdict(program, numbers.audit, n, (0,) * 6)}
        assert allowed >= set(numbers.unconditional.values())
        conditional = {numbers.numbers[name] for name in ("openat", "fcntl", "prlimit64")}
        assert allowed - set(numbers.unconditional.values()) == conditional
        assert (
            _verdict(program, numbers.audit ^ 1, numbers.unconditional["read"], (0,) * 6) is False
        )


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("clone", (0x10000 | 0x100,), True),
        ("clone", (0x100 | 17,), False),
        ("kill", (7, 9), True),
        ("kill", (8, 9), False),
        ("kill", (0, 9), False),
        ("kill", (0xFFFFFFFF, 9), False),
        ("tgkill", (7, 1, 9), True),
        ("tgkill", (8, 1, 9), False),
        ("fcntl", (5, 8, 1), False),
        ("fcntl", (5, 10, 9), False),
        ("ioctl", (0, 0x5401), True),
        ("ioctl", (0, 0x5412), False),
        ("prctl", (15,), True),
        ("prctl", (4, 1), False),
        ("prlimit64", (7,), True),
        ("prlimit64", (8,), False),
        ("openat", (0, 0, os.O_RDONLY | os.O_TRUNC), False),
        ("openat", (0, 0, os.O_WRONLY | os.O_TRUNC), True),
    ],
)
def test_filter_checks_arguments(name, arguments, allowed):
    for numbers in MACHINES.values():
        program = filter_program(numbers, own_pid=7)
        padded_arguments = (*arguments, *[0] * 6)[:6]
        assert _verdict(program, numbers.audit, numbers.numbers[name], padded_arguments) is allowed


def _verdict(program, audit, number, arguments):
    """Interpret a filter like the kernel's BPF; return whether it allows the call."""
    data = {0: number, 4: audit, **{16 + 8 * i: a for i, a in enumerate(arguments)}}
    at, register = 0, 0
    while True:
        operation, if_true, if_false, value = program[at]
        at += 1
        if operation == 0x06:
            return value == 0x7FFF0000
        if operation == 0x20:
            register = data[value]
        else:
            holds = register == value if operation == 0x15 else bool(register & value)
            at += if_true if holds else if_false


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "missing"), GAPS_BY_LAYERS.items())
def test_isolation_gaps_match_the_layers(layers, missing):
    assert isolation_gaps(layers) == missing


@pytest.mark.parametrize(
    ("layers", "missing"),
    [
        ((), "files, network, processes"),
        (("landlock",), "network, processes"),
        (("seccomp",), "files"),
    ],
)
def test_missing_isolation_is_an_error_unless_accepted(layers, missing):
    with pytest.raises(ConfigurationError) as caught:
        require_isolation((), layers)
    message = str(caught.value)
    assert f"accept_missing: [{missing}]" in message
    assert all(f"isolation of {kind} needs" in message for kind in missing.split(", "))
    require_isolation(tuple(missing.split(", ")), layers)
    if ", " in missing:
        with pytest.raises(ConfigurationError):
            require_isolation(("files",), layers)


@pytest.mark.parametrize(
    ("refused_call", "missing", "layers"),
    [
        ("unshare", [], {"namespaces": False, "seccomp": True}),
        ("landlock_create_ruleset", ["files"], {"landlock": 0, "seccomp": True}),
        ("seccomp", ["processes"], {"seccomp": False, "namespaces": True}),
    ],
)
def test_calls_refused_by_a_container_are_detected(refused_call, missing, layers):
    """A container's own filter refuses a call, as in Docker and Kubernetes."""
    numbers = {"unshare": {"x86_64": 272, "aarch64": 97}[platform.machine()], **machine().numbers}
    script = (
        "import json\nfrom trivium.rewards.sandbox import host\n"
        "from trivium.rewards.sandbox import isolation\n"
        "allow, refuse = (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50001)\n"
        "isolation._prctl(38, 1)\n"
        f"number = {numbers[refused_call]}\n"
        "isolation.install([(0x20, 0, 0, 0), (0x15, 0, 1, number), refuse, allow])\n"
        "with host.Sandbox() as sandbox:\n"
        "    print(json.dumps([host.isolation_gaps(), sandbox.layers]))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    gaps, layers_built = json.loads(result.stdout)
    if refused_call != "seccomp" or layers_built["namespaces"]:
        assert gaps == missing
    assert {name: layers_built[name] for name in layers} == layers


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_operating_systems_are_refused(monkeypatch, system):
    monkeypatch.setattr(host.sys, "platform", system)
    isolation_gaps.cache_clear()
    with pytest.raises(ConfigurationError, match=f"needs Linux, and this is {system}"):
        require_isolation(("files", "network", "processes"))
    isolation_gaps.cache_clear()


def test_sandbox_that_cannot_run_is_a_configuration_error(monkeypatch):
    monkeypatch.setattr(host, "_STARTUP_CODE", "raise SystemExit('no memfd')")
    isolation_gaps.cache_clear()
    with pytest.raises(ConfigurationError, match="no program can be run in the sandbox here"):
        require_isolation()
    isolation_gaps.cache_clear()


# --- Without root --------------------------------------------------------------------------------


def _reachable_python() -> str | None:
    """Return an interpreter that every user can run; one in a home folder may be inaccessible."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        check = "import sys; print(sys.version_info >= (3, 11))"
        try:
            result = subprocess.run(
                [candidate, "-c", check], user=NOBODY, capture_output=True, cwd="/", check=False
            )
        except OSError:
            continue
        if result.stdout == b"True\n":
            return candidate
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test runs without root already")
def test_isolation_holds_without_root():
    python = _reachable_python()
    if python is None:
        pytest.skip("no interpreter that an ordinary user can run")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for part in ("trivium/__init__.py", "trivium/errors.py", "trivium/rewards", "tests"):
            source, target = REPOSITORY / part, Path(folder, part)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, target)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        script = (
            "import json, sys, tempfile, os\nsys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']\n"
            "from pathlib import Path\nfrom helpers.sandbox_escapes import *\n"
            "from helpers.external import *\nbad = []\n"
            "with Sandbox() as sandbox:\n"
            "    for e in ESCAPES:\n"
            "        with tempfile.TemporaryDirectory() as f, new_world(Path(f, 'home')) as w:\n"
            "            o = run_in_sandbox(e, w, sandbox)\n"
            "            if e.succeeded(w, o): bad.append(e.name)\n"
            "    gaps = [(w, host.isolation_gaps(tuple(w))) for w in json.loads(sys.argv[2])]\n"
            "    print(json.dumps([os.getuid(), gaps, sandbox.layers, bad]))\n"
        )
        result = subprocess.run(
            [python, "-c", script, folder, json.dumps(list(GAPS_BY_LAYERS))],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    user, gaps, layers, escaped = json.loads(result.stdout)
    assert (user, escaped) == (NOBODY, [])
    assert {tuple(tried): tuple(missing) for tried, missing in gaps} == GAPS_BY_LAYERS
    assert layers["landlock"] >= 1 and layers["seccomp"]
