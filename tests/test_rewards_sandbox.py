"""The sandbox: what programs try against it, each of its walls alone, and where it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from escapes import ESCAPES, SECRET, Escape, new_world, run_plainly, run_sealed, shown

from trivium.errors import ConfigurationError
from trivium.rewards import sandbox
from trivium.rewards.sandbox import Limits, Sandbox, open_ways, require_isolation
from trivium.rewards.sealed.seal import filter_program
from trivium.rewards.sealed.syscalls import MACHINES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are sealed on Linux only")
REPOSITORY = Path(__file__).resolve().parent.parent
NOBODY = 65534


def called(name: str) -> Escape:
    return next(escape for escape in ESCAPES if escape.name == name)


@pytest.fixture(scope="module", params=["every wall", "no namespaces"])
def place(request):
    walls = sandbox.WALLS if request.param == "every wall" else ("landlock", "seccomp")
    with Sandbox(walls) as place:
        yield place


@pytest.fixture
def world(tmp_path):
    with new_world(tmp_path / "home") as world:
        yield world


# --- Escapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("escape", ESCAPES, ids=[escape.name for escape in ESCAPES])
def test_an_escape_does_not_happen_and_is_refused_as_expected(escape, place, world):
    outcome = run_sealed(escape, world, place)
    assert not escape.happened(world, outcome)
    assert re.search(escape.expected, shown(outcome)), shown(outcome)
    assert _running(place._process.pid) == [place._process.pid]
    assert os.listdir(place._folder.name) == []


@pytest.mark.parametrize(
    "escape", [e for e in ESCAPES if e.control], ids=[e.name for e in ESCAPES if e.control]
)
def test_the_same_program_escapes_where_nothing_seals_it(escape, world):
    outcome = run_plainly(escape, world)
    assert escape.happened(world, outcome), outcome


def test_a_process_left_behind_would_be_seen():
    with subprocess.Popen(["sleep", "9"], start_new_session=True) as left:
        assert _running(left.pid) == [left.pid]
        left.kill()
    assert _running(left.pid) == []


def _running(session: int) -> list[int]:
    return [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(p) == session]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_there_are_at_least_25_escapes_with_names_of_their_own():
    assert len({escape.name for escape in ESCAPES}) == len(ESCAPES) >= 25


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


# --- Ordinary programs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print(input()[::-1]); exit()", "olleh"),
        ("import sys; print(sys.stdin.read().upper())", "HELLO\n"),
        ("import json, re, math, decimal, datetime, sqlite3, hashlib, ssl; print(math.pi)", "3.14"),
        ("import threading; threading.Thread(target=lambda: print('late')).start()", "late"),
        ("open('f', 'w').write('x'); import os; print(os.listdir('.'))", "['f']"),
        ("import tempfile\nwith tempfile.TemporaryFile(dir='.') as f: print(f.write(b'ab'))", "2"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(1))",
            "A(x=1)",
        ),
        ("import zoneinfo, ctypes; print(ctypes.sizeof(ctypes.c_int))", "4"),
        ("import concurrent.futures as c\nprint(*c.ThreadPoolExecutor(2).map(abs, [-1]))", "1"),
        ("import asyncio, time\nprint(time.sleep(0.01))", "None"),
        ("import os, signal; signal.alarm(1); print(os.getpid() > 1, os.cpu_count() > 0)", "True"),
        ("print('é' * 3, '\\udce4'.encode('utf-8', 'replace'))", "ééé"),
    ],
)
def test_ordinary_programs_run(place, source, expected):
    outcome = place.run(source, Limits(seconds=3, wall=8), stdin="hello\n")
    assert (outcome.status, outcome.reason) == (0, None), outcome
    assert expected in outcome.output.decode()


def test_an_exit_status_is_the_program_s(place):
    for source, status in (("exit(3)", 3), ("1/0", 1), ("exit('no')", 1), ("exit(None)", 0)):
        assert place.run(source).status == status


def test_a_program_finds_nothing_of_the_one_before(place):
    place.run("import builtins, sys\nbuiltins.len = 3\nsys.x = 1\nopen('f', 'w')\nSECRET = 'a'*50")
    source = "import os, sys; print(len([]), hasattr(sys, 'x'), os.listdir('.'))"
    assert place.run(source).output == b"0 False []\n"


def test_the_supervisor_s_memory_holds_no_program_no_input_and_no_output(place):
    word = "needle-" + os.urandom(8).hex()
    place.run(f"print(input() + {word!r})", stdin="input-" + word)
    scan = (
        "import sys, ctypes\nhead, tail = sys.stdin.read().split()\n"
        "import gc\nfound = sum((head + tail) in o for o in gc.get_objects() if type(o) is str)\n"
        "print(found)"
    )
    assert place.run(scan, stdin=f"{word[:9]} {word[9:]}").output == b"0\n"
    assert word.encode() not in _memory(place._process.pid)


def _memory(pid: int) -> bytes:
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            if "rw" in line and "[v" not in line:
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)


# --- Ends ----------------------------------------------------------------------------------------


def test_closing_removes_the_folder_and_ends_what_runs():
    place = Sandbox()
    folder, pid = Path(place._folder.name), place._process.pid
    place.start({"do": "run", "source": "while True: pass"}, Limits(seconds=60, wall=60))
    time.sleep(0.1)
    place.close()
    assert not folder.exists() and not Path(f"/proc/{pid}").exists()


def test_programs_end_when_their_caller_is_killed(tmp_path):
    script = (
        "import sys\nfrom trivium.rewards.sandbox import *\ns = Sandbox()\n"
        "s.start({'do': 'run', 'source': 'while True: pass'}, Limits(seconds=60, wall=60))\n"
        "print(s._process.pid, s._folder.name, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        supervisor, folder = caller.stdout.readline().split()
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    until = time.monotonic() + 5
    while Path(f"/proc/{supervisor}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert _running(int(supervisor)) == []
    assert not Path(folder).exists()


def test_a_killed_supervisor_is_an_error_and_no_verdict():
    with Sandbox() as place:
        run = place.start({"do": "run", "source": "while True: pass"}, Limits(seconds=60, wall=60))
        place._process.kill()
        with pytest.raises(RuntimeError, match="supervisor process has ended"):
            run.wait()


def test_a_sandbox_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not start: it ended at once"):
        Sandbox()


# --- Refusals ------------------------------------------------------------------------------------


def test_isolation_holds_here_and_is_measured_by_breaking_out():
    assert open_ways() == ()
    assert open_ways(()) == ("files", "network", "processes")
    assert open_ways(("landlock", "seccomp")) == ()


@pytest.mark.parametrize(
    ("walls", "missing"),
    [((), "files, network, processes"), (("landlock",), "processes"), (("seccomp",), "files")],
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


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused(monkeypatch, platform):
    monkeypatch.setattr(sandbox.sys, "platform", platform)
    open_ways.cache_clear()
    with pytest.raises(ConfigurationError, match=f"needs Linux, and this is {platform}"):
        require_isolation(("files", "network", "processes"))
    open_ways.cache_clear()


def test_a_sandbox_that_runs_nothing_is_a_configuration_error(monkeypatch):
    monkeypatch.setattr(sandbox, "_START", "raise SystemExit('no memfd')")
    open_ways.cache_clear()
    with pytest.raises(ConfigurationError, match="no program can be run in the sandbox here"):
        require_isolation()
    open_ways.cache_clear()


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
            "from pathlib import Path\nfrom escapes import *\nbad = []\n"
            "with Sandbox() as place:\n"
            "    for e in ESCAPES:\n"
            "        with tempfile.TemporaryDirectory() as f, new_world(Path(f, 'home')) as w:\n"
            "            o = run_sealed(e, w, place)\n"
            "            if e.happened(w, o): bad.append(e.name)\n"
            "    print(json.dumps([os.getuid(), sandbox.open_ways(), place.walls, bad]))\n"
        )
        result = subprocess.run(
            [python, "-c", script, folder],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            env={"PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stderr
    user, missing, walls, escaped = json.loads(result.stdout)
    assert (user, missing, escaped) == (NOBODY, [], [])
    assert walls["landlock"] >= 1 and walls["seccomp"]


def test_the_root_of_a_program_has_no_rights(place):
    source = "print(open('/proc/self/status').read())"
    with Sandbox(("seccomp",)) as one:
        status = dict(line.split(":\t", 1) for line in one.run(source).output.decode().splitlines())
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_the_secret_of_the_world_is_no_part_of_a_program(world):
    assert SECRET not in world.prelude()
