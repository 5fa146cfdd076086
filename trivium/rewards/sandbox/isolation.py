"""Locking a process up for good, with what Linux offers to everyone: no root, no dependency.

Three walls. *Landlock* decides which files can be opened, *seccomp* which system calls can be made,
*namespaces* (where the machine permits them) take the network's interfaces away a second time.
None can be undone by the process or by anything it starts. Resource limits are ``supervisor``'s.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from .syscalls import MACHINES, Machine

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME = 1, 4, 15
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_SIGKILL = 9


def machine() -> Machine:
    """Return this machine's call numbers; raises OSError where they are not known."""
    found = MACHINES.get(platform.machine())
    if found is None:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()!r}")
    return found


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _syscall(name: str, *arguments: int | bytes | None) -> int:
    number = machine().number[name]
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number), *wide), name)


def give_up_privileges() -> None:
    """Drop every capability, leave no core dump, never gain a right again."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _checked(_libc.capset(header, nothing), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with(parent: int) -> None:
    """Be killed when the parent ends, and end if it has ended already.

    To be called after ``give_up_privileges``: a change of rights takes the signal back.
    """
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of one's descendants whose parents end (PR_SET_CHILD_SUBREAPER)."""
    _prctl(36, 1)


# --- Landlock: files -----------------------------------------------------------------------------

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many file rights each version knows
_BENEATH = 1


def landlock_version() -> int:
    """Return the kernel's version of Landlock, 0 where it has none."""
    try:
        return _syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


class Files:
    """A Landlock rule set: folders and files to read, one folder to work in, all else closed.

    In the working folder plain files can be made, but no folders, links, pipes or sockets: what is
    in it can be counted and removed without following anything. Nothing at all can be executed.
    """

    def __init__(self, version: int, readable: Sequence[str], workplace: str) -> None:
        known = (1 << _RIGHTS_BY_ABI[min(version, 5)]) - 1
        network = 3 if version >= 4 else 0  # no TCP port to bind or to connect to
        scope = 3 if version >= 6 else 0  # no signal to, no abstract socket of, the outside
        size = 8 * (1 + (version >= 4) + (version >= 6))
        attributes = struct.pack("QQQ", known, network, scope)[:size]
        self._rules = _syscall("landlock_create_ruleset", attributes, size, 0)
        for path in readable:
            folder = os.path.isdir(path)
            if os.path.exists(path):
                self._allow(path, _READ_FILE | (_READ_DIR if folder else 0))
        write = _WRITE_FILE | _REMOVE_FILE | _MAKE_FILE | (_TRUNCATE if version >= 3 else 0)
        self._allow(workplace, _READ_FILE | _READ_DIR | write)

    def _allow(self, path: str, rights: int) -> None:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            _syscall(
                "landlock_add_rule", self._rules, _BENEATH, struct.pack("=Qi", rights, place), 0
            )
        finally:
            os.close(place)

    def enforce(self) -> None:
        """Put this process under the rules, for good."""
        _syscall("landlock_restrict_self", self._rules, 0)


# --- seccomp: system calls -----------------------------------------------------------------------

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_CLONE_THREAD = 0x10000
_TRUNCATES, _ACCESS_MODE = os.O_TRUNC, os.O_ACCMODE
# Duplicate, flags, locks; not F_SETOWN, by which a descriptor sends signals to another process.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
# Is it a terminal, how large, how much is to be read, blocking, closed on exec.
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

Instruction = tuple[int, int, int, int]


def _argument(index: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)  # the low half: every one used here is an int


def _answer(verdict: int) -> Instruction:
    return (_RETURN, 0, 0, verdict)


def _one_of(index: int, values: Sequence[int]) -> list[Instruction]:
    """Allow the call where an argument has one of these values."""
    body = [_argument(index)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), _answer(_ALLOW)]
    return [*body, _answer(_REFUSE)]


def _conditions(own: int) -> dict[str, list[Instruction]]:
    """Return what each conditional call is asked, for the process with the number `own`."""
    thread = [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _answer(_ALLOW), _answer(_REFUSE)]
    # Before version 3 Landlock lets a file that may be read be emptied: O_TRUNC needs O_RDWR or so.
    opens = [
        _argument(2),
        (_ANY_BIT, 1, 0, _TRUNCATES),
        _answer(_ALLOW),
        (_ANY_BIT, 0, 1, _ACCESS_MODE),
        _answer(_ALLOW),
        _answer(_REFUSE),
    ]
    return {
        "clone": thread,
        "clone3": [_answer(_UNKNOWN)],  # its flags lie in memory: the C library then asks `clone`
        "openat": opens,
        "fcntl": _one_of(1, _FCNTL),
        "ioctl": _one_of(1, _IOCTL),
        "kill": _one_of(0, (own,)),
        "tgkill": _one_of(0, (own,)),
        "prctl": _one_of(0, (_PR_SET_NAME,)),
        "prlimit64": _one_of(0, (0, own)),
    }


def filter_program(numbers: Machine, own: int) -> list[Instruction]:
    """Return the filter, as instructions of the kernel's packet-filter machine."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, numbers.audit),
        _answer(_KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for number in numbers.free.values():
        program += [(_EQUAL, 0, 1, number), _answer(_ALLOW)]
    for name, body in _conditions(own).items():
        program += [(_EQUAL, 0, len(body), numbers.number[name]), *body]
    return [*program, _answer(_REFUSE)]


def filter_calls() -> None:
    """Put this process and its threads under the filter, for good; needs no_new_privs."""
    install(filter_program(machine(), os.getpid()))


def install(program: Sequence[Instruction]) -> None:
    """Give a filter to the kernel."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _syscall("seccomp", 1, 0, header)


def can_filter_calls() -> bool:
    """Whether the kernel takes the filter, tried in a child."""

    def trial() -> None:
        give_up_privileges()
        filter_calls()

    return _succeeds(trial)


def _succeeds(trial: Callable[[], None]) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            trial()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


# --- Namespaces: a network without interfaces ----------------------------------------------------

_CLONE_NEWUSER, _CLONE_NEWNET, _CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC
    _checked(_libc.unshare(flags), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


def enter_namespaces() -> bool:
    """Move into namespaces of one's own, and return whether that is permitted here.

    It is tried in a child first: halfway in, a process could no longer make files.
    """
    possible = _succeeds(_enter_namespaces)
    if possible:
        _enter_namespaces()
    return possible
