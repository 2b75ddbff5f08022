"""Locking a process down before it reads what it does not trust.

The layers, each of which is enough to keep a process that was taken over from most of the rest, so
that none is essential: a kernel or a service manager that refuses one does not keep the program
from serving.

* Namespaces. The fork server moves to new ones for the network, IPC and the host name, once for all
  its children, because a network namespace is large. Without CAP_SYS_ADMIN this takes a user
  namespace.
* Landlock. At most the files below one directory can be opened, for reading; no TCP; no abstract
  sockets of other processes; and, unless it has to end children of the fork server, no signals to
  others.
* User. If the supervisor is root, the process becomes a user who owns nothing, without groups.
  Otherwise it stays the user it was. It has no capabilities in either case.
* System calls. All but those that a process of its kind needs are refused and kill it, on x86-64
  and 64-bit ARM. The log says which call it was.

The order matters: namespaces and another user need privileges, a change of user makes the kernel
forget the parent-death signal, and the filter of system calls refuses all these steps.

Whatever the process still needs after that must be loaded and open before, since it can neither
import a module nor open a file elsewhere: `rehearse` makes the interpreter load what it loads late.
"""

import errno
import fcntl
import logging
import mmap
import os
import signal
import time
import traceback
from typing import Final, NamedTuple

from appliance.system import landlock, libc, seccomp

_LOG = logging.getLogger(__name__)

_TO_CHANGE_USER: Final = (libc.CAP_SETUID, libc.CAP_SETGID, libc.CAP_KILL)
_NAMESPACES: Final = libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS
# asm-generic/ioctls.h: set non-blocking and close-on-exec.
_FIONBIO: Final = 0x5421
_FIOCLEX: Final = 0x5451
_WRITING: Final = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC | (os.O_TMPFILE & ~os.O_DIRECTORY)
_FCNTL_COMMANDS: Final = (
    fcntl.F_GETFD,
    fcntl.F_SETFD,
    fcntl.F_GETFL,
    fcntl.F_SETFL,
    fcntl.F_GETLK,  # LMDB knows its readers by locks on lock.mdb
    fcntl.F_SETLK,
    fcntl.F_DUPFD_CLOEXEC,
)

# What the interpreter and the C library call for themselves, and event loops, LMDB and workers
# for their work. Memory that can be written or mapped never becomes executable.
COMMON_RULES: Final[tuple[seccomp.Rule, ...]] = (
    "read",
    "write",
    "writev",  # replies to /dev/fuse, and the C library's last words before abort(3)
    "pread64",
    "preadv",
    "preadv2",  # what os.preadv uses where the kernel has it
    "close",
    "fstat",
    "newfstatat",
    "statx",
    "fstatfs",
    "epoll_wait",
    "epoll_pwait",
    "epoll_ctl",
    "poll",
    "ppoll",
    "recvmsg",
    "sendmsg",
    "sendto",  # a call descriptor may be a socket
    "getsockname",  # the representation of a socket, which is made when one is left to be closed
    "getpeername",
    "futex",
    "brk",
    "munmap",
    "mremap",
    "madvise",
    "clock_gettime",
    "gettimeofday",
    "getrandom",
    "getpid",
    "gettid",
    "getuid",
    "geteuid",
    "getgid",
    "getegid",
    seccomp.AllBut("rt_sigaction", 0, signal.SIGSYS),  # its handler notes what was refused
    "rt_sigprocmask",
    "rt_sigreturn",
    "sigaltstack",
    "restart_syscall",
    "sched_yield",
    "exit",
    "exit_group",
    seccomp.NoneOf("openat", 2, _WRITING),
    seccomp.NoneOf("mmap", 2, mmap.PROT_EXEC),
    seccomp.NoneOf("mprotect", 2, mmap.PROT_EXEC),
    seccomp.AnyOf("fcntl", 1, _FCNTL_COMMANDS),
    seccomp.AnyOf("ioctl", 1, (_FIONBIO, _FIOCLEX)),
    seccomp.AnyOf("prlimit64", 0, (0,)),
)


class Confinement(NamedTuple):
    """What a kind of process keeps."""

    kind: str
    """What logs call processes of this kind."""
    rules: tuple[seccomp.Rule, ...]
    """The system calls that it may make."""
    readable_fd: int | None
    """A descriptor (lent) of the directory below which it may open files, if any."""
    may_signal: bool
    """Whether Landlock lets it send signals to other processes."""
    parent_pid: int | None
    """The process whose death ends it, if any."""


# Shared by all children of a fork server: which kinds have logged how they are locked down.
_has_reported: Final = mmap.mmap(-1, 256)


# --- In the fork server ---


class Surroundings(NamedTuple):
    """What processes get from their fork server."""

    may_change_user: bool
    """Whether they may become another user."""
    namespaces_obstacle: str
    """Why they have no namespaces of their own, or empty if they have them."""


UNCONFINED: Final = Surroundings(may_change_user=False, namespaces_obstacle="not asked for")


def enter_namespaces() -> Surroundings:
    """Move this process to namespaces of its own, which its children share."""
    capabilities = libc.effective_capabilities()
    # A supervisor without CAP_KILL could not kill processes of another user.
    may_change_user = all(capabilities >> each & 1 for each in _TO_CHANGE_USER)
    obstacle = ""
    try:
        if capabilities >> libc.CAP_SYS_ADMIN & 1:
            libc.unshare(_NAMESPACES)
        elif capabilities:
            # A new user namespace would take them away, and its children may need them to open
            # the store or to become another user.
            obstacle = "needs CAP_SYS_ADMIN"
        else:
            libc.unshare(_NAMESPACES | libc.CLONE_NEWUSER)
    except OSError as exc:
        obstacle = exc.strerror or str(exc)
    return Surroundings(may_change_user, obstacle)


def rehearse() -> None:
    """Have the interpreter load what logging an event with a traceback or the time needs."""
    time.localtime()
    try:
        raise AssertionError
    except AssertionError:
        traceback.format_exc()


# --- In its children ---


def confine(confinement: Confinement, surroundings: Surroundings, user: tuple[int, int]) -> None:
    """Take away from this process all that it does not keep; see above.

    Args:
        confinement: what it keeps.
        surroundings: what `enter_namespaces` returned in the fork server.
        user: the uid and gid to become, where that is possible.

    Raises:
        OSError: a layer that this kernel has could not be applied.
    """
    libc.set_no_new_privileges()
    version = landlock.abi()
    if version:
        landlock.allow_only_reading(
            version, confinement.readable_fd, may_signal=confinement.may_signal
        )
    user_obstacle = _change_user(user, surroundings)
    libc.drop_capabilities()
    if confinement.parent_pid is not None:
        libc.signal_on_parent_death(signal.SIGKILL, confinement.parent_pid)
    libc.forbid_dumps()
    filter_obstacle = _filter_system_calls(confinement.rules)
    place = sum(confinement.kind.encode()) % len(_has_reported)
    if not _has_reported[place]:
        _has_reported[place] = 1
        # Each layer with the reason why it is missing, or an empty text.
        _report(
            confinement.kind,
            {
                "no capabilities": "",
                "own namespaces": surroundings.namespaces_obstacle,
                "another user": user_obstacle,
                f"Landlock ABI {version}": ""
                if version
                else "refused by the kernel or a filter of system calls",
                "a filter of system calls": filter_obstacle,
            },
        )


def _change_user(user: tuple[int, int], surroundings: Surroundings) -> str:
    if not surroundings.may_change_user:
        return "needs CAP_SETUID, CAP_SETGID and CAP_KILL"
    try:
        os.setgroups([])
        uid, gid = user
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as exc:  # the root of a user namespace where there is no other user
        return exc.strerror or str(exc)
    return ""


def _filter_system_calls(rules: tuple[seccomp.Rule, ...]) -> str:
    if not seccomp.is_supported():
        return f"not made for {os.uname().machine}"
    # abort(3) signals its own process.
    own = seccomp.AnyOf("tgkill", 0, (os.getpid(),))
    try:
        libc.set_seccomp_filter(seccomp.program((*rules, own)))
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return "the kernel has none"
    return ""


def _report(kind: str, layers: dict[str, str]) -> None:
    applied = ", ".join(layer for layer, obstacle in layers.items() if not obstacle)
    missing = ", ".join(f"{layer} ({obstacle})" for layer, obstacle in layers.items() if obstacle)
    not_here = f"; not possible here: {missing}" if missing else ""
    _LOG.info("%s are locked down: %s%s", kind, applied, not_here)
