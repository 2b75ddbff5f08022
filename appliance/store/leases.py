"""Leases: what a running session or import holds on to, for garbage collection to keep.

A lease is a text file, `leases/ID` in the directory of the store, in the form of `root_lists`. Its
head says whose it is; below are the store paths that the session was granted, in that order:

    # A lease; it ends when no process holds a flock(2) on this file.
    #: all no
    #: kind session
    #: of /run/vm1.sock
    #: view web                                 (if the session is given a view)
    #: boot 5f8b1c0e-6f0e-4a0f-9a51-3c8a4d7f2b11
    #: process 4711 1234567
    #: since 1760000000000000000
    5ndavkqr4ai2xn3pkdl1blgmnqmn4wlq-hello-2.12

Whoever has the lease holds a shared flock on an open file description. Processes that get the
descriptor, by a fork or through a socket, hold the same lock; so the lease ends with the last of
them, even by kill -9 or a crash of the host, and the collector removes a file that it can lock
exclusively itself. Boot, pid and start time (proc(5), `starttime`) are there for people.

A path is written down before the guest can use it (`hold`), and then looked up once more; see
`root_lists` for the order. Where the disk is too full to write it down, the lease is made to hold
all paths instead, by overwriting a word of the head, for which no block is needed. A lease without
a head holds all paths, too.
"""

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from appliance.errors import StoreError, disk_error
from appliance.nix.store_path import StorePath
from appliance.store.root_lists import open_roots_lock, read_listed, roots_locked
from appliance.store.schema import LEASES_DIRECTORY
from appliance.system.process import start_ticks

_BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_HEAD: Final = "# A lease; it ends when no process holds a flock(2) on this file.\n#: all "
_NOT_ALL: Final = "no \n"
_ALL: Final = b"yes\n"


class LeaseKind(StrEnum):
    """Whose a lease is; the words are in its file."""

    SESSION = "session"
    IMPORT = "import"


class LeaseState(NamedTuple):
    """A lease as the collector finds it.

    Args:
        lease_id: the name of its file.
        kind: whose it is, a word of `LeaseKind`.
        owner: the socket or mount of a session; empty for an import.
        since_ns: when it began, CLOCK_REALTIME in nanoseconds.
        holds_all: whether it holds every path of the store.
        paths: the paths that it holds.
    """

    lease_id: str
    kind: str
    owner: str
    since_ns: int
    holds_all: bool
    paths: Sequence[StorePath]


class Lease:
    """A lease of this process; threads may share it. Owns its descriptors.

    Attributes:
        lease_id: the name of its file.
        fd: the descriptor (lent) that holds the lock, to be passed to a process that takes over.
        view: the view that the session is given, or None.
    """

    def __init__(
        self, store_path: Path, lease_id: str, fd: int, held: Iterable[bytes], view: str | None
    ) -> None:
        self.lease_id = lease_id
        self.fd = fd
        self.view = view
        self._path = store_path / LEASES_DIRECTORY / lease_id
        self._held = set(held)
        self._holds_all = False
        try:
            self._roots_fd = open_roots_lock(store_path)
        except BaseException:
            os.close(fd)
            raise
        self._writing = threading.Lock()

    @classmethod
    def begin(
        cls, store_path: Path, kind: LeaseKind, owner: str = "", *, view: str | None = None
    ) -> "Lease":
        """Begin a lease that holds no path yet.

        Args:
            store_path: directory of the store.
            kind: whose it is.
            owner: the socket or mount of a session, for people.
            view: the view that the session is given, or None.

        Raises:
            StoreError: this user may not write to the store, or the disk failed.
        """
        directory = store_path / LEASES_DIRECTORY
        lease_id = f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            directory.mkdir(mode=0o755, exist_ok=True)
            # The collector must not find the file before it is locked.
            with roots_locked(store_path, is_exclusive=False):
                flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(directory / lease_id, flags, 0o644)
                fcntl.flock(fd, fcntl.LOCK_SH)
                lease = cls(store_path, lease_id, fd, (), view)
                lease._begin(_head(kind, owner, view))
                return lease
        except OSError as exc:
            raise disk_error(exc, directory) from exc

    @classmethod
    def adopt(cls, store_path: Path, fd: int) -> "Lease":
        """Take over a lease that another process began, and own `fd`, which holds its lock.

        Raises:
            StoreError: its file breaks a rule, or the disk failed.
        """
        path = Path(f"/proc/self/fd/{fd}").readlink()
        held = [name.basename().encode() for name in read_listed(path).paths]
        view = _head_of(path).get("view")
        return cls(store_path, path.name, fd, held, view)

    @classmethod
    def find(cls, store_path: Path, lease_id: str) -> int:
        """Return a descriptor for `adopt`, owned by the caller, of a lease that others hold.

        Raises:
            OSError: it has ended, or it is being removed.
        """
        path = store_path / LEASES_DIRECTORY / lease_id
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def shared_fd(self) -> int:
        """Return a descriptor, owned by the caller, that holds the lease and cannot be written to.

        Raises:
            OSError: there is no free descriptor.
        """
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd

    def __len__(self) -> int:
        """Return the number of paths that are held."""
        return len(self._held)

    @property
    def holds_all(self) -> bool:
        """Whether every path of the store is held, because the disk was full."""
        return self._holds_all

    def hold(self, names: Iterable[bytes]) -> bool:
        """Write down that the session is about to be granted the paths with these base names.

        Nothing is written for a session that is given a view: what it can be granted is in the
        view, which is a root, and it loses what is removed from that.

        This may wait for the collector, for as long as one of its commits takes.

        Returns:
            Whether any of them was not held before, so that it must be looked up once more.

        Raises:
            StoreError: they cannot be written down, so they must not be granted.
        """
        with self._writing:
            if self.view is not None:
                return False
            new = [name for name in dict.fromkeys(names) if name not in self._held]
            if not new:
                return False
            fcntl.flock(self._roots_fd, fcntl.LOCK_SH)
            try:
                if not self._holds_all:
                    self._append(b"".join(name + b"\n" for name in new))
            finally:
                fcntl.flock(self._roots_fd, fcntl.LOCK_UN)
            self._held.update(new)
            return True

    def leave(self) -> None:
        """Close the descriptors; the lease goes on if another process has taken it over."""
        os.close(self._roots_fd)
        os.close(self.fd)

    def close(self) -> None:
        """End the lease, and remove its file."""
        with suppress(OSError):  # the collector removes what stays
            self._path.unlink()
        self.leave()

    def _begin(self, head: bytes) -> None:
        try:
            _write(self.fd, head)
        except OSError:  # the disk is full, and a lease without a head holds all paths
            self._holds_all = True

    def _append(self, lines: bytes) -> None:
        size = os.fstat(self.fd).st_size
        try:
            _write(self.fd, lines)
        except OSError:
            try:
                os.ftruncate(self.fd, size)
                self._hold_all()
            except OSError as exc:
                raise disk_error(exc, self._path) from exc

    def _hold_all(self) -> None:
        # Through a descriptor without O_APPEND, with which pwrite(2) would append.
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, _ALL, len(_HEAD))
        finally:
            os.close(fd)
        self._holds_all = True


def living_leases(store_path: Path) -> Iterator[LeaseState]:
    """Yield the leases that a process holds, and remove the files of the others.

    The caller holds the lock of the roots exclusively (`root_lists.roots_locked`).

    Raises:
        StoreError: a file breaks a rule, or the disk failed.
    """
    directory = store_path / LEASES_DIRECTORY
    try:
        lease_ids = sorted(os.listdir(directory))  # noqa: PTH208 - names are all that is needed
    except FileNotFoundError:
        return
    for lease_id in lease_ids:
        path = directory / lease_id
        try:
            if _is_held(path):
                yield _read_state(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as exc:
            raise disk_error(exc, path) from exc


def _is_held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _head_of(path: Path) -> dict[str, str]:
    head: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8", errors="backslashreplace") as file:
            for line in file:
                if not line.startswith("#"):
                    break
                if line.startswith("#:"):
                    key, _, value = line[2:].strip().partition(" ")
                    head[key] = value.strip()
    except FileNotFoundError:  # its owner has just ended it
        pass
    return head


def _read_state(path: Path) -> LeaseState:
    head = _head_of(path)
    since = head.get("since", "0")
    if not since.isdecimal():
        raise StoreError(f"{path}: since {since}: expected a number of nanoseconds")
    return LeaseState(
        path.name,
        head.get("kind", LeaseKind.SESSION),
        head.get("of", ""),
        int(since),
        head.get("all") != "no",
        read_listed(path).paths,
    )


def _head(kind: LeaseKind, owner: str, view: str | None) -> bytes:
    pid = os.getpid()
    lines = [
        f"#: kind {kind}",
        *([f"#: of {' '.join(owner.splitlines())}"] if owner else []),
        *([f"#: view {view}"] if view else []),
        f"#: boot {_BOOT_ID_FILE.read_text().strip()}",
        f"#: process {pid} {start_ticks(pid)}",
        f"#: since {time.time_ns()}",
    ]
    return f"{_HEAD}{_NOT_ALL}{chr(10).join(lines)}\n".encode("utf-8", "backslashreplace")


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
