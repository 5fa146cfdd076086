"""The sandbox: attempts to escape, ordinary programs, and cleanup."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.external import (
    SECRET,
    describe_outcome,
    new_world,
    run_in_sandbox,
    run_without_sandbox,
)
from helpers.sandbox_escapes import ESCAPES
from helpers.waiting import eventually

from trivium.rewards.sandbox import host
from trivium.rewards.sandbox.host import Limits, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module", params=["all layers", "no namespaces"])
def sandbox(request):
    layers = host.LAYERS if request.param == "all layers" else ("landlock", "seccomp")
    with Sandbox(layers) as sandbox:
        yield sandbox


@pytest.fixture
def world(tmp_path):
    with new_world(tmp_path / "home") as world:
        yield world


# --- Escapes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("escape", ESCAPES, ids=[escape.name for escape in ESCAPES])
def test_escape_fails_with_the_expected_error(escape, sandbox, world):
    outcome = run_in_sandbox(escape, world, sandbox)
    assert not escape.succeeded(world, outcome)
    assert re.search(escape.expected, describe_outcome(outcome)), describe_outcome(outcome)
    assert _running(sandbox._process.pid) == [sandbox._process.pid]
    assert os.listdir(sandbox._folder.name) == []


@pytest.mark.parametrize(
    "escape", [e for e in ESCAPES if e.run_control], ids=[e.name for e in ESCAPES if e.run_control]
)
def test_same_program_escapes_without_a_sandbox(escape, world):
    outcome = run_without_sandbox(escape, world)
    assert escape.succeeded(world, outcome), outcome


def test_check_for_remaining_processes_detects_them():
    with subprocess.Popen(["sleep", "9"], start_new_session=True) as process:
        assert _running(process.pid) == [process.pid]
        process.kill()
    assert _running(process.pid) == []


def _running(session: int) -> list[int]:
    return [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if _session(p) == session]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def test_there_are_at_least_25_escapes_with_unique_names():
    assert len({escape.name for escape in ESCAPES}) == len(ESCAPES) >= 25


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
def test_ordinary_programs_run(sandbox, source, expected):
    outcome = sandbox.run(source, Limits(seconds=3, wall=8), stdin="hello\n")
    assert (outcome.status, outcome.reason) == (0, None), outcome
    assert expected in outcome.output.decode()


def test_exit_status_is_that_of_the_program(sandbox):
    for source, status in (("exit(3)", 3), ("1/0", 1), ("exit('no')", 1), ("exit(None)", 0)):
        assert sandbox.run(source).status == status


def test_program_sees_nothing_of_the_previous_program(sandbox):
    sandbox.run(
        "import builtins, sys\nbuiltins.len = 3\nsys.x = 1\nopen('f', 'w')\nSECRET = 'a'*50"
    )
    source = "import os, sys; print(len([]), hasattr(sys, 'x'), os.listdir('.'))"
    assert sandbox.run(source).output == b"0 False []\n"


def test_supervisor_memory_holds_no_program_input_or_output(sandbox):
    needle = "needle-" + os.urandom(8).hex()
    sandbox.run(f"print(input() + {needle!r})", stdin="input-" + needle)
    assert needle.encode() not in _memory(sandbox._process.pid)
    scan = (
        "import sys, ctypes\nhead, tail = sys.stdin.read().split()\n"
        "import gc\nfound = sum((head + tail) in o for o in gc.get_objects() if type(o) is str)\n"
        "print(found)"
    )
    assert sandbox.run(scan, stdin=f"{needle[:9]} {needle[9:]}").output == b"0\n"
    assert needle.encode() not in _memory(sandbox._process.pid)


def _memory(pid: int) -> bytes:
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            if "rw" in line and "[v" not in line:
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)


def test_supervisor_tolerates_files_that_appear_and_disappear(sandbox):
    source = (
        "import os, time\nuntil = time.monotonic() + 0.5\nwhile time.monotonic() < until:\n"
        "    for n in range(20): open(str(n), 'w').close()\n"
        "    for n in range(20): os.unlink(str(n))\nprint('done')"
    )
    for _ in range(3):
        assert sandbox.run(source).output == b"done\n"


_UNLINKED = """
import os
files, written = [], 0
for n in range(40):
    files.append(open(str(n), "wb", 0))
    os.unlink(str(n))
    try:
        written += files[-1].write(bytes(1 << 20))
    except OSError as error:
        print(error.strerror)
        break
print(written >> 20)
"""


def test_unlinked_files_count_towards_the_limit_of_all_files():
    """Without namespaces, only the number of open files bounds them."""
    with Sandbox() as sandbox:
        if not sandbox.layers["namespaces"]:
            pytest.skip("this machine permits no namespaces")
        for output in (1, 4, 2):
            found = sandbox.run(_UNLINKED, Limits(output=output))
            reason, size = found.output.decode().split("\n")[:2]
            assert (reason, int(size) <= 2 * output) == ("No space left on device", True)
            assert sandbox.run("open('f', 'wb').write(bytes(1 << 20))").status == 0
    assert not Path(sandbox._folder.name).exists()


# --- Cleanup -------------------------------------------------------------------------------------


def test_close_removes_the_folder_and_ends_running_programs():
    sandbox = Sandbox()
    folder, pid = Path(sandbox._folder.name), sandbox._process.pid
    sandbox.start({"mode": "run", "source": "while True: pass"}, Limits(seconds=60, wall=60))
    assert eventually(lambda: len(_running(pid)) == 2)
    sandbox.close()
    assert not folder.exists() and not Path(f"/proc/{pid}").exists()


def test_programs_end_when_their_caller_is_killed(tmp_path):
    script = (
        "import sys\nfrom trivium.rewards.sandbox.host import *\ns = Sandbox()\n"
        "s.start({'mode': 'run', 'source': 'while True: pass'}, Limits(seconds=60, wall=60))\n"
        "print(s._process.pid, s._folder.name, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    ) as caller:
        assert caller.stdout is not None
        supervisor, folder = caller.stdout.readline().split()
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    assert eventually(lambda: not Path(f"/proc/{supervisor}").exists())
    assert _running(int(supervisor)) == []
    assert not Path(folder).exists()


@pytest.mark.parametrize(("parent_exists", "status"), [(True, 0), (False, 1)])
def test_program_ends_if_its_supervisor_ended_before_isolation(
    parent_exists: bool, status: int
) -> None:
    """A process gets the signal of its parent's death only if it requested it before."""
    code = (
        "import os; from trivium.rewards.sandbox import isolation\n"
        f"isolation.die_with_parent(os.getppid() if {parent_exists} else 1 << 30)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status


def test_killed_supervisor_raises_an_error():
    with Sandbox() as sandbox:
        run = sandbox.start(
            {"mode": "run", "source": "while True: pass"}, Limits(seconds=60, wall=60)
        )
        assert eventually(lambda: len(_running(sandbox._process.pid)) == 2)
        sandbox._process.kill()
        with pytest.raises(RuntimeError, match="supervisor process has ended"):
            run.wait()
        with pytest.raises(RuntimeError, match="supervisor process has ended"):
            sandbox.run("print(1)")
        sandbox._process.wait()
        assert eventually(lambda: _running(sandbox._process.pid) == [])


def test_sandbox_that_cannot_start_reports_the_reason(monkeypatch):
    monkeypatch.setattr(host.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not start: it ended at once"):
        Sandbox()


def test_stopped_supervisor_does_not_hang(monkeypatch):
    monkeypatch.setattr(host, "_GRACE_SECONDS", 0.3)
    with Sandbox() as sandbox:
        os.kill(sandbox._process.pid, signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"did not answer within 0.5 s: was it stopped"):
            sandbox.run("print(1)", Limits(wall=0.2))
    assert not Path(sandbox._folder.name).exists()
    monkeypatch.setattr(host, "_START_SECONDS", 0.5)
    stops = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    monkeypatch.setattr(host, "_STARTUP_CODE", stops)
    with pytest.raises(RuntimeError, match=r"did not answer within 0.5 s: was it stopped"):
        Sandbox()


def test_program_has_only_its_own_open_files(sandbox):
    source = (
        "import os, stat\nfor n in range(4096):\n    try: s = os.fstat(n).st_mode\n"
        "    except OSError: continue\n    print(n, stat.S_ISREG(s), stat.S_ISSOCK(s), flush=True)"
    )
    files = b"0 True False\n1 True False\n2 True False\n"
    assert sandbox.run(source).output == files
    run = sandbox.start(
        {"mode": "serve", "source": source}, Limits(seconds=2, wall=4), with_channel=True
    )
    assert run.channel is not None
    run.channel.shutdown(socket.SHUT_WR)
    assert run.wait().output == files + b"3 False True\n"


def test_program_run_as_root_has_no_capabilities(sandbox):
    source = "print(open('/proc/self/status').read())"
    with Sandbox(("seccomp",)) as seccomp_only:
        lines = seccomp_only.run(source).output.decode().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_programs_do_not_contain_the_secret(world):
    assert SECRET not in world.prelude()
