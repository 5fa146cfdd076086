"""Supervisor process: starts sandboxed programs, enforces their limits and cleans up after them.

It receives the limits over a socket, and the program as open files that only the program's own
process reads. Every program inherits a copy of the supervisor's memory, which therefore never holds
an earlier program, a test or an output. The supervisor runs one program at a time and imports
nothing else from Trivium.
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

from . import checker, child, isolation
from .channel import Channel

# Modules that programs often import: loaded once, so that every program starts with them.
_PRELOADED_MODULES = "bisect collections functools heapq itertools math random re string typing"
_CHANNEL = 3  # descriptor of the channel in programs that serve or test
_MAX_FILES, _MAX_OPEN_FILES = 256, 64
_POLL_SECONDS = 0.02  # interval between checks of a running program


class _WorkFolder:
    """Folder that programs may write to; each program gets it empty."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._mount: isolation.WorkMount | None = None

    def mount(self) -> None:
        """Give the folder a file system of its own, if the machine permits it."""
        self._mount = isolation.WorkMount(self.path)

    def limit(self, size: int) -> None:
        """Bound all files together to twice `size` bytes, unlinked ones included.

        ``exceeds`` enforces `size` itself for the files that have a name.
        """
        if self._mount is not None:
            self._mount.resize(2 * size)

    def remove(self) -> None:
        """Remove the folder."""
        if self._mount is not None:
            self._mount.remove()
        shutil.rmtree(self.path, ignore_errors=True)

    def exceeds(self, size: int) -> bool:
        """Return whether the folder holds too many files, or more than `size` bytes."""
        total = 0
        with os.scandir(self.path) as entries:
            for count, entry in enumerate(entries, 1):
                with contextlib.suppress(FileNotFoundError):  # the program has just removed it
                    total += entry.stat(follow_symlinks=False).st_size
                if count > _MAX_FILES or total > size:
                    return True
        return False

    def clear(self) -> None:
        """Remove the files of the last program."""
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):  # possible only without file isolation
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


# --- In the program's process --------------------------------------------------------------------


def _set_limits(limits: dict[str, Any]) -> None:
    memory, output = limits["memory"] << 20, limits["output"] << 20
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, output),
        # The supervisor enforces the limit; the kernel's, which may come a tick early, is a spare.
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 2),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def _read(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _run_job(job: dict[str, Any]) -> int:
    channel = Channel(_CHANNEL)
    if job["mode"] == "run":
        return child.run(job["source"])
    if job["mode"] == "serve":
        return child.serve_program(job["source"], channel)
    if job["mode"] == "probe":
        return checker.probe_tests(job["tests"], channel)
    return checker.run_tests(job["source"], job["entry_point"], channel)


def _run_program(
    parent: int,
    limits: dict[str, Any],
    descriptors: list[int],
    rules: isolation.LandlockRules | None,
    has_filter: bool,
) -> NoReturn:
    """Run a program in this process, a fork of the supervisor, after isolating it; never return."""
    status = 1
    try:
        job = json.loads(_read(descriptors[0]))
        for target, descriptor in enumerate(descriptors[1:]):
            os.dup2(descriptor, target)
        os.chdir(limits["folder"])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _set_limits(limits)
        isolation.give_up_privileges()
        isolation.die_with_parent(parent)
        if rules is not None:
            rules.enforce()
        if has_filter:
            isolation.enforce_filter()
        os.closerange(len(descriptors) - 1, 1 << 16)
        _reset_streams()
        status = _run_job(job)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _reset_streams() -> None:
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.argv = ["program.py"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "sandbox"]:
        del sys.modules[name]


# --- Limits --------------------------------------------------------------------------------------


def _cpu_seconds(pid: int) -> float:
    """Return the CPU time of another process in seconds (clock_getcpuclockid)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:  # it has just ended
        return 0.0


def _num_threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _exceeded_limit(
    pid: int, limits: dict[str, Any], started: float, folder: _WorkFolder
) -> str | None:
    """Return the limit that a running program has exceeded, or None."""
    if time.monotonic() - started > limits["wall"] or _cpu_seconds(pid) > limits["seconds"]:
        return "time"
    if _num_threads(pid) > limits["threads"]:
        return "threads"
    return "files" if folder.exceeds(limits["output"] << 20) else None


def _watch(
    pid: int, limits: dict[str, Any], control: socket.socket, folder: _WorkFolder
) -> dict[str, Any]:
    """Wait for a program, kill it if it exceeds a limit, and return its outcome."""
    started, reason = time.monotonic(), None
    ended = os.pidfd_open(pid)
    try:
        while True:
            ready = select.select([ended, control], [], [], _POLL_SECONDS)[0]
            if ended in ready:
                break
            reason = "stopped" if ready else _exceeded_limit(pid, limits, started, folder)
            if reason:
                break
    finally:
        os.close(ended)
    os.kill(pid, signal.SIGKILL)  # it is not reaped yet, so the PID is still its own
    _, code, usage = os.wait4(pid, 0)
    status = os.waitstatus_to_exitcode(code)
    reason = "time" if status == -signal.SIGXCPU else reason
    return {"status": status, "reason": reason, "seconds": usage.ru_utime + usage.ru_stime}


def _kill_descendants() -> None:
    """Kill the processes that a program left running, which is possible only without seccomp.

    Orphans become children of this process, so the loop finds all descendants, level by level.
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


def _build_layers(
    settings: dict[str, Any], folder: _WorkFolder
) -> tuple[dict[str, Any], isolation.LandlockRules | None]:
    """Set up the requested layers that the machine permits; return them and the file rules."""
    layers = settings["layers"]
    has_namespaces = "namespaces" in layers and isolation.enter_namespaces()
    if has_namespaces:
        folder.mount()
    version = isolation.landlock_version() if "landlock" in layers else 0
    rules = isolation.LandlockRules(version, settings["readable"], folder.path) if version else None
    has_filter = "seccomp" in layers and isolation.can_filter_calls()
    return {"landlock": version, "seccomp": has_filter, "namespaces": has_namespaces}, rules


def _serve(
    control: socket.socket,
    folder: _WorkFolder,
    rules: isolation.LandlockRules | None,
    has_filter: bool,
) -> None:
    """Run programs one at a time until the other side closes."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 12, 8)
        if not message:
            return
        if message == b"stop":  # it arrived after the end of its program
            continue
        limits = {**json.loads(message), "folder": folder.path}
        folder.limit(limits["output"] << 20)
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _run_program(parent, limits, descriptors, rules, has_filter)
        for descriptor in descriptors:
            os.close(descriptor)
        outcome = _watch(pid, limits, control, folder)
        _kill_descendants()
        folder.clear()
        control.send(json.dumps(outcome).encode())


def main(descriptor: int, options: str) -> None:
    """Set up the layers, report them, and run programs; remove the work folder at the end."""
    settings = json.loads(options)
    control = socket.socket(fileno=fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _CHANNEL + 1))
    os.dup2(0, _CHANNEL)  # reserve the number, so that no descriptor is lost in a later dup2
    folder = _WorkFolder(settings["folder"])
    isolation.adopt_orphans()
    for name in _PRELOADED_MODULES.split():
        importlib.import_module(name)
    builtins.exit = builtins.quit = sys.exit  # as `site`, which is not loaded, would define them
    layers, rules = _build_layers(settings, folder)
    with contextlib.suppress(ConnectionError):  # the parent process has ended
        control.send(json.dumps(layers).encode())
        _serve(control, folder, rules, layers["seccomp"])
    folder.remove()
