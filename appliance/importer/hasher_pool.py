"""The hashing processes: their creation, and the tree process's use of them."""

import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance.errors import ImportTreeError
from appliance.importer.child import Child
from appliance.importer.hasher import HasherLoop
from appliance.importer.records import HASH_RECORD, HashKind, HashRecord
from appliance.importer.walk import display

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        self.staging = staging
        ring = mmap.mmap(-1, ring_size)
        self.ring = memoryview(ring)
        self._returned = os.eventfd(0, os.EFD_CLOEXEC)
        child_requests, self.requests = os.pipe2(os.O_CLOEXEC)
        self.results, child_results = os.pipe2(os.O_CLOEXEC)
        with suppress(PermissionError):  # the user has as much pipe memory as is allowed
            fcntl.fcntl(self.requests, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

        def work() -> None:
            os.close(self.requests)
            os.close(self.results)
            HasherLoop(child_requests, child_results, self._returned, ring, staging).run()

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


class _Group(NamedTuple):
    """A message of requests that is being served."""

    hasher: Hasher
    num_files: int
    size_bytes: int


class HasherPool:
    """Asks for files to be hashed, in turns; takes the results back in the order of asking.

    Args:
        hashers: the processes.
        before_waiting: called before each wait for a process, which may itself wait for what the
            caller has not passed on yet.
    """

    def __init__(self, hashers: Sequence[Hasher], before_waiting: Callable[[], None]) -> None:
        self._hashers = hashers
        self._before_waiting = before_waiting
        self._turn = 0
        self._unsent: list[bytes] = []
        self._groups: deque[_Group] = deque()
        # Of the oldest group.
        self._num_served = 0
        self._num_in_flight = 0
        self._in_flight_bytes = 0
        self._records: list[Iterator[HashRecord]] = [iter(()) for _ in hashers]
        self._rests = [b"" for _ in hashers]
        # A pipe can be half empty and full: a write does not share a page with the one before
        # it if it does not fit. A quarter in flight and a quarter to come always fit.
        sizes = [fcntl.fcntl(hasher.requests, fcntl.F_GETPIPE_SZ) for hasher in hashers]
        self._limit_bytes = min(sizes) // 4

    def is_low(self) -> bool:
        """Whether so little is asked for that the processes may soon be idle."""
        return self._num_in_flight < _WINDOW // 2 and self._in_flight_bytes < self._limit_bytes // 2

    def has_room(self) -> bool:
        """Whether another file may be asked for now."""
        return self._num_in_flight < _WINDOW and self._in_flight_bytes < self._limit_bytes

    def request(self, path: bytes) -> None:
        """Ask for a file.

        Raises:
            ImportTreeError: the path is too long.
            HasherEndedError: the process has ended.
        """
        if len(path) >= self._limit_bytes:
            raise ImportTreeError(f"{display(path[:80])}...: the path is too long to import")
        self._unsent.append(path)
        self._num_in_flight += 1
        self._in_flight_bytes += len(path) + 1
        if len(self._unsent) >= _GROUP:
            self.send()

    def send(self) -> None:
        """Send what was asked for.

        Raises:
            HasherEndedError: the process has ended.
        """
        if not self._unsent:
            return
        hasher = self._hashers[self._turn]
        data = memoryview(b"\0".join([*self._unsent, b""]))
        self._groups.append(_Group(hasher, len(self._unsent), len(data)))
        self._turn = (self._turn + 1) % len(self._hashers)
        self._unsent.clear()
        try:
            while data:
                data = data[os.write(hasher.requests, data) :]
        except BrokenPipeError as exc:
            raise HasherEndedError(hasher.index) from exc

    def receive(self) -> tuple[Hasher, HashRecord]:
        """Return the next record of the oldest file asked for, and whose it is.

        Raises:
            HasherEndedError: the process has ended.
        """
        if not self._groups:
            self.send()
        hasher = self._groups[0].hasher
        record = next(self._records[hasher.index], None)
        while record is None:
            self._read_records(hasher)
            record = next(self._records[hasher.index], None)
        if record.kind != HashKind.PIECE:
            self._finish_file()
        return hasher, record

    def is_idle(self) -> bool:
        """Whether nothing is asked for."""
        return not self._groups and not self._unsent

    def _read_records(self, hasher: Hasher) -> None:
        self._before_waiting()
        data = os.read(hasher.results, _RESULTS_SIZE)
        if not data:
            raise HasherEndedError(hasher.index)
        data = self._rests[hasher.index] + data
        whole = len(data) - len(data) % HASH_RECORD.size
        self._rests[hasher.index] = data[whole:]
        records = HASH_RECORD.iter_unpack(data[:whole])
        self._records[hasher.index] = map(HashRecord._make, records)

    def _finish_file(self) -> None:
        self._num_in_flight -= 1
        self._num_served += 1
        group = self._groups[0]
        if self._num_served == group.num_files:
            self._groups.popleft()
            self._num_served = 0
            self._in_flight_bytes -= group.size_bytes
