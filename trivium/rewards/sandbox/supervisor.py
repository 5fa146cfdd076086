"""The process that starts sealed programs, watches their limits and cleans up after them.

It is told over a socket what limits to set, and gets the program as open files that only the
program's own process reads: so its memory, of which every program inherits a copy, never holds an
earlier program, a test or an output. It runs one program at a time and imports nothing of Trivium.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from typing import Any, NoReturn

from . import child, isolation

# What programs like to import: loaded once, every program finds it there.
_POPULAR = "bisect collections functools heapq itertools math random re string typing"
_CHANNEL = 3  # the descriptor on which a program that is asked or asks finds its channel
_MOST_FILES, _MOST_OPEN = 256, 64
_GLANCE = 0.02  # seconds between two looks at a running program


class _Place:
    """The folder that programs may write to, one after the other."""

    def __init__(self, path: str) -> None:
        self.path = path

    def too_full(self, size: int) -> bool:
        """Whether there are too many files in it, or too large ones."""
        total = 0
        with os.scandir(self.path) as entries:
            for count, entry in enumerate(entries, 1):
                with contextlib.suppress(FileNotFoundError):  # the program has just removed it
                    total += entry.stat(follow_symlinks=False).st_size
                if count > _MOST_FILES or total > size:
                    return True
        return False

    def empty(self) -> None:
        """Remove what a program left."""
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):  # possible only where nothing seals files
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


# --- In the program's process --------------------------------------------------------------------


def _limit(limits: dict[str, Any]) -> None:
    memory, output = limits["memory"] << 20, limits["output"] << 20
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MOST_OPEN),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _conduct(job: dict[str, Any]) -> int:
    channel = child.Channel(_CHANNEL)
    if job["do"] == "run":
        return child.run(job["source"])
    if job["do"] == "answer":
        return child.answer(job["source"], channel)
    return child.ask(job["source"], job["entry_point"], channel)


def _become(
    parent: int,
    limits: dict[str, Any],
    descriptors: list[int],
    files: isolation.Files | None,
    filtered: bool,
) -> NoReturn:
    """Turn this process, a fresh copy of the supervisor, into a sealed program; never returns."""
    status = 1
    try:
        job = json.loads(_read(descriptors[0]))
        for target, descriptor in enumerate(descriptors[1:]):
            os.dup2(descriptor, target)
        os.chdir(limits["place"])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _limit(limits)
        isolation.give_up_privileges()
        isolation.die_with(parent)
        if files is not None:
            files.enforce()
        if filtered:
            isolation.filter_calls()
        os.closerange(len(descriptors) - 1, 1 << 16)
        _fresh_streams()
        status = _conduct(job)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _fresh_streams() -> None:
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = ["program.py"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "sandbox"]:
        del sys.modules[name]


# --- Watching ------------------------------------------------------------------------------------


def _used(pid: int) -> float:
    """Return the processor time of another process, in seconds (clock_getcpuclockid)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:  # it has just ended
        return 0.0


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _excess(pid: int, limits: dict[str, Any], started: float, place: _Place) -> str | None:
    """Return which limit a running program has passed."""
    if time.monotonic() - started > limits["wall"] or _used(pid) > limits["seconds"]:
        return "time"
    if _threads(pid) > limits["threads"]:
        return "threads"
    return "files" if place.too_full(limits["output"] << 20) else None


def _watch(
    pid: int, limits: dict[str, Any], control: socket.socket, place: _Place
) -> dict[str, Any]:
    """Wait for a program's end, or bring it about; return how it ended."""
    started, reason = time.monotonic(), None
    ended = os.pidfd_open(pid)
    try:
        while True:
            ready = select.select([ended, control], [], [], _GLANCE)[0]
            if ended in ready:
                break
            reason = "stopped" if ready else _excess(pid, limits, started, place)
            if reason:
                break
    finally:
        os.close(ended)
    os.kill(pid, signal.SIGKILL)  # it is not reaped yet, so the number is still its own
    _, code, usage = os.wait4(pid, 0)
    status = os.waitstatus_to_exitcode(code)
    reason = "time" if status == -signal.SIGXCPU else reason
    return {"status": status, "reason": reason, "seconds": usage.ru_utime + usage.ru_stime}


def _kill_strays() -> None:
    """End what a program left running, which is possible only where seccomp is not in force.

    Orphans become this process's children, so all are found, level by level.
    """
    own = os.getpid()
    while True:
        try:
            with open(f"/proc/{own}/task/{own}/children") as file:
                children = [int(number) for number in file.read().split()]
            for child in children:
                os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)
        except OSError:  # no child is left
            return


def _seal(settings: dict[str, Any], place: _Place) -> tuple[dict[str, Any], isolation.Files | None]:
    """Build the walls that are asked for and possible here; return which, and the files' rules."""
    walls = settings["walls"]
    private = "namespaces" in walls and isolation.enter_namespaces()
    version = isolation.landlock_version() if "landlock" in walls else 0
    files = isolation.Files(version, settings["readable"], place.path) if version else None
    filtered = "seccomp" in walls and isolation.can_filter_calls()
    return {"landlock": version, "seccomp": filtered, "namespaces": private}, files


def _serve(
    control: socket.socket, place: _Place, files: isolation.Files | None, filtered: bool
) -> None:
    """Run one program after the other, until the other side closes."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 12, 8)
        if not message:
            return
        if message == b"stop":  # it crossed with the end of the program it meant
            continue
        limits = {**json.loads(message), "place": place.path}
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _become(parent, limits, descriptors, files, filtered)
        for one in descriptors:
            os.close(one)
        outcome = _watch(pid, limits, control, place)
        _kill_strays()
        place.empty()
        control.send(json.dumps(outcome).encode())


def main(descriptor: int, options: str) -> None:
    """Build the walls, say which there are, and serve; remove the programs' folder at the end."""
    settings = json.loads(options)
    control = socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _CHANNEL + 1))
    os.dup2(0, _CHANNEL)  # taken, so that nothing which must outlive a dup2 gets this number
    place = _Place(settings["place"])
    isolation.adopt_orphans()
    for name in _POPULAR.split():
        importlib.import_module(name)
    builtins.exit = builtins.quit = sys.exit  # as `site`, which is not loaded, would define them
    built, files = _seal(settings, place)
    with contextlib.suppress(ConnectionError):  # the caller has ended
        control.send(json.dumps(built).encode())
        _serve(control, place, files, built["seccomp"])
    shutil.rmtree(place.path, ignore_errors=True)
