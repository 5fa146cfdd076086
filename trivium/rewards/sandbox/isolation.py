"""Isolation of a process with Linux features that need neither root nor dependencies.

There are three layers. *Landlock* restricts which files can be opened, *seccomp* restricts system
calls, and *namespaces* (if the machine permits them) also remove the network interfaces. Neither
the process nor its children can undo them. ``supervisor`` sets resource limits.
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
    """Return this machine's system call numbers; raise OSError if they are unknown."""
    calls = MACHINES.get(platform.machine())
    if calls is None:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()!r}")
    return calls


def _check_result(result: int, operation: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{operation}: {os.strerror(number)}")
    return result


def _prctl(option: int, value: int) -> None:
    _check_result(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _syscall(name: str, *arguments: int | bytes | None) -> int:
    number = machine().numbers[name]
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check_result(_libc.syscall(ctypes.c_long(number), *converted), name)


def give_up_privileges() -> None:
    """Drop all capabilities, disable core dumps and forbid new privileges."""
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break
    header, no_capabilities = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check_result(_libc.capset(header, no_capabilities), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_DUMPABLE, 0)


def die_with_parent(parent: int) -> None:
    """Kill this process when its parent ends, or exit if the parent has already ended.

    Call this after ``give_up_privileges``, because a change of privileges clears the signal.
    """
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants (PR_SET_CHILD_SUBREAPER)."""
    _prctl(36, 1)


# --- Landlock: files -----------------------------------------------------------------------------

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_WRITE_FILE, _REMOVE_FILE, _MAKE_FILE, _TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of file rights in each version
_BENEATH = 1


def landlock_version() -> int:
    """Return the kernel's Landlock version, or 0 without Landlock."""
    try:
        return _syscall("landlock_create_ruleset", None, 0, 1)
    except OSError:
        return 0


class LandlockRules:
    """Landlock rule set: readable paths, one work folder, and no access to anything else.

    Programs can create regular files in the work folder, but no folders, links, pipes or sockets,
    so its content can be counted and removed without following links. Nothing can be executed.
    """

    def __init__(self, version: int, readable: Sequence[str], work_folder: str) -> None:
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
        self._allow(work_folder, _READ_FILE | _READ_DIR | write)

    def _allow(self, path: str, rights: int) -> None:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            _syscall(
                "landlock_add_rule",
                self._rules,
                _BENEATH,
                struct.pack("=Qi", rights, descriptor),
                0,
            )
        finally:
            os.close(descriptor)

    def enforce(self) -> None:
        """Apply the rules to this process irreversibly."""
        _syscall("landlock_restrict_self", self._rules, 0)


# --- seccomp: system calls -----------------------------------------------------------------------

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_REFUSE, _UNKNOWN = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_CLONE_THREAD = 0x10000
_TRUNCATES, _ACCESS_MODE = os.O_TRUNC, os.O_ACCMODE
# Duplicate, flags, locks; not F_SETOWN, which makes a descriptor send signals to a process.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
# Terminal check, window size, readable bytes, blocking mode, close-on-exec.
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

Instruction = tuple[int, int, int, int]


def _argument(index: int) -> Instruction:
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)  # the low half: all arguments used here are ints


def _return(action: int) -> Instruction:
    return (_RETURN, 0, 0, action)


def _one_of(index: int, values: Sequence[int]) -> list[Instruction]:
    """Allow the call if an argument has one of these values."""
    body = [_argument(index)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), _return(_ALLOW)]
    return [*body, _return(_REFUSE)]


def _conditions(own_pid: int) -> dict[str, list[Instruction]]:
    """Return the conditions of each conditional call, for the process with the ID `own_pid`."""
    thread = [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _return(_ALLOW), _return(_REFUSE)]
    # Landlock before version 3 lets a readable file be truncated: require write mode for O_TRUNC.
    opens = [
        _argument(2),
        (_ANY_BIT, 1, 0, _TRUNCATES),
        _return(_ALLOW),
        (_ANY_BIT, 0, 1, _ACCESS_MODE),
        _return(_ALLOW),
        _return(_REFUSE),
    ]
    return {
        "clone": thread,
        "clone3": [
            _return(_UNKNOWN)
        ],  # its flags are in memory; the C library falls back to `clone`
        "openat": opens,
        "fcntl": _one_of(1, _FCNTL),
        "ioctl": _one_of(1, _IOCTL),
        "kill": _one_of(0, (own_pid,)),
        "tgkill": _one_of(0, (own_pid,)),
        "prctl": _one_of(0, (_PR_SET_NAME,)),
        "prlimit64": _one_of(0, (0, own_pid)),
    }


def filter_program(calls: Machine, own_pid: int) -> list[Instruction]:
    """Return the filter as instructions of classic BPF."""
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, calls.audit),
        _return(_KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for number in calls.unconditional.values():
        program += [(_EQUAL, 0, 1, number), _return(_ALLOW)]
    for name, body in _conditions(own_pid).items():
        program += [(_EQUAL, 0, len(body), calls.numbers[name]), *body]
    return [*program, _return(_REFUSE)]


def enforce_filter() -> None:
    """Apply the filter to this process and its threads irreversibly; needs no_new_privs."""
    install(filter_program(machine(), os.getpid()))


def install(program: Sequence[Instruction]) -> None:
    """Install a filter in the kernel."""
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _syscall("seccomp", 1, 0, header)


def can_filter_calls() -> bool:
    """Return whether the kernel accepts the filter; a child process tries it."""

    def trial() -> None:
        give_up_privileges()
        enforce_filter()

    return _succeeds_in_child(trial)


def _succeeds_in_child(trial: Callable[[], None]) -> bool:
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
_CLONE_NEWNS = 0x00020000
_MOUNT_FLAGS, _REMOUNT, _DETACH = 0b1110, 32, 2  # no set-user-ID, no devices, no execution
_MAX_INODES = 4096


def _enter_namespaces() -> None:
    user, group = os.geteuid(), os.getegid()
    flags = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC
    _check_result(_libc.unshare(flags), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


def enter_namespaces() -> bool:
    """Enter new namespaces and return whether the machine permits it.

    A child process tries it first, because a process that fails halfway can no longer create files.
    """
    permitted = _succeeds_in_child(_enter_namespaces)
    if permitted:
        _enter_namespaces()
    return permitted


class WorkMount:
    """Small file system in memory over the work folder; other processes do not see it.

    Its size bounds all files together, also those that are unlinked and still open. Create it after
    ``enter_namespaces``; ``exists`` is False where the machine does not permit a mount.
    """

    def __init__(self, path: str) -> None:
        self._path = path.encode()
        self.exists = _libc.unshare(_CLONE_NEWNS) == 0 and self._mount(_MOUNT_FLAGS, 1 << 20)

    def _mount(self, flags: int, size: int) -> bool:
        options = f"size={size},nr_inodes={_MAX_INODES},mode=700".encode()
        kind = b"tmpfs"
        return _libc.mount(kind, self._path, kind, ctypes.c_ulong(flags), options) == 0

    def resize(self, size: int) -> None:
        """Set the size in bytes; the file system must not hold more."""
        if self.exists and not self._mount(_MOUNT_FLAGS | _REMOUNT, size):
            raise OSError(ctypes.get_errno(), "the work folder cannot be resized")

    def remove(self) -> None:
        """Remove the file system, so that the folder can be removed."""
        if self.exists:
            _libc.umount2(self._path, _DETACH)
