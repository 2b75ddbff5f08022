"""What code that has taken over a process tries there, as expressions for `tests.fakes.probed`."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

READ_ONLY, READ_WRITE = "os.O_RDONLY", "os.O_RDWR"


def opening(path: Path | str, flags: str = READ_ONLY) -> str:
    return f"os.open({str(path)!r}, {flags})"


def reading(store: Path, sibling: int, lease_ids: Sequence[str]) -> dict[str, str]:
    """Return attempts to read that fail with an error even in a process without a filter.

    Args:
        store: the store that is served; it has a list of roots called "kept".
        sibling: the pid of another worker.
        lease_ids: those of leases in the store.
    """
    data = f"{store}/data.mdb"
    return {
        "a file of the host": opening("/etc/passwd"),
        "a secret of the host": opening("/etc/shadow"),
        "the database": opening(data),
        "the database by its descriptor": f"os.open('/proc/self/fd/%d' % open_files.get("
        f"{data!r}, 0), {READ_ONLY})",
        "the lock file": opening(f"{store}/lock.mdb"),
        "a list of roots": opening(f"{store}/roots/kept"),
        "the lock of the roots": opening(f"{store}/roots.lock"),
        **{f"lease {name}": opening(f"{store}/leases/{name}") for name in lease_ids},
        "a program": opening(sys.executable),
        "memory of a sibling": opening(f"/proc/{sibling}/mem"),
        "environment of a sibling": opening(f"/proc/{sibling}/environ"),
        **{
            f"{name} of a sibling's session": opening(f"/proc/{sibling}/fd/{fd}")
            for name, fd in memory_files(sibling).items()
        },
    }


def acting(store: Path, sibling: int, supervisor: int, sock: Path) -> dict[str, str]:
    """Return attempts at what no worker has to do.

    Args:
        store: the store that is served.
        sibling: the pid of another worker.
        supervisor: the pid of the supervisor.
        sock: a socket of the supervisor.
    """
    data = f"{store}/data.mdb"
    by_descriptor = f"'/proc/self/fd/%d' % open_files.get({data!r}, 0)"
    connect = "socket.socket({}).connect({!r})"
    return {
        "write the database": opening(data, READ_WRITE),
        "write it by its descriptor": f"os.open({by_descriptor}, {READ_WRITE})",
        "write a file": opening("/tmp/written-by-a-worker", "os.O_WRONLY | os.O_CREAT"),
        "connect by TCP": connect.format("socket.AF_INET", ("127.0.0.1", 9)),
        "bind TCP": "socket.socket().bind(('127.0.0.1', 0))",
        "connect to the supervisor": connect.format("socket.AF_UNIX", str(sock)),
        "inspect a sibling": f"call('ptrace', 0x4206, {sibling}, None, None)",
        "signal a sibling": f"os.kill({sibling}, 0)",
        "signal the supervisor": f"os.kill({supervisor}, 0)",
        "execute": "os.execv('/bin/true', ['true'])",
        "mount": "call('mount', b'none', b'/mnt', b'tmpfs', 0, None)",
        "become root": "os.setresuid(0, 0, 0)",
        "read memory of a sibling": READ_A_SIBLING.format(sibling),
    }


def memory_files(pid: int) -> dict[str, int]:
    """Return the descriptors of files in memory that a process has, by their names."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = os.fspath(entry.readlink())
        if target.startswith("/memfd:"):
            found[target.removeprefix("/memfd:").partition(" ")[0]] = int(entry.name)
    assert {"session", "grants"} <= found.keys()
    return found


# As /proc/PID/mem, but by a system call.
READ_A_SIBLING: Final = (
    "call('process_vm_readv', {}, (ctypes.c_size_t * 2)(id(attempt), 8), 1, "
    "(ctypes.c_size_t * 2)(id(attempt), 8), 1, 0)"
)
# The system call that an attempt is refused for.
CALLS: Final = {
    "write a file": "openat",
    "connect by TCP": "socket",
    "inspect a sibling": "ptrace",
    "signal a sibling": "kill",
    "execute": "execve",
    "mount": "mount",
    "map memory to execute": "mmap",
    "read memory of a sibling": "process_vm_readv",
    "handle what was refused": "rt_sigaction",
}
# Attempts beside those of `acting`, which the filter of system calls refuses.
DEADLY: Final = {
    "take a descriptor of a sibling": "call('syscall', 438, 0, 0, 0)",
    "handle what was refused": "signal.signal(signal.SIGSYS, signal.SIG_IGN)",
    "fork": "os.fork()",
    "map memory to execute": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "make memory executable": "call('mprotect', ctypes.c_void_p(0x1000), 4096, 5)",
    "set up asynchronous signals": "fcntl.fcntl(0, fcntl.F_SETOWN, 1)",
    "type into the terminal": "fcntl.ioctl(2, 0x5412, b'x')",
    "make a socket": "socket.socket(socket.AF_UNIX)",
    "make a user namespace": "call('unshare', 0x10000000)",
    "limit the supervisor": "call('prlimit', 1, 7, None, None)",
    "signal itself by number": "call('syscall', 234, 1, 1, 0)",
}


def check_call(log: str, kind: str, name: str) -> None:
    """Check that the log says which system call a process was killed for."""
    (line,) = (line for line in log.splitlines() if "killed by SIGSYS" in line)
    killed = rf"{kind} \d+ was killed by SIGSYS, for a use of system call \d+ \((\w+)\)"
    found = re.search(killed, line)
    assert found, line
    assert found[1] == CALLS.get(name, found[1])
