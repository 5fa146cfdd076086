"""The sandbox's walls, each alone; machines that lack some; and work without root."""

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
from helpers.external import Escape, new_world, run_sealed
from helpers.sandbox_escapes import ESCAPES

from trivium.errors import ConfigurationError
from trivium.rewards.sandbox import host
from trivium.rewards.sandbox.host import Sandbox, isolation_gaps, require_isolation
from trivium.rewards.sandbox.isolation import filter_program, machine
from trivium.rewards.sandbox.syscalls import MACHINES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are sealed on Linux only")
REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
# Which isolation is open with which walls, where the machine permits them all.
OPEN = {
    ("landlock", "seccomp", "namespaces"): (),
    ("landlock", "seccomp"): (),
    ("seccomp", "namespaces"): ("files",),
    ("landlock", "namespaces"): ("processes",),
    ("landlock",): ("network", "processes"),
    ("seccomp",): ("files",),
    (): ("files", "network", "processes"),
}


def called(name: str) -> Escape:
    return next(escape for escape in ESCAPES if escape.name == name)


@pytest.fixture
def world(tmp_path):
    with new_world(tmp_path / "home") as world:
        yield world


# --- Each wall alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("walls", "escape"),
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
def test_one_wall_alone_stops_what_it_is_there_for(walls, escape, world):
    with Sandbox(walls) as place:
        needs_version = {"TCP to loopback": 4, "abstract Unix socket": 6}.get(escape, 6)
        if walls == ("landlock",) and place.walls["landlock"] < needs_version:
            pytest.skip("this kernel's Landlock covers files only")
        if walls == ("namespaces",) and not place.walls["namespaces"]:
            pytest.skip("this machine permits no namespaces")
        outcome = run_sealed(called(escape), world, place)
        assert not called(escape).happened(world, outcome)


def test_a_file_that_may_be_read_cannot_be_emptied_where_landlock_forgets_to_forbid_it(world):
    empty = f"os.open({str(world.home / 'file')!r}, os.O_RDONLY | os.O_TRUNC)"
    with Sandbox(("seccomp",)) as place:
        outcome = place.run(f"import os\n{empty}")
    assert "PermissionError" in outcome.error and not world.changed()
    subprocess.run([sys.executable, "-c", f"import os; {empty}"], check=True)
    assert world.changed()


def test_what_a_program_starts_is_ended_even_where_no_wall_keeps_it_from_starting(world):
    source = world.prelude() + called("a daemon that outlives the program").source
    with Sandbox(()) as place:
        assert place.run(source).error == ""
        time.sleep(0.4)
        assert not world.written()


def test_the_filter_refuses_every_call_it_does_not_name():
    for numbers in MACHINES.values():
        program = filter_program(numbers, own=7)
        assert all(
            len(program) > i + 1 + max(jt, jf)
            for i, (op, jt, jf, _) in enumerate(program)
            if op & 7 == 5
        )
        allowed = {n for n in range(1024) if _verdict(program, numbers.audit, n, (0,) * 6)}
        assert allowed >= set(numbers.free.values())
        conditional = {numbers.number[name] for name in ("openat", "fcntl", "prlimit64")}
        assert allowed - set(numbers.free.values()) == conditional
        assert _verdict(program, numbers.audit ^ 1, numbers.free["read"], (0,) * 6) is False


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
def test_the_filter_looks_at_arguments(name, arguments, allowed):
    for numbers in MACHINES.values():
        program = filter_program(numbers, own=7)
        given = (*arguments, *[0] * 6)[:6]
        assert _verdict(program, numbers.audit, numbers.number[name], given) is allowed


def _verdict(program, audit, number, arguments):
    """Interpret a filter, as the kernel's packet-filter machine does; True where it allows."""
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


@pytest.mark.parametrize(("walls", "missing"), OPEN.items())
def test_isolation_is_measured_by_breaking_out(walls, missing):
    assert isolation_gaps(walls) == missing


@pytest.mark.parametrize(
    ("walls", "missing"),
    [
        ((), "files, network, processes"),
        (("landlock",), "network, processes"),
        (("seccomp",), "files"),
    ],
)
def test_a_machine_that_cannot_isolate_is_refused_unless_that_is_accepted(walls, missing):
    with pytest.raises(ConfigurationError) as caught:
        require_isolation((), walls)
    message = str(caught.value)
    assert f"accept_missing: [{missing}]" in message
    assert all(f"isolation of {way} needs" in message for way in missing.split(", "))
    require_isolation(tuple(missing.split(", ")), walls)
    if ", " in missing:
        with pytest.raises(ConfigurationError):
            require_isolation(("files",), walls)


@pytest.mark.parametrize(
    ("refused", "missing", "walls"),
    [
        ("unshare", [], {"namespaces": False, "seccomp": True}),
        ("landlock_create_ruleset", ["files"], {"landlock": 0, "seccomp": True}),
        ("seccomp", ["processes"], {"seccomp": False, "namespaces": True}),
    ],
)
def test_what_a_container_refuses_is_noticed(refused, missing, walls):
    """A container's own filter refuses a call, as those of Docker and of Kubernetes do."""
    numbers = {"unshare": {"x86_64": 272, "aarch64": 97}[platform.machine()], **machine().number}
    script = (
        "import json\nfrom trivium.rewards.sandbox import host\n"
        "from trivium.rewards.sandbox import isolation\n"
        "allow, refuse = (6, 0, 0, 0x7FFF0000), (6, 0, 0, 0x50001)\n"
        "isolation._prctl(38, 1)\n"
        f"isolation.install([(0x20, 0, 0, 0), (0x15, 0, 1, {numbers[refused]}), refuse, allow])\n"
        "with host.Sandbox() as place:\n"
        "    print(json.dumps([host.isolation_gaps(), place.walls]))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found, built = json.loads(result.stdout)
    if refused != "seccomp" or built["namespaces"]:
        assert found == missing
    assert {name: built[name] for name in walls} == walls


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused(monkeypatch, system):
    monkeypatch.setattr(host.sys, "platform", system)
    isolation_gaps.cache_clear()
    with pytest.raises(ConfigurationError, match=f"needs Linux, and this is {system}"):
        require_isolation(("files", "network", "processes"))
    isolation_gaps.cache_clear()


def test_a_sandbox_that_runs_nothing_is_a_configuration_error(monkeypatch):
    monkeypatch.setattr(host, "_START", "raise SystemExit('no memfd')")
    isolation_gaps.cache_clear()
    with pytest.raises(ConfigurationError, match="no program can be run in the sandbox here"):
        require_isolation()
    isolation_gaps.cache_clear()


# --- Without root --------------------------------------------------------------------------------


def _reachable_python() -> str | None:
    """Return an interpreter that every user may run, as the one of a home folder is not."""
    for candidate in (sys.executable, "/usr/bin/python3"):
        check = "import sys; print(sys.version_info >= (3, 11))"
        try:
            found = subprocess.run(
                [candidate, "-c", check], user=NOBODY, capture_output=True, cwd="/", check=False
            )
        except OSError:
            continue
        if found.stdout == b"True\n":
            return candidate
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="every other test runs without root already")
def test_everything_holds_without_root():
    python = _reachable_python()
    if python is None:
        pytest.skip("no interpreter that an ordinary user may run")
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
            "from pathlib import Path\nfrom helpers.sandbox_escapes import *\nfrom helpers.external import *\nbad = []\n"
            "with Sandbox() as place:\n"
            "    for e in ESCAPES:\n"
            "        with tempfile.TemporaryDirectory() as f, new_world(Path(f, 'home')) as w:\n"
            "            o = run_sealed(e, w, place)\n"
            "            if e.happened(w, o): bad.append(e.name)\n"
            "    ways = [(w, host.isolation_gaps(tuple(w))) for w in json.loads(sys.argv[2])]\n"
            "    print(json.dumps([os.getuid(), ways, place.walls, bad]))\n"
        )
        result = subprocess.run(
            [python, "-c", script, folder, json.dumps(list(OPEN))],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    user, ways, walls, escaped = json.loads(result.stdout)
    assert (user, escaped) == (NOBODY, [])
    assert {tuple(tried): tuple(missing) for tried, missing in ways} == OPEN
    assert walls["landlock"] >= 1 and walls["seccomp"]
