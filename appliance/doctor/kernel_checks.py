"""What the kernel offers: calls that serving and importing need, and layers of the sandbox."""

import mmap
import os
import platform
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.doctor.findings import SERVING, Finding, Use, advice, good, lacking
from appliance.doctor.trial import attempt
from appliance.system import landlock, libc, seccomp

# The number is the same on all architectures. linux/openat2.h: struct open_how, and its flags that
# no path may leave the directory and none may contain a symlink.
_OPENAT2: Final = 437
_OPEN_HOW: Final = struct.Struct("=QQQ")
_RESOLVE_BENEATH: Final = 0x08
_RESOLVE_NO_SYMLINKS: Final = 0x04
# From this ABI on, Landlock also covers signals and abstract sockets.
_LANDLOCK_WHOLE: Final = 6
_NAMESPACES: Final = libc.CLONE_NEWNET | libc.CLONE_NEWIPC | libc.CLONE_NEWUTS
_USERNS_SWITCHES: Final = {
    "kernel/apparmor_restrict_unprivileged_userns": "0",
    "kernel/unprivileged_userns_clone": "1",
    "user/max_user_namespaces": "10000",
}
_NEWER_KERNEL: Final = "boot a newer kernel"


def kernel_checks() -> Iterator[Finding]:
    """Yield what the kernel offers."""
    yield _memory_files()
    yield _channels()
    yield _openat2()
    yield _landlock()
    yield _seccomp()
    yield _namespaces()
    yield _user_change()


def _memory_files() -> Finding:
    subject = "memory files (memfd_create)"

    def work() -> str:
        fd = os.memfd_create("trial", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            memory[:4] = b"text"
        return "can be made and mapped"

    uses = SERVING | {Use.IMPORT}
    trial = attempt(work)
    if trial.is_success:
        return good(subject, uses, trial.text)
    return lacking(subject, uses, trial.text, _NEWER_KERNEL)


def _channels() -> Finding:
    subject = "descriptors over Unix sockets (SCM_RIGHTS)"

    def work() -> str:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(ours, [b"x"], [ours.fileno()])
        _data, fds, _flags, _address = socket.recv_fds(theirs, 1, 1)
        if not fds:
            raise OSError("no descriptor arrived")
        return "pass"

    trial = attempt(work)
    if trial.is_success:
        return good(subject, SERVING, trial.text)
    return lacking(subject, SERVING, trial.text, "let the service use AF_UNIX sockets")


def _openat2() -> Finding:
    subject = "opening below a directory (openat2)"

    def work() -> str:
        how = _OPEN_HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS)
        root = os.open("/", os.O_PATH)
        libc.system_call(_OPENAT2, root, b"proc", how, len(how))
        return "works"

    trial = attempt(work)
    if trial.is_success:
        return good(subject, {Use.IMPORT}, trial.text)
    remedy = "boot Linux 5.6 or newer, and let the container's seccomp profile allow openat2"
    return lacking(subject, {Use.IMPORT}, trial.text, remedy)


# --- The layers of the sandbox ---


def _landlock() -> Finding:
    subject = "Landlock"
    remedy = "boot with lsm=landlock,... on the kernel's command line (Linux 5.13 or newer)"
    version = landlock.abi()
    if not version:
        return advice(subject, SERVING, "not available; workers go without it", remedy)

    def work() -> str:
        libc.set_no_new_privileges()
        landlock.allow_only_reading(version, os.open("/proc", os.O_PATH))
        try:
            os.close(os.open("/", os.O_RDONLY))
        except PermissionError:
            return f"ABI {version}, and it denies what it should"
        raise OSError(f"ABI {version}, but a directory outside of the rules could be opened")

    trial = attempt(work)
    if not trial.is_success:
        return advice(subject, SERVING, trial.text, remedy)
    if version < _LANDLOCK_WHOLE:
        found = f"{trial.text}; ABI {_LANDLOCK_WHOLE} also covers signals and abstract sockets"
        return advice(subject, SERVING, found, "boot Linux 6.12 or newer")
    return good(subject, SERVING, trial.text)


def _seccomp() -> Finding:
    subject = "filters of system calls (seccomp)"
    remedy = "boot a kernel with CONFIG_SECCOMP_FILTER on x86-64 or 64-bit ARM"
    if not seccomp.is_supported():
        return advice(subject, SERVING, f"no filters for {platform.machine()}", remedy)

    def work() -> str:
        libc.set_no_new_privileges()
        libc.set_seccomp_filter(seccomp.program(("write", "exit_group")))
        os.getppid()
        return "a call that the filter forbids was made"

    trial = attempt(work)
    if trial.killed_by == signal.SIGSYS:
        return good(subject, SERVING, "kill what makes a forbidden call")
    return advice(subject, SERVING, trial.text, remedy)


def _namespaces() -> Finding:
    """Try what the fork server does; see `worker/sandbox.py`."""
    if libc.effective_capabilities() >> libc.CAP_SYS_ADMIN & 1:
        subject, flags = "namespaces", _NAMESPACES
    else:
        subject, flags = "unprivileged user namespaces", _NAMESPACES | libc.CLONE_NEWUSER

    def work() -> str:
        libc.unshare(flags)
        return "can be made"

    trial = attempt(work)
    if trial.is_success:
        return good(subject, SERVING, trial.text)
    return advice(subject, SERVING, f"{trial.text}; workers go without", _namespace_remedy())


def _namespace_remedy() -> str:
    for name, wanted in _USERNS_SWITCHES.items():
        try:
            value = Path("/proc/sys", name).read_text().strip()
        except OSError:
            continue
        is_closed = value != "0" if wanted == "0" else value == "0"
        if is_closed:
            return f"sysctl -w {name.replace('/', '.')}={wanted}"
    return "let the container's seccomp profile or the service manager allow unshare(2)"


def _user_change() -> Finding:
    subject = "workers as another user"
    needed = {
        "CAP_SETUID": libc.CAP_SETUID,
        "CAP_SETGID": libc.CAP_SETGID,
        "CAP_KILL": libc.CAP_KILL,
    }
    capabilities = libc.effective_capabilities()
    missing = [name for name, bit in needed.items() if not capabilities >> bit & 1]
    if not missing:
        return good(subject, SERVING, "possible")
    found = f"this user lacks {' and '.join(missing)}; workers stay the user who serves"
    if os.geteuid() != 0:
        # Somebody who serves as a user of their own has chosen so.
        return good(subject, SERVING, found)
    remedy = f"add {' '.join(missing)} to the capabilities of the container or service"
    return advice(subject, SERVING, found, remedy)
