"""Programs that try to break out of the sandbox.

Each escape is run twice: sealed, and by a plain interpreter. `seen` looks at the world, not at what
the program says, wherever there is something to see. ``python tests/helpers/sandbox_escapes.py`` prints the table
of outcomes that docs/host.md shows.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from helpers.external import (
    SECRET,
    Escape,
    World,
    new_world,
    run_plainly,
    run_sealed,
    shown,
    time_passes,
)
from trivium.rewards.sandbox import host
from trivium.rewards.sandbox.host import Limits, Outcome, Sandbox


def _connected(world: World, outcome: Outcome) -> bool:
    return world.connected()


def _written(world: World, outcome: Outcome) -> bool:
    return world.written()


def _changed(world: World, outcome: Outcome) -> bool:
    return world.changed()


def _signalled(world: World, outcome: Outcome) -> bool:
    return world.signalled()


def _told(world: World, outcome: Outcome) -> bool:
    return SECRET.encode() in outcome.output


_QUICK = Limits(seconds=0.2, wall=0.4, memory=256)
_NO = "PermissionError"

ESCAPES = (
    # Network
    Escape("TCP to loopback", "socket.create_connection(('127.0.0.1', W['tcp']))", _NO, _connected),
    Escape(
        "UDP to loopback",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', W['udp']))",
        _NO,
        _connected,
    ),
    Escape(
        "abstract Unix socket",
        "socket.socket(socket.AF_UNIX).connect(W['abstract'])",
        _NO,
        _connected,
    ),
    Escape(
        "named Unix socket",
        "socket.socket(socket.AF_UNIX).connect(W['home'] + '/socket')",
        _NO,
        _connected,
    ),
    Escape(
        "name server (DNS)",
        "print(socket.getaddrinfo('localhost', 80) and 'escaped')",
        "gaierror",
    ),
    Escape("listening", "socket.create_server(('', 0)); print('escaped')", _NO),
    Escape("socket pair", "socket.socketpair(); print('escaped')", _NO),
    Escape(
        "io_uring, which makes calls that no filter sees",
        "call(libc.syscall(425, 8, bytes(120))); print('escaped')",
        _NO,
        control=False,
    ),
    # Reading
    Escape("a file in the home folder", "print(open(W['home'] + '/key').read())", _NO, _told),
    Escape("a folder's names", "print(os.listdir(W['home']) and 'escaped')", _NO),
    Escape("/etc/passwd", "open('/etc/passwd').read(); print('escaped')", _NO),
    Escape(
        "the caller's environment in /proc",
        "print(open(f'/proc/{W[\"caller\"]}/environ').read())",
        _NO,
        lambda world, outcome: b"PATH=" in outcome.output,
    ),
    Escape(
        "the supervisor's memory in /proc",
        "open(f'/proc/{os.getppid()}/mem', 'rb'); print('escaped')",
        _NO,
    ),
    Escape("the processes in /proc", "os.listdir('/proc'); print('escaped')", _NO),
    Escape("a secret in the environment", "print(dict(os.environ))", "LANG", _told),
    Escape(
        "a folder above by '..'",
        "os.chdir(W['home']); print(open('outside/../key').read())",
        _NO,
        _told,
    ),
    Escape(
        "inherited descriptors",
        "from stat import *\n"
        "for n in range(256):\n"
        "    try: os.lseek(n, 0, 0); print(os.read(n, 100))\n"
        "    except OSError: pass",
        "b''",
        _told,
    ),
    Escape(
        "process_vm_readv of the caller",
        "b = ctypes.create_string_buffer(8); v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
        "call(libc.process_vm_readv(W['caller'], v, 1, v, 1, 0)); print('escaped')",
        _NO,
        control=False,
    ),
    # Writing
    Escape("a file outside", "open(W['outside'] + '/x', 'w').write('x')", _NO, _written),
    Escape("overwriting a file", "open(W['home'] + '/file', 'w').write('x')", _NO, _changed),
    Escape("emptying a file", "os.truncate(W['home'] + '/file', 0)", _NO, _changed),
    Escape(
        "removing a file",
        "os.remove(W['home'] + '/key')",
        _NO,
        lambda w, o: not (w.home / "key").exists(),
    ),
    Escape(
        "a symbolic link to the outside",
        "os.symlink(W['outside'], 'link'); open('link/x', 'w').write('x')",
        _NO,
        _written,
    ),
    Escape("a hard link to a file outside", "os.link(W['home'] + '/file', 'link')", _NO, _changed),
    Escape(
        "moving a file out",
        "open('x', 'w').close(); os.rename('x', W['outside'] + '/x')",
        _NO,
        _written,
    ),
    Escape("chmod", "os.chmod(W['home'] + '/file', 0o777)", _NO, _changed),
    Escape("chown", "os.chown(W['home'] + '/file', 65534, 65534)", _NO, _changed, control=False),
    Escape("utime", "os.utime(W['home'] + '/file', (0, 0))", _NO, _changed),
    Escape(
        "a file in /tmp",
        "p = f'/tmp/trivium-test-{os.getpid()}'\nopen(p, 'w'); os.remove(p); print('escaped')",
        _NO,
    ),
    Escape(
        "/dev/shm",
        "p = f'/dev/shm/trivium-{os.getpid()}'\nopen(p, 'w'); os.remove(p); print('escaped')",
        _NO,
    ),
    Escape("a folder of its own", "os.mkdir('d'); print('escaped')", _NO),
    Escape("a named pipe", "os.mkfifo('p'); print('escaped')", _NO),
    Escape("a device", "os.mknod('d', 0o60600, os.makedev(254, 0))", _NO, control=False),
    # Other processes
    Escape("a signal to the caller", "os.kill(W['caller'], 10)", _NO, _signalled),
    Escape(
        "a signal by rt_sigqueueinfo",
        "i = (ctypes.c_int * 32)(10, 0, -1); call(libc.syscall(129, W['caller'], 10, i))",
        _NO,
        _signalled,
    ),
    Escape(
        "a signal by the owner of a pipe (F_SETOWN)",
        "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, W['caller'])\n"
        "fcntl.fcntl(r, 10, 10); fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')",
        _NO,
        _signalled,
    ),
    Escape("a signal to every process", "os.kill(-1, 10)", _NO, _signalled, control=False),
    Escape(
        "a limit of the caller's",
        "import resource\nresource.prlimit(W['caller'], resource.RLIMIT_CORE); print('escaped')",
        _NO,
    ),
    Escape(
        "ptrace of the caller",
        "call(libc.ptrace(16, W['caller'], 0, 0)); print('escaped')",
        _NO,
        control=False,
    ),
    Escape("a process of its own", "os.fork() or os._exit(0); print('escaped')", _NO),
    Escape(
        "a shell",
        "import subprocess\nprint(subprocess.run(['/bin/sh', '-c', 'echo escaped']))",
        _NO,
    ),
    Escape(
        "another program in its place",
        "os.execv('/bin/sh', ['sh', '-c', 'echo escaped'])",
        _NO,
    ),
    Escape(
        "multiprocessing",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()\n"
        "print('escaped')",
        _NO,
    ),
    Escape(
        "a daemon that outlives the program",
        "if not os.fork():\n    os.setsid()\n    if not os.fork():\n"
        "        os.close(1); os.close(2); time.sleep(0.2); open(W['outside'] + '/x', 'w')\n"
        "    os._exit(0)",
        _NO,
        lambda world, outcome: time_passes() or world.written(),
    ),
    Escape(
        "a fork bomb",
        "while True:\n    try: os.fork()\n    except OSError as e: print(type(e).__name__); break",
        _NO,
        control=False,
    ),
    # Rights
    Escape("root, by setuid", "os.setuid(0); print('escaped')", _NO, control=False),
    Escape(
        "a user namespace",
        "call(libc.unshare(0x10000000)); print('escaped')",
        _NO,
        control=False,
    ),
    Escape(
        "a mount",
        "call(libc.mount(b'none', b'/mnt', b'tmpfs', 0, None)); print('escaped')",
        _NO,
        control=False,
    ),
    Escape("chroot", "os.chroot('.'); print('escaped')", _NO, control=False),
    Escape(
        "more memory than its limit",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('escaped')",
        "ValueError: not allowed to raise maximum limit",
    ),
    Escape(
        "System V shared memory",
        "i = call(libc.shmget(0, 4096, 0o1600)); libc.shmctl(i, 0, None); print('escaped')",
        _NO,
    ),
    Escape(
        "kernel keys", "call(libc.syscall(250, 0, -3, 1)); print('escaped')", _NO, control=False
    ),
    Escape("bpf", "call(libc.syscall(321, 0, 0, 0)); print('escaped')", _NO, control=False),
    Escape(
        "calls of the 32-bit machine, which have other numbers",
        "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid); int 0x80; ret
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n"
        "print(f() and 'escaped')",
        "status -31",
        control=False,
    ),
    # Resources
    Escape("an endless loop", "while True: pass", "time", control=False, limits=_QUICK),
    Escape("an endless sleep", "time.sleep(60)", "time", control=False, limits=_QUICK),
    Escape(
        "an endless loop that ignores signals",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "time",
        control=False,
        limits=_QUICK,
    ),
    Escape(
        "an endless loop in C",
        "sum(iter(int, 1))",
        "time",
        control=False,
        limits=_QUICK,
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
        "files",
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
        control=False,
    ),
    Escape(
        "a crash, with a core dump",
        "ctypes.string_at(0)",
        "status -11",
        lambda world, outcome: any(Path.cwd().glob("core*")),
        control=False,
    ),
)


def _brief(outcome: Outcome) -> str:
    """Return ``shown`` without paths, numbers of errors and line breaks."""
    text = shown(outcome).replace("\n", " ")
    return re.sub(r"\[Errno -?\d+\] |:? '/?[\w.].*", "", text)


def main() -> None:
    """Print every escape with what came of it, sealed and by a plain interpreter."""
    missing = host.isolation_gaps()
    print(f"isolation that does not hold here: {', '.join(missing) or 'none'}\n")
    print("| attempt | sealed | without the seal |\n|---|---|---|")
    with Sandbox() as place:
        for escape in ESCAPES:
            with tempfile.TemporaryDirectory() as folder, new_world(Path(folder, "home")) as world:
                outcome = run_sealed(escape, world, place)
                sealed = "**ESCAPED**" if escape.happened(world, outcome) else "held"
                plain = "not run"
            if escape.control:
                with (
                    tempfile.TemporaryDirectory() as folder,
                    new_world(Path(folder, "home")) as world,
                ):
                    plain = (
                        "succeeds" if escape.happened(world, run_plainly(escape, world)) else "?"
                    )
            print(f"| {escape.name} | {sealed}: {_brief(outcome)} | {plain} |")


if __name__ == "__main__":
    main()
