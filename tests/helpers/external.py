"""A world outside the sandbox in which an escape would show, and runs of programs against it."""

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
    """Things outside a program that it must not reach, and ways to see whether it did."""

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
        # What a handler notes here was sent to this very process, the sandbox's caller.
        self.signals: list[int] = []

    def prelude(self) -> str:
        known = {
            "home": str(self.home),
            "outside": str(self.outside),
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "abstract": self.abstract.getsockname().decode(),
            "caller": os.getpid(),
        }
        return f"import ctypes, os, socket, sys, time\nW = {known!r}\n{_HELPERS}\n"

    def connected(self) -> bool:
        """Whether anything came in on any of the sockets."""
        return bool(select.select([self.tcp, self.udp, self.abstract, self.named], [], [], 0.05)[0])

    def written(self) -> bool:
        return any(self.outside.iterdir())

    def changed(self) -> bool:
        file = self.home / "file"
        status = file.stat()
        kept = (status.st_mode & 0o7777, status.st_mtime, status.st_nlink) == (0o640, 1e9, 1)
        return not kept or file.read_text() != "untouched"

    def signalled(self) -> bool:
        return bool(self.signals)

    def close(self) -> None:
        for one in (self.tcp, self.udp, self.abstract, self.named):
            one.close()


@contextlib.contextmanager
def new_world(home: Path) -> Iterator[World]:
    """A world, in which this process notes SIGUSR1 and has a secret in its environment."""
    world = World(home)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: world.signals.append(number))
    os.environ["TRIVIUM_TEST_SECRET"] = SECRET
    try:
        yield world
    finally:
        del os.environ["TRIVIUM_TEST_SECRET"]
        signal.signal(signal.SIGUSR1, before)
        world.close()


_USUAL = Limits(seconds=2, wall=4, memory=256)
_HELPERS = """
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


@dataclass(frozen=True)
class Escape:
    """One attempt.

    Attributes:
        name: what is tried, in words.
        source: the program; it may use ``W``, ``libc`` and ``call`` of the prelude.
        expected: a pattern that ``shown`` of the sealed program's outcome must match.
        seen: whether it happened; without one, whether the program printed "escaped".
        control: whether the plain interpreter succeeds, so that `seen` is known to see: False for
            what needs root, would harm this machine, or has no outside.
        limits: of the sealed run.
    """

    name: str
    source: str
    expected: str
    seen: Callable[[World, Outcome], bool] | None = None
    control: bool = True
    limits: Limits = _USUAL

    def happened(self, world: World, outcome: Outcome) -> bool:
        if self.seen is None:
            return b"escaped" in outcome.output
        return self.seen(world, outcome)


def time_passes() -> None:
    """Wait for what a program may have left running."""
    select.select([], [], [], 0.4)


def run_plainly(escape: Escape, world: World) -> Outcome:
    """Run an escape by an ordinary interpreter, in the world's home."""
    with open(world.home / "key") as inherited:
        result = subprocess.run(
            [sys.executable, "-I", "-c", world.prelude() + escape.source],
            capture_output=True,
            cwd=world.home,
            timeout=20,
            pass_fds=(inherited.fileno(),),
        )
    return Outcome(result.returncode, None, 0.0, result.stdout, result.stderr.decode())


def run_sealed(escape: Escape, world: World, place: Sandbox) -> Outcome:
    """Run an escape sealed, while this process holds an inheritable secret file open."""
    with open(world.home / "key") as inherited:
        os.set_inheritable(inherited.fileno(), True)
        return place.run(world.prelude() + escape.source, escape.limits)


def shown(outcome: Outcome) -> str:
    """Return how a program ended, in a few words."""
    if outcome.reason:
        return outcome.reason
    if outcome.status < 0:
        return f"status {outcome.status}"
    last = outcome.error.strip().rpartition("\n")[2]
    return last or outcome.output.decode(errors="replace").strip()[-200:]
