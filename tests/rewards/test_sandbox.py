"""The sandbox: what programs try against it, ordinary programs, and how everything ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.external import SECRET, new_world, run_plainly, run_sealed, shown
from helpers.sandbox_escapes import ESCAPES

from trivium.rewards.sandbox import host
from trivium.rewards.sandbox.host import Limits, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are sealed on Linux only")


@pytest.fixture(scope="module", params=["every wall", "no namespaces"])
def place(request):
    walls = host.LAYERS if request.param == "every wall" else ("landlock", "seccomp")
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
    assert word.encode() not in _memory(place._process.pid)
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


def test_files_that_come_and_go_do_not_disturb_the_supervisor(place):
    source = (
        "import os, time\nuntil = time.monotonic() + 0.5\nwhile time.monotonic() < until:\n"
        "    for n in range(20): open(str(n), 'w').close()\n"
        "    for n in range(20): os.unlink(str(n))\nprint('done')"
    )
    for _ in range(3):
        assert place.run(source).output == b"done\n"


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
        "import sys\nfrom trivium.rewards.sandbox.host import *\ns = Sandbox()\n"
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


@pytest.mark.parametrize(("parent_is_there", "status"), [(True, 0), (False, 1)])
def test_a_program_whose_supervisor_ended_before_it_was_sealed_ends_too(
    parent_is_there: bool, status: int
) -> None:
    """The signal of a parent's death comes only to who asked for it before."""
    code = (
        "import os; from trivium.rewards.sandbox import isolation\n"
        f"isolation.die_with(os.getppid() if {parent_is_there} else 1 << 30)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == status


def test_a_killed_supervisor_is_an_error_and_no_verdict():
    with Sandbox() as place:
        run = place.start({"do": "run", "source": "while True: pass"}, Limits(seconds=60, wall=60))
        until = time.monotonic() + 5
        while len(_running(place._process.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(_running(place._process.pid)) == 2
        place._process.kill()
        with pytest.raises(RuntimeError, match="supervisor process has ended"):
            run.wait()
        with pytest.raises(RuntimeError, match="supervisor process has ended"):
            place.run("print(1)")
        place._process.wait()
        until = time.monotonic() + 5
        while _running(place._process.pid) and time.monotonic() < until:
            time.sleep(0.02)
        assert _running(place._process.pid) == []


def test_a_sandbox_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(host.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="could not start: it ended at once"):
        Sandbox()


def test_a_program_holds_no_open_file_but_its_own(place):
    source = (
        "import os, stat\nfor n in range(4096):\n    try: s = os.fstat(n).st_mode\n"
        "    except OSError: continue\n    print(n, stat.S_ISREG(s), stat.S_ISSOCK(s), flush=True)"
    )
    files = b"0 True False\n1 True False\n2 True False\n"
    assert place.run(source).output == files
    run = place.start({"do": "answer", "source": source}, Limits(seconds=2, wall=4), talk=True)
    assert run.channel is not None
    run.channel.shutdown(socket.SHUT_WR)
    assert run.wait().output == files + b"3 False True\n"


def test_the_root_of_a_program_has_no_rights(place):
    source = "print(open('/proc/self/status').read())"
    with Sandbox(("seccomp",)) as one:
        lines = one.run(source).output.decode().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_the_secret_of_the_world_is_no_part_of_a_program(world):
    assert SECRET not in world.prelude()
