"""Running a program that nobody has read: sealed off from network, files and other processes.

A ``Sandbox`` is one supervisor process (``sealed.supervisor``) that runs one program after the
other, each in a process of its own. What the seal consists of, what it keeps out and what it does
not is in docs/sandbox.md. Whether it holds is never assumed: ``require_isolation`` tries to break
out, once per process, and refuses to go on where that succeeds. What programs are worth is for
``code`` to say.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trivium.errors import ConfigurationError

LAYERS = ("landlock", "seccomp", "namespaces")
ISOLATION = ("files", "network", "processes")
_START = (
    "import sys; sys.path.append(sys.argv[1]); import sandbox.supervisor as s; sys.path.pop(); "
    "s.main(int(sys.argv[2]), sys.argv[3])"
)
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_HARMLESS = ("/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SHOWN_ERROR = 2000


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: processor time; by the clock it gets ``wall``.
        wall: seconds by the clock.
        memory: megabytes of address space, the interpreter's own (about 30) included.
        output: megabytes of output, of any file, and of all files together.
        threads: how many threads, the first included; another process is never allowed.
    """

    seconds: float = 5.0
    wall: float = 11.0
    memory: int = 512
    output: int = 1
    threads: int = 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: its exit status, or minus the signal that ended it.
        reason: the limit that it passed and was ended for (time, threads, files), "stopped" where
            the caller ended it, None where it ended by itself.
        seconds: the processor time it took.
        output: what it wrote to its standard output, as far as the limit allowed.
        error: the end of what it wrote to its standard error, for people to read.
    """

    status: int
    reason: str | None
    seconds: float
    output: bytes
    error: str


def readable_paths() -> list[str]:
    """Return what programs may read: the standard library and what it is linked with."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    libraries = str(Path(sys.base_prefix) / "lib")
    return list(dict.fromkeys([*python, libraries, *_SYSTEM_LIBRARIES, *_HARMLESS]))


def _received(control: socket.socket) -> bytes:
    """Return a supervisor's next message, empty where it has ended."""
    try:
        return control.recv(1 << 12)
    except ConnectionError:
        return b""


class Run:
    """A program that is running: wait for its end, or talk to it over its `channel`."""

    def __init__(
        self, control: socket.socket, channel: socket.socket | None, out: int, error: int
    ) -> None:
        self._control, self._out, self._error = control, out, error
        self.channel = channel

    def wait(self) -> Outcome:
        """Return how the program ended; raises RuntimeError where its supervisor was killed."""
        try:
            message = _received(self._control)
            if not message:
                raise RuntimeError("the sandbox's supervisor process has ended: was it killed?")
            output = os.pread(self._out, os.fstat(self._out).st_size, 0)
            size = os.fstat(self._error).st_size
            shown = os.pread(self._error, _SHOWN_ERROR, max(size - _SHOWN_ERROR, 0))
            text = shown.decode("utf-8", "replace")
            return Outcome(**json.loads(message), output=output, error=text)
        finally:
            os.close(self._out)
            os.close(self._error)
            if self.channel is not None:
                self.channel.close()

    def stop(self) -> Outcome:
        """End the program, if it has not ended, and return how it ended."""
        with contextlib.suppress(OSError):
            self._control.send(b"stop")
        return self.wait()


class Sandbox:
    """A supervisor that runs one sealed program at a time; close it, or use it in a ``with``.

    `walls` are those to build where the machine permits them; fewer than all are for tests.
    """

    def __init__(self, walls: Sequence[str] = LAYERS) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="trivium-sealed-", ignore_cleanup_errors=True
        )
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {"walls": walls, "readable": readable_paths(), "place": self._folder.name}
        here, options = str(Path(__file__).parents[1]), json.dumps(settings)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-B",
                    "-c",
                    _START,
                    here,
                    str(theirs.fileno()),
                    options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env={"PATH": "", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        first = _received(self._control)
        if not first:
            reason = self._reason()
            self.close()
            raise RuntimeError(f"the sandbox's supervisor process could not start: {reason}")
        self.walls: dict[str, Any] = json.loads(first)

    def _reason(self) -> str:
        assert self._process.stderr is not None, "its error stream is a pipe"
        lines = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it ended at once"

    def start(
        self, job: dict[str, Any], limits: Limits, stdin: str = "", talk: bool = False
    ) -> Run:
        """Start a program; only one may run at a time.

        Job and input travel as files in memory that only the program's own process reads, and its
        output comes back as one, so that the supervisor's memory never holds any of it.
        """
        files = [_in_memory(json.dumps(job).encode()), _in_memory(stdin.encode("utf-8", "replace"))]
        out, error = _in_memory(b""), _in_memory(b"")
        ours, theirs = socket.socketpair() if talk else (None, None)
        descriptors = [*files, out, error, *([theirs.fileno()] if theirs else [])]
        with contextlib.suppress(ConnectionError):  # `wait` says that the supervisor has ended
            socket.send_fds(self._control, [json.dumps(vars(limits)).encode()], descriptors)
        for file in files:
            os.close(file)
        if theirs is not None:
            theirs.close()
        return Run(self._control, ours, out, error)

    def run(self, source: str, limits: Limits = Limits(), stdin: str = "") -> Outcome:
        """Run a program as a script to its end."""
        return self.start({"do": "run", "source": source}, limits, stdin).wait()

    def close(self) -> None:
        """End the supervisor, and with it whatever runs, and remove its folder."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _in_memory(content: bytes) -> int:
    """Return the descriptor of a file in memory that holds `content`, at its start."""
    file = os.memfd_create("sealed")
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


# --- Putting tests to a program ------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What test code found out about a program.

    Attributes:
        passed: whether the test code ran to its end without an error.
        why: what stopped it.
        unfit: what keeps the test code from being put to any program; None where it is fit.
        seconds: processor time that the program took.
    """

    passed: bool
    why: str | None
    unfit: str | None
    seconds: float


def examine(
    candidate: tuple[Sandbox, str],
    examiner: tuple[Sandbox, str],
    entry_point: str | None,
    limits: Limits,
) -> Verdict:
    """Put test code to a program, each in a sandbox of its own, and carry what they say.

    The sandboxes must be kept apart for good: one that has held tests must never run a program.
    """
    (where, program), (elsewhere, tests) = candidate, examiner
    answering = where.start({"do": "answer", "source": program}, limits, talk=True)
    job = {"do": "ask", "source": tests, "entry_point": entry_point}
    asking = elsewhere.start(job, limits, talk=True)
    try:
        said = _carry(answering, asking, limits)
    finally:
        ended, _ = answering.stop(), asking.stop()
    unfit = said.get("unfit")
    reason = ended.reason if ended.reason != "stopped" else None
    early = f"the program ended before its tests, with status {ended.status}"
    why = said.get("why") or reason or ended.error.strip().rpartition("\n")[2] or early
    passed = said.get("passed") is True
    return Verdict(passed, None if passed else why, unfit, ended.seconds)


def _carry(answering: Run, asking: Run, limits: Limits) -> dict[str, Any]:
    """Carry questions and answers until the tests say their verdict, or nothing more can come."""
    assert answering.channel is not None and asking.channel is not None, "both can talk"
    most = limits.output << 20
    lines = {run: _lines(run, most) for run in (answering, asking)}
    with contextlib.suppress(OSError, TypeError, ValueError, StopIteration):
        while True:
            message = dict(json.loads(next(lines[asking])))
            if "ask" not in message:
                return message
            answering.channel.sendall(json.dumps(message["ask"]).encode() + b"\n")
            line = next(lines[answering], None)
            if line is None:  # the program has ended: let the tests find out that nobody answers
                asking.channel.shutdown(socket.SHUT_WR)
                continue
            asking.channel.sendall(line)
    return {}


def _lines(run: Run, most: int) -> Iterator[bytes]:
    """Yield the lines that a program sends, up to `most` bytes in all."""
    assert run.channel is not None, "it can talk"
    waiting, total = [b""], 0
    while total <= most:
        piece = run.channel.recv(1 << 16)
        if not piece:
            return
        total += len(piece)
        if b"\n" not in piece:
            waiting.append(piece)
            continue
        *lines, rest = b"".join([*waiting, piece]).split(b"\n")
        waiting = [rest]
        yield from (line + b"\n" for line in lines)


# --- Does it hold? -------------------------------------------------------------------------------

_ESCAPE = """
import json, os, socket, sys

def opened(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True

path, port = json.loads(sys.stdin.readline())
there = ("127.0.0.1", port)
tcp = opened(lambda: socket.create_connection(there, 1).close())
udp = opened(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", there))
print(json.dumps({
    "files": opened(lambda: open(path).close()),
    "network": tcp or udp,
    "processes": opened(lambda: os.fork() or os._exit(0)),
}))
"""
_NEEDS = {
    "files": "Landlock (Linux 5.13 or later with 'landlock' among its security modules, and a "
    "container that permits its system calls)",
    "network": "seccomp filters, or user and network namespaces",
    "processes": "seccomp filters",
}


@functools.cache
def isolation_gaps(walls: tuple[str, ...] = LAYERS) -> tuple[str, ...]:
    """Return which of ``ISOLATION`` does not hold here, tried with a program that breaks out.

    It tries to read a file of this process's, to reach a port of this process's by TCP and by UDP,
    and to start another process. Raises ConfigurationError where no program can be run at all.
    """
    if sys.platform != "linux":
        raise ConfigurationError(
            f"programs are run only where they can be sealed off, which needs Linux, and this is "
            f"{sys.platform}: score code on Linux (a container or virtual machine will do), or "
            "write a reward function of your own that sends programs to such a machine"
        )
    with tempfile.NamedTemporaryFile("w") as file, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        try:
            with Sandbox(walls) as sandbox:
                outcome = sandbox.run(_ESCAPE, stdin=json.dumps([file.name, port]) + "\n")
                found = json.loads(outcome.output)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigurationError(
                f"no program can be run in the sandbox here ({type(error).__name__}: {error}): it "
                "needs Linux 5.13 or later on x86_64 or aarch64"
            ) from None
    return tuple(way for way in ISOLATION if found[way])


def require_isolation(accept_missing: Sequence[str] = (), walls: tuple[str, ...] = LAYERS) -> None:
    """Raise ConfigurationError where a program could break out in a way that is not accepted."""
    missing = [way for way in isolation_gaps(walls) if way not in accept_missing]
    if not missing:
        return
    needs = "; ".join(f"isolation of {way} needs {_NEEDS[way]}" for way in missing)
    raise ConfigurationError(
        f"programs cannot be sealed off here: {needs}. Run on a kernel and in a "
        "container that have it, or, if whatever the policy may write is harmless here, say so "
        f"with 'accept_missing: [{', '.join(missing)}]'"
    )
