"""Resources outside the sandbox that show whether an escape succeeded, and runs of escapes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trivium.rewards.sandbox.host import Limits, Outcome, Sandbox

SECRET = "correct-horse-battery-staple"


class World:
    """Files, sockets and signals that a sandboxed program must not reach, with checks of each."""

    def __init__(self, home: Path) -> None:
        self.home, self.outside = home, home / "outside"
        self.outside.mkdir(parents=True)
        (home / "key").write_text(SECRET)
        (home / "file").write_text("untouched")
        os.chmod(home / "file", 0o640)
        os.utime(home / "file", (1e9, 1e9))
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0trivium-test-{os.getpid()}-{id(self)}")
        self.abstract.listen()
        self.named = socket.socket(socket.AF_UNIX)
        self.named.bind(str(home / "socket"))
        self.named.listen()
        # Signals that this process, the sandbox's caller, received.
        self.signals: list[int] = []

    def prelude(self) -> str:
        addresses = {
            "home": str(self.home),
            "outside": str(self.outside),
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "abstract": self.abstract.getsockname().decode(),
            "caller": os.getpid(),
        }
        return f"import ctypes, os, socket, sys, time\nW = {addresses!r}\n{_HELPERS}\n"

    def has_connection(self) -> bool:
        """Return whether anything arrived on any of the sockets."""
        return bool(select.select([self.tcp, self.udp, self.abstract, self.named], [], [], 0.05)[0])

    def has_written_file(self) -> bool:
        return any(self.outside.iterdir())

    def has_changed_file(self) -> bool:
        file = self.home / "file"
        status = file.stat()
        unchanged = (status.st_mode & 0o7777, status.st_mtime, status.st_nlink) == (0o640, 1e9, 1)
        return not unchanged or file.read_text() != "untouched"

    def was_signaled(self) -> bool:
        return bool(self.signals)

    def close(self) -> None:
        for listener in (self.tcp, self.udp, self.abstract, self.named):
            listener.close()


@contextlib.contextmanager
def new_world(home: Path) -> Iterator[World]:
    """Create a world; record SIGUSR1 and set a secret environment variable in this process."""
    world = World(home)
    previous_handler = signal.signal(
        signal.SIGUSR1, lambda number, frame: world.signals.append(number)
    )
    os.environ["TRIVIUM_TEST_SECRET"] = SECRET
    try:
        yield world
    finally:
        del os.environ["TRIVIUM_TEST_SECRET"]
        signal.signal(signal.SIGUSR1, previous_handler)
        world.close()


_DEFAULT_LIMITS = Limits(seconds=2, wall=4, memory=256)
_HELPERS = """
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


@dataclass(frozen=True)
class Escape:
    """One attempt to escape.

    Attributes:
        name: description of the attempt.
        source: source of the program; it may use ``W``, ``libc`` and ``call`` of the prelude.
        expected: pattern that ``describe_outcome`` must match for the sandboxed program.
        detect: whether the escape succeeded; by default, whether the program printed "escaped".
        run_control: whether the escape succeeds without a sandbox, which shows that `detect` works.
            False if it needs root, would harm this machine, or concerns only the program itself.
        limits: limits of the sandboxed run.
    """

    name: str
    source: str
    expected: str
    detect: Callable[[World, Outcome], bool] | None = None
    run_control: bool = True
    limits: Limits = _DEFAULT_LIMITS

    def succeeded(self, world: World, outcome: Outcome) -> bool:
        if self.detect is None:
            return b"escaped" in outcome.output
        return self.detect(world, outcome)


def wait_for_leftovers() -> None:
    """Wait for processes that a program may have left running."""
    select.select([], [], [], 0.4)


def run_without_sandbox(escape: Escape, world: World) -> Outcome:
    """Run an escape with an ordinary interpreter, in the world's home folder."""
    with open(world.home / "key") as secret_file:
        result = subprocess.run(
            [sys.executable, "-I", "-c", world.prelude() + escape.source],
            capture_output=True,
            cwd=world.home,
            timeout=20,
            pass_fds=(secret_file.fileno(),),
        )
    return Outcome(result.returncode, None, 0.0, result.stdout, result.stderr.decode())


def run_in_sandbox(escape: Escape, world: World, sandbox: Sandbox) -> Outcome:
    """Run an escape in a sandbox while this process holds an inheritable secret file open."""
    with open(world.home / "key") as secret_file:
        os.set_inheritable(secret_file.fileno(), True)
        return sandbox.run(world.prelude() + escape.source, escape.limits)


def describe_outcome(outcome: Outcome) -> str:
    """Return a short description of how a program ended."""
    if outcome.reason:
        return outcome.reason
    if outcome.status < 0:
        return f"status {outcome.status}"
    last_line = outcome.error.strip().rpartition("\n")[2]
    return last_line or outcome.output.decode(errors="replace").strip()[-200:]
