"""Programs that try to escape from the sandbox.

Each escape runs twice: in the sandbox and with an ordinary interpreter. If possible, `detect`
checks the world outside and not the program's output. ``python tests/helpers/sandbox_escapes.py``
prints the table of outcomes in docs/sandbox.md.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from helpers.external import (
    SECRET,
    Escape,
    World,
    describe_outcome,
    new_world,
    run_in_sandbox,
    run_without_sandbox,
    wait_for_leftovers,
)
from trivium.rewards.sandbox import host
from trivium.rewards.sandbox.host import Limits, Outcome, Sandbox


def _connected(world: World, outcome: Outcome) -> bool:
    return world.has_connection()


def _written(world: World, outcome: Outcome) -> bool:
    return world.has_written_file()


def _changed(world: World, outcome: Outcome) -> bool:
    return world.has_changed_file()


def _was_signaled(world: World, outcome: Outcome) -> bool:
    return world.was_signaled()


def _leaked_secret(world: World, outcome: Outcome) -> bool:
    return SECRET.encode() in outcome.output


_SHORT_LIMITS = Limits(seconds=0.2, wall=0.4, memory=256)
_DENIED = "PermissionError"

ESCAPES = (
    # Network
    Escape(
        "TCP to loopback", "socket.create_connection(('127.0.0.1', W['tcp']))", _DENIED, _connected
    ),
    Escape(
        "UDP to loopback",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', W['udp']))",
        _DENIED,
        _connected,
    ),
    Escape(
        "abstract Unix socket",
        "socket.socket(socket.AF_UNIX).connect(W['abstract'])",
        _DENIED,
        _connected,
    ),
    Escape(
        "named Unix socket",
        "socket.socket(socket.AF_UNIX).connect(W['home'] + '/socket')",
        _DENIED,
        _connected,
    ),
    Escape(
        "name server (DNS)",
        "print(socket.getaddrinfo('localhost', 80) and 'escaped')",
        "gaierror",
    ),
    Escape("listening", "socket.create_server(('', 0)); print('escaped')", _DENIED),
    Escape("socket pair", "socket.socketpair(); print('escaped')", _DENIED),
    Escape(
        "io_uring, which makes calls that no filter sees",
        "call(libc.syscall(425, 8, bytes(120))); print('escaped')",
        _DENIED,
        run_control=False,
    ),
    # Reading
    Escape(
        "a file in the home folder",
        "print(open(W['home'] + '/key').read())",
        _DENIED,
        _leaked_secret,
    ),
    Escape("a folder's names", "print(os.listdir(W['home']) and 'escaped')", _DENIED),
    Escape("/etc/passwd", "open('/etc/passwd').read(); print('escaped')", _DENIED),
    Escape(
        "the caller's environment in /proc",
        "print(open(f'/proc/{W[\"caller\"]}/environ').read())",
        _DENIED,
        lambda world, outcome: b"PATH=" in outcome.output,
    ),
    Escape(
        "the supervisor's memory in /proc",
        "open(f'/proc/{os.getppid()}/mem', 'rb'); print('escaped')",
        _DENIED,
    ),
    Escape("the processes in /proc", "os.listdir('/proc'); print('escaped')", _DENIED),
    Escape("a secret in the environment", "print(dict(os.environ))", "LANG", _leaked_secret),
    Escape(
        "a folder above by '..'",
        "os.chdir(W['home']); print(open('outside/../key').read())",
        _DENIED,
        _leaked_secret,
    ),
    Escape(
        "inherited descriptors",
        "from stat import *\n"
        "for n in range(256):\n"
        "    try: os.lseek(n, 0, 0); print(os.read(n, 100))\n"
        "    except OSError: pass",
        "b''",
        _leaked_secret,
    ),
    Escape(
        "process_vm_readv of the caller",
        "b = ctypes.create_string_buffer(8); v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
        "call(libc.process_vm_readv(W['caller'], v, 1, v, 1, 0)); print('escaped')",
        _DENIED,
        run_control=False,
    ),
    # Writing
    Escape("a file outside", "open(W['outside'] + '/x', 'w').write('x')", _DENIED, _written),
    Escape("overwriting a file", "open(W['home'] + '/file', 'w').write('x')", _DENIED, _changed),
    Escape("emptying a file", "os.truncate(W['home'] + '/file', 0)", _DENIED, _changed),
    Escape(
        "removing a file",
        "os.remove(W['home'] + '/key')",
        _DENIED,
        lambda w, o: not (w.home / "key").exists(),
    ),
    Escape(
        "a symbolic link to the outside",
        "os.symlink(W['outside'], 'link'); open('link/x', 'w').write('x')",
        _DENIED,
        _written,
    ),
    Escape(
        "a hard link to a file outside", "os.link(W['home'] + '/file', 'link')", _DENIED, _changed
    ),
    Escape(
        "moving a file out",
        "open('x', 'w').close(); os.rename('x', W['outside'] + '/x')",
        f"{_DENIED}|Invalid cross-device link",
        _written,
    ),
    Escape("chmod", "os.chmod(W['home'] + '/file', 0o777)", _DENIED, _changed),
    Escape(
        "chown", "os.chown(W['home'] + '/file', 65534, 65534)", _DENIED, _changed, run_control=False
    ),
    Escape("utime", "os.utime(W['home'] + '/file', (0, 0))", _DENIED, _changed),
    Escape(
        "a file in /tmp",
        "p = f'/tmp/trivium-test-{os.getpid()}'\nopen(p, 'w'); os.remove(p); print('escaped')",
        _DENIED,
    ),
    Escape(
        "/dev/shm",
        "p = f'/dev/shm/trivium-{os.getpid()}'\nopen(p, 'w'); os.remove(p); print('escaped')",
        _DENIED,
    ),
    Escape("a folder of its own", "os.mkdir('d'); print('escaped')", _DENIED),
    Escape("a named pipe", "os.mkfifo('p'); print('escaped')", _DENIED),
    Escape("a device", "os.mknod('d', 0o60600, os.makedev(254, 0))", _DENIED, run_control=False),
    # Other processes
    Escape("a signal to the caller", "os.kill(W['caller'], 10)", _DENIED, _was_signaled),
    Escape(
        "a signal by rt_sigqueueinfo",
        "i = (ctypes.c_int * 32)(10, 0, -1); call(libc.syscall(129, W['caller'], 10, i))",
        _DENIED,
        _was_signaled,
    ),
    Escape(
        "a signal by the owner of a pipe (F_SETOWN)",
        "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, W['caller'])\n"
        "fcntl.fcntl(r, 10, 10); fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
        _DENIED,
        _was_signaled,
    ),
    Escape(
        "a signal to every process", "os.kill(-1, 10)", _DENIED, _was_signaled, run_control=False
    ),
    Escape(
        "a limit of the caller's",
        "import resource\nresource.prlimit(W['caller'], resource.RLIMIT_CORE); print('escaped')",
        _DENIED,
    ),
    Escape(
        "ptrace of the caller",
        "call(libc.ptrace(16, W['caller'], 0, 0)); print('escaped')",
        _DENIED,
        run_control=False,
    ),
    Escape("a process of its own", "os.fork() or os._exit(0); print('escaped')", _DENIED),
    Escape(
        "a shell",
        "import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'echo escaped']))",
        _DENIED,
    ),
    Escape(
        "another program in its place",
        "os.execv('/bin/sh', ['sh', '-c', 'echo escaped'])",
        _DENIED,
    ),
    Escape(
        "multiprocessing",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()\n"
        "print('escaped')",
        _DENIED,
    ),
    Escape(
        "a daemon that outlives the program",
        "if not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        "        os.close(1); os.close(2); time.sleep(0.2); open(W['outside'] + '/x', 'w')\n"
        "    os._exit(0)",
        _DENIED,
        lambda world, outcome: wait_for_leftovers() or world.has_written_file(),
    ),
    Escape(
        "a fork bomb",
        "while True:\n    try: os.fork()\n    except OSError as e: print(type(e).__name__); break",
        _DENIED,
        run_control=False,
    ),
    # Rights
    Escape("root, by setuid", "os.setuid(0); print('escaped')", _DENIED, run_control=False),
    Escape(
        "a user namespace",
        "call(libc.unshare(0x10000000)); print('escaped')",
        _DENIED,
        run_control=False,
    ),
    Escape(
        "a mount",
        "call(libc.mount(b'none', b'/mnt', b'tmpfs', 0, None)); print('escaped')",
        _DENIED,
        run_control=False,
    ),
    Escape("chroot", "os.chroot('.'); print('escaped')", _DENIED, run_control=False),
    Escape(
        "more memory than its limit",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('escaped')",
        "ValueError: not allowed to raise maximum limit",
    ),
    Escape(
        "System V shared memory",
        "i = call(libc.shmget(0, 4096, 0o1600)); libc.shmctl(i, 0, None); print('escaped')",
        _DENIED,
    ),
    Escape(
        "kernel keys",
        "call(libc.syscall(250, 0, -3, 1)); print('escaped')",
        _DENIED,
        run_control=False,
    ),
    Escape("bpf", "call(libc.syscall(321, 0, 0, 0)); print('escaped')", _DENIED, run_control=False),
    Escape(
        "calls of the 32-bit machine, which have other numbers",
        "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid); int 0x80; ret
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "print(f() and 'escaped')",
        "status -31",
        run_control=False,
    ),
    # Resources
    Escape("an endless loop", "while True: pass", "time", run_control=False, limits=_SHORT_LIMITS),
    Escape("an endless sleep", "time.sleep(60)", "time", run_control=False, limits=_SHORT_LIMITS),
    Escape(
        "an endless loop that ignores signals",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "time",
        run_control=False,
        limits=_SHORT_LIMITS,
    ),
    Escape(
        "an endless loop in C",
        "sum(iter(int, 1))",
        "time",
        run_control=False,
        limits=_SHORT_LIMITS,
    ),
    Escape(
        "a memory bomb",
        "b = bytearray(300 << 20); print('escaped')",
        "MemoryError",
    ),
    Escape("a huge text", "s = 'x' * (300 << 20); print('escaped')", "MemoryError"),
    Escape(
        "a compression bomb",
        "import zlib\nc = zlib.compressobj(1)\n"
        "b = b''.join([c.compress(bytes(1 << 24)) for _ in range(6)]) + c.flush()\n"
        "zlib.decompress(b); print('escaped')",
        "MemoryError",
        limits=Limits(seconds=2, wall=4, memory=96),
    ),
    Escape(
        "a huge output",
        "sys.stdout.write('x' * (3 << 20)); sys.stdout.flush()",
        "File too large",
        lambda world, outcome: len(outcome.output) > 1 << 20,
    ),
    Escape(
        "a huge file",
        "f = open('x', 'wb'); f.write(bytes(3 << 20)); f.flush(); print('escaped')",
        "File too large",
    ),
    Escape(
        "many files",
        "for n in range(400): open(str(n), 'wb').write(bytes(1 << 16))\n"
        "time.sleep(0.3); print('escaped')",
        "files|No space left on device",
    ),
    Escape(
        "many threads",
        "import threading\nthreading.stack_size(1 << 16)\nfor n in range(40):\n"
        "    threading.Thread(target=time.sleep, args=(0.4,)).start()\nprint('escaped')",
        "threads",
    ),
    Escape(
        "many open files",
        "f = [open('/dev/null') for _ in range(200)]; print('escaped')",
        "Too many",
    ),
    Escape(
        "endless recursion",
        "sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**5): x = [x]\nrepr(x)",
        "status -11|RecursionError|time",
        run_control=False,
    ),
    Escape(
        "a crash, with a core dump",
        "ctypes.string_at(0)",
        "status -11",
        lambda world, outcome: any(Path.cwd().glob("core*")),
        run_control=False,
    ),
)


def _short_outcome(outcome: Outcome) -> str:
    """Return ``describe_outcome`` without paths, error numbers and line breaks."""
    text = describe_outcome(outcome).replace("\n", " ")
    return re.sub(r"\[Errno -?\d+\] |:? '/?[\w.].*", "", text)


def main() -> None:
    """Print a table of every escape's outcome with and without the sandbox."""
    missing = host.isolation_gaps()
    print(f"isolation that does not hold here: {', '.join(missing) or 'none'}\n")
    print("| attempt | in the sandbox | without the sandbox |\n|---|---|---|")
    with Sandbox() as sandbox:
        for escape in ESCAPES:
            with tempfile.TemporaryDirectory() as folder, new_world(Path(folder, "home")) as world:
                outcome = run_in_sandbox(escape, world, sandbox)
                in_sandbox = "**ESCAPED**" if escape.succeeded(world, outcome) else "held"
                without_sandbox = "not run"
            if escape.run_control:
                with (
                    tempfile.TemporaryDirectory() as folder,
                    new_world(Path(folder, "home")) as world,
                ):
                    without_sandbox = (
                        "succeeds"
                        if escape.succeeded(world, run_without_sandbox(escape, world))
                        else "?"
                    )
            print(
                f"| {escape.name} | {in_sandbox}: {_short_outcome(outcome)} | {without_sandbox} |"
            )


if __name__ == "__main__":
    main()
