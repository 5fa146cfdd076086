"""Running untrusted programs in a sandbox, without network, files or other processes.

A ``Sandbox`` is one supervisor process (``sandbox.supervisor``) that runs programs one at a time,
each in a new process. docs/sandbox.md describes the isolation layers, what they block and what they
do not. Isolation is tested, not assumed: once per process, ``require_isolation`` runs a program
that tries to escape, and raises an error if it succeeds. ``code`` scores programs.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from trivium.errors import ConfigurationError

LAYERS = ("landlock", "seccomp", "namespaces")
ISOLATION = ("files", "network", "processes")
_STARTUP_CODE = (
    "import sys; sys.path.append(sys.argv[1]); import sandbox.supervisor as s; sys.path.pop(); "
    "s.main(int(sys.argv[2]), sys.argv[3])"
)
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_READABLE_FILES = ("/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_MAX_ERROR_BYTES = 2000
_START_SECONDS, _GRACE_SECONDS = 120.0, 60.0  # for a machine that is very busy


@dataclass(frozen=True)
class Limits:
    """Resource limits of one program.

    Attributes:
        seconds: CPU time.
        wall: wall time in seconds.
        memory: megabytes of address space, including the interpreter's (about 30).
        output: megabytes of output, of any file, and of all files together.
        threads: number of threads, including the first; a second process is never allowed.
    """

    seconds: float = 5.0
    wall: float = 11.0
    memory: int = 512
    output: int = 1
    threads: int = 16


@dataclass(frozen=True)
class Outcome:
    """Result of a program.

    Attributes:
        status: exit status, or minus the number of the signal that ended it.
        reason: limit that it exceeded and was killed for (time, threads, files), "stopped" if the
            caller stopped it, None if it ended by itself.
        seconds: CPU time.
        output: standard output, up to the limit.
        error: end of the standard error, for messages.
    """

    status: int
    reason: str | None
    seconds: float
    output: bytes
    error: str


def readable_paths() -> list[str]:
    """Return the paths that programs may read: the standard library and its shared libraries."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    libraries = str(Path(sys.base_prefix) / "lib")
    return list(dict.fromkeys([*python, libraries, *_SYSTEM_LIBRARIES, *_READABLE_FILES]))


def _receive(control: socket.socket, seconds: float) -> bytes:
    """Return a supervisor's next message, empty if it has ended.

    Raises RuntimeError if it sends none within `seconds`.
    """
    control.settimeout(seconds)
    try:
        return control.recv(1 << 12)
    except ConnectionError:
        return b""
    except TimeoutError:
        raise RuntimeError(
            f"the sandbox's supervisor process did not answer within {seconds:g} s: was it stopped?"
        ) from None
    finally:
        control.settimeout(None)


class RunningProgram:
    """A running program, with a `channel` for messages."""

    def __init__(
        self,
        control: socket.socket,
        channel: socket.socket | None,
        out: int,
        error: int,
        wall: float,
    ) -> None:
        self._control, self._out, self._error = control, out, error
        self._seconds = wall + _GRACE_SECONDS
        self.channel = channel
        if channel is not None:
            channel.settimeout(self._seconds)

    def wait(self) -> Outcome:
        """Wait for the program's end; raise RuntimeError if its supervisor does not answer."""
        try:
            message = _receive(self._control, self._seconds)
            if not message:
                raise RuntimeError("the sandbox's supervisor process has ended: was it killed?")
            output = os.pread(self._out, os.fstat(self._out).st_size, 0)
            size = os.fstat(self._error).st_size
            tail = os.pread(self._error, _MAX_ERROR_BYTES, max(size - _MAX_ERROR_BYTES, 0))
            text = tail.decode("utf-8", "replace")
            return Outcome(**json.loads(message), output=output, error=text)
        finally:
            os.close(self._out)
            os.close(self._error)
            if self.channel is not None:
                self.channel.close()

    def stop(self) -> Outcome:
        """Stop the program if it is running, and return its outcome."""
        with contextlib.suppress(OSError):
            self._control.send(b"stop")
        return self.wait()


class Sandbox:
    """Supervisor that runs one sandboxed program at a time; close it or use it as context manager.

    `layers` are the isolation layers to set up if the machine permits them; only tests use fewer
    than all.
    """

    def __init__(self, layers: Sequence[str] = LAYERS) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="trivium-sandbox-", ignore_cleanup_errors=True
        )
        self._control, child_socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {"layers": layers, "readable": readable_paths(), "folder": self._folder.name}
        parent_folder, options = str(Path(__file__).parents[1]), json.dumps(settings)
        with child_socket:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-B",
                    "-c",
                    _STARTUP_CODE,
                    parent_folder,
                    str(child_socket.fileno()),
                    options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env={"PATH": "", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
                pass_fds=(child_socket.fileno(),),
                start_new_session=True,
            )
        try:
            message = _receive(self._control, _START_SECONDS)
        except RuntimeError:
            self.close()
            raise
        if not message:
            reason = self._reason()
            self.close()
            raise RuntimeError(f"the sandbox's supervisor process could not start: {reason}")
        self.layers: dict[str, Any] = json.loads(message)

    def _reason(self) -> str:
        assert self._process.stderr is not None, "standard error is a pipe"
        lines = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it ended at once"

    def start(
        self, job: dict[str, Any], limits: Limits, stdin: str = "", with_channel: bool = False
    ) -> RunningProgram:
        """Start a program; only one can run at a time.

        The job and the input are passed as in-memory files that only the program's process reads,
        and the output is returned as another one. The supervisor's memory never holds any of them.
        """
        files = [
            _memory_file(json.dumps(job).encode()),
            _memory_file(stdin.encode("utf-8", "replace")),
        ]
        out, error = _memory_file(b""), _memory_file(b"")
        parent_socket, child_socket = socket.socketpair() if with_channel else (None, None)
        descriptors = [*files, out, error, *([child_socket.fileno()] if child_socket else [])]
        with contextlib.suppress(ConnectionError):  # `wait` reports that the supervisor has ended
            socket.send_fds(self._control, [json.dumps(vars(limits)).encode()], descriptors)
        for file in files:
            os.close(file)
        if child_socket is not None:
            child_socket.close()
        return RunningProgram(self._control, parent_socket, out, error, limits.wall)

    def run(self, source: str, limits: Limits = Limits(), stdin: str = "") -> Outcome:
        """Run a program as a script and return its outcome."""
        return self.start({"mode": "run", "source": source}, limits, stdin).wait()

    def close(self) -> None:
        """Kill the supervisor, which also ends its programs, and remove its folder."""
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


def _memory_file(content: bytes) -> int:
    """Return the descriptor of an in-memory file with `content`, positioned at its start."""
    file = os.memfd_create("sandbox")
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


# --- Testing the isolation -----------------------------------------------------------------------

_ESCAPE_ATTEMPT = """
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
_REQUIREMENTS = {
    "files": "Landlock (Linux 5.13 or later with 'landlock' among its security modules, and a "
    "container that permits its system calls)",
    "network": "seccomp filters, or user and network namespaces",
    "processes": "seccomp filters",
}


@functools.cache
def isolation_gaps(layers: tuple[str, ...] = LAYERS) -> tuple[str, ...]:
    """Return the kinds of ``ISOLATION`` that a program can escape on this machine.

    A sandboxed program tries to read a file of this process, to reach a port of this process by TCP
    and UDP, and to start another process. Raises ConfigurationError if no program can run at all.
    """
    if sys.platform != "linux":
        raise ConfigurationError(
            f"programs run only in a sandbox, which needs Linux, and this is {sys.platform}: score "
            "code on Linux (a container or virtual machine is enough), or write your own reward "
            "function that sends programs to such a machine"
        )
    with tempfile.NamedTemporaryFile("w") as file, socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        try:
            with Sandbox(layers) as sandbox:
                outcome = sandbox.run(_ESCAPE_ATTEMPT, stdin=json.dumps([file.name, port]) + "\n")
                succeeded = json.loads(outcome.output)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigurationError(
                f"no program can be run in the sandbox here ({type(error).__name__}: {error}): it "
                "needs Linux 5.13 or later on x86_64 or aarch64"
            ) from None
    return tuple(kind for kind in ISOLATION if succeeded[kind])


def require_isolation(accept_missing: Sequence[str] = (), layers: tuple[str, ...] = LAYERS) -> None:
    """Raise ConfigurationError if a program could escape in a way that is not accepted."""
    missing = [kind for kind in isolation_gaps(layers) if kind not in accept_missing]
    if not missing:
        return
    needs = "; ".join(f"isolation of {kind} needs {_REQUIREMENTS[kind]}" for kind in missing)
    raise ConfigurationError(
        f"programs cannot be isolated here: {needs}. Use a kernel and a container that support "
        "it, or, if any program that the policy may write is harmless here, set "
        f"'accept_missing: [{', '.join(missing)}]'"
    )
