"""The hashing processes: their creation, and the tree process's use of them."""

import fcntl
import mmap
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from appliance.castore.names import NAME_MAX, display
from appliance.errors import ImportTreeError
from appliance.importer.records import HASH_RECORD, HashKind, HashTuple, pack_root_request
from appliance.importer.roots import OpenRoot
from appliance.system.process import Child

_PIPE_SIZE: Final = 1 << 20
_RESULTS_SIZE: Final = 1 << 16
# Files asked for and not yet taken back.
_WINDOW: Final = 1024
# Consecutive files go to one process, in one message.
_GROUP: Final = 32


class HasherEndedError(Exception):
    """A hashing process has ended; its index is `hasher`."""

    def __init__(self, hasher: int) -> None:
        super().__init__(f"hashing process {hasher} has ended")
        self.hasher = hasher


class Hasher:
    """One hashing process and what leads to it; made before any thread or LMDB environment.

    Args:
        index: its number.
        staging: existing directory for the files it stages.
        ring_size: bytes of its ring.
    """

    def __init__(self, index: int, staging: Path, ring_size: int) -> None:
        self.index = index
        self.staging = os.fspath(staging)
        ring = mmap.mmap(-1, ring_size)
        with suppress(OSError):  # a hint, which not every kernel knows
            ring.madvise(mmap.MADV_HUGEPAGE)
        self.ring = memoryview(ring)
        self._returned = os.eventfd(0, os.EFD_CLOEXEC)
        child_requests, self.requests = os.pipe2(os.O_CLOEXEC)
        self.results, child_results = os.pipe2(os.O_CLOEXEC)
        with suppress(PermissionError):  # the user has as much pipe memory as is allowed
            fcntl.fcntl(self.requests, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

        def work() -> None:
            os.close(self.requests)
            os.close(self.results)
            # Loaded here, beside what the other processes load meanwhile.
            from appliance.importer.hasher import HasherLoop  # noqa: PLC0415 - see above

            HasherLoop(child_requests, child_results, self._returned, ring, self.staging).run()

        self.child = Child("a hashing process", work)
        os.close(child_requests)
        os.close(child_results)

    def give_back(self, num_bytes: int) -> None:
        """Free the oldest `num_bytes` of the ring that are in use."""
        os.eventfd_write(self._returned, num_bytes)

    def leave_to_tree(self) -> None:
        """Close what only the tree process uses, so that the ends of the pipes are seen."""
        os.close(self.requests)
        os.close(self.results)

    def close(self) -> None:
        """End the process, and close what `leave_to_tree` does not."""
        self.child.kill()
        os.close(self._returned)


class _Source:
    """What one hashing process has sent, and how much of it was taken."""

    def __init__(self, hasher: Hasher) -> None:
        self.hasher = hasher
        self.ring = hasher.ring
        self.records: list[HashTuple] = []
        self.num_taken = 0
        # Whether it was told the root of the tree in hand.
        self.has_root = False
        self._data = b""
        self._num_passed = 0
        self._rest = b""

    def read(self) -> None:
        """Wait for more; all that was read before is taken, and passed on."""
        data = os.read(self.hasher.results, _RESULTS_SIZE)
        if not data:
            raise HasherEndedError(self.hasher.index)
        data = self._rest + data
        whole = len(data) - len(data) % HASH_RECORD.size
        self._data, self._rest = data[:whole], data[whole:]
        self.records = list(HASH_RECORD.iter_unpack(self._data))
        self.num_taken = self._num_passed = 0

    def pass_on(self) -> bytes:
        """Return, packed, the records taken since the last time."""
        taken = self._data[self._num_passed * HASH_RECORD.size : self.num_taken * HASH_RECORD.size]
        self._num_passed = self.num_taken
        return taken


class _Group(NamedTuple):
    """A message of requests that is being served."""

    source: _Source
    num_files: int
    size_bytes: int


class HasherPool:
    """Asks for files to be hashed, in turns; takes the results back in the order of asking.

    Args:
        hashers: the processes. They wait in turn for the bytes of their rings, so what was taken
            must be passed on before each `wait`.
    """

    def __init__(self, hashers: Sequence[Hasher]) -> None:
        self._sources = [_Source(hasher) for hasher in hashers]
        self._turn = 0
        self._root: OpenRoot | None = None
        # Requests not sent yet; the directory of the last file among them.
        self._unsent: list[bytes] = []
        self._num_unsent_files = 0
        self._unsent_bytes = 0
        self._directory = b""
        self._groups: deque[_Group] = deque()
        # Of the oldest group.
        self._num_served = 0
        self._num_in_flight = 0
        self._in_flight_bytes = 0
        # A pipe can be half empty and full: a write does not share a page with the one before
        # it if it does not fit. A quarter in flight and a quarter to come always fit.
        sizes = [fcntl.fcntl(hasher.requests, fcntl.F_GETPIPE_SZ) for hasher in hashers]
        self._limit_bytes = min(sizes) // 4

    def has_room(self) -> bool:
        """Whether another file may be asked for now."""
        return self._num_in_flight < _WINDOW and self._in_flight_bytes < self._limit_bytes

    def begin_root(self, root: OpenRoot) -> None:
        """Go on to another tree; nothing of the one before is asked for any more."""
        self._root = root
        for source in self._sources:
            source.has_root = False

    def request(self, directory: bytes, name: bytes) -> None:
        """Ask for a file, by the path of its directory from the root and its name.

        Raises:
            ImportTreeError: the path is too long.
            HasherEndedError: the process has ended.
        """
        size = len(name) + 1
        if not self._unsent or directory != self._directory:
            if len(directory) >= self._limit_bytes - NAME_MAX - 3:
                shown = display(directory[:80])
                raise ImportTreeError(f"{shown}...: the path is too long to import")
            size += len(directory) + 2
            self._unsent.append(b"/" + directory)
            self._directory = directory
        self._unsent.append(name)
        self._unsent_bytes += size
        self._in_flight_bytes += size
        self._num_in_flight += 1
        self._num_unsent_files += 1
        if self._num_unsent_files >= _GROUP:
            self.send()

    def send(self) -> None:
        """Send what was asked for.

        Raises:
            HasherEndedError: the process has ended.
        """
        if not self._unsent:
            return
        source = self._sources[self._turn]
        root = b"" if source.has_root or self._root is None else pack_root_request(self._root)
        source.has_root = True
        data = memoryview(b"%b%b\0" % (root, b"\0".join(self._unsent)))
        self._groups.append(_Group(source, self._num_unsent_files, self._unsent_bytes))
        self._turn = (self._turn + 1) % len(self._sources)
        self._unsent.clear()
        self._num_unsent_files = self._unsent_bytes = 0
        try:
            while data:
                data = data[os.write(source.hasher.requests, data) :]
        except BrokenPipeError as exc:
            raise HasherEndedError(source.hasher.index) from exc

    def has_received(self) -> bool:
        """Whether the next record is here; `take` has it then, and `wait` is the way to it."""
        if not self._groups:
            self.send()
        source = self._groups[0].source
        return source.num_taken < len(source.records)

    def wait(self) -> None:
        """Wait for a process; the records taken so far must have been passed on.

        Raises:
            HasherEndedError: the process has ended.
        """
        self._groups[0].source.read()

    def take(self) -> tuple[memoryview, HashTuple]:
        """Return the next record of the oldest file asked for, and the ring that it is about."""
        group = self._groups[0]
        source = group.source
        record = source.records[source.num_taken]
        source.num_taken += 1
        if record[0] != HashKind.PIECE:
            self._num_in_flight -= 1
            self._num_served += 1
            if self._num_served == group.num_files:
                self._groups.popleft()
                self._num_served = 0
                self._in_flight_bytes -= group.size_bytes
        return source.ring, record

    def taken(self) -> Iterator[tuple[int, bytes]]:
        """Yield, by hashing process, packed, the records taken since the last time."""
        for source in self._sources:
            if records := source.pass_on():
                yield source.hasher.index, records

    def is_idle(self) -> bool:
        """Whether nothing is asked for."""
        return not self._groups and not self._unsent
