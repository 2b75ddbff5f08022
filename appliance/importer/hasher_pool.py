"""The hashing processes, seen from outside: how they are started, and how files are requested.

`Hasher` is one hashing process with its pipes and its ring. The tree process requests files from
all of them through a `HasherPool`, in turns of 32 files, and receives the results in the order of
the requests.
"""

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
from appliance.importer.records import HASH_RECORD, INNER_KINDS, HashTuple, pack_root_request
from appliance.importer.roots import OpenRoot
from appliance.system.process import Child

# Bytes that the pipe of requests is to hold, and bytes of results read at once.
_PIPE_SIZE: Final = 1 << 20
_RESULTS_SIZE: Final = 1 << 16
# Maximum number of files requested and not received.
_IN_FLIGHT_MAX: Final = 1024
# Number of consecutive files that one process gets in one message.
_GROUP_SIZE: Final = 32


class HasherEndedError(Exception):
    """The hashing process of index `hasher` has ended."""

    def __init__(self, hasher: int) -> None:
        super().__init__(f"hashing process {hasher} has ended")
        self.hasher = hasher


class Hasher:
    """One hashing process, its pipes and its ring.

    It is forked here, so no thread and no LMDB environment may exist yet.

    Args:
        index: its position among the hashing processes.
        staging: existing directory for the files that it stages.
        ring_size: size of its ring in bytes.
    """

    def __init__(self, index: int, staging: Path, ring_size: int) -> None:
        self.index = index
        self.staging = os.fspath(staging)
        ring = mmap.mmap(-1, ring_size)
        with suppress(OSError):  # only a hint, and not every kernel supports it
            ring.madvise(mmap.MADV_HUGEPAGE)
        self.ring = memoryview(ring)
        self._returned = os.eventfd(0, os.EFD_CLOEXEC)
        child_requests, self.requests = os.pipe2(os.O_CLOEXEC)
        self.results, child_results = os.pipe2(os.O_CLOEXEC)
        with suppress(PermissionError):  # the user's limit of memory for pipes is reached
            fcntl.fcntl(self.requests, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

        def work() -> None:
            os.close(self.requests)
            os.close(self.results)
            # Imported here, while the other processes import what they need.
            from appliance.importer.hasher import HasherLoop  # noqa: PLC0415 - see above

            HasherLoop(child_requests, child_results, self._returned, ring, self.staging).run()

        self.child = Child("a hashing process", work)
        os.close(child_requests)
        os.close(child_results)

    def give_back(self, num_bytes: int) -> None:
        """Let the process reuse the oldest `num_bytes` of its ring that are in use."""
        os.eventfd_write(self._returned, num_bytes)

    def leave_to_tree(self) -> None:
        """Close the ends of the pipes that only the tree process uses.

        Without this, the pipes would not end when the tree process does.
        """
        os.close(self.requests)
        os.close(self.results)

    def close(self) -> None:
        """Kill the process, and close what `leave_to_tree` leaves open."""
        self.child.kill()
        os.close(self._returned)


class _Source:
    """The records that one hashing process has sent, and how many of them were taken."""

    def __init__(self, hasher: Hasher) -> None:
        self.hasher = hasher
        self.ring = hasher.ring
        self.records: list[HashTuple] = []
        self.num_taken = 0
        # Whether the process has been sent the root of the current tree.
        self.has_root = False
        self._data = b""
        self._num_passed = 0
        self._rest = b""

    def read(self) -> None:
        """Wait for more records; all earlier ones must have been taken and passed on.

        Raises:
            HasherEndedError: the process has ended.
        """
        data = os.read(self.hasher.results, _RESULTS_SIZE)
        if not data:
            raise HasherEndedError(self.hasher.index)
        data = self._rest + data
        whole = len(data) - len(data) % HASH_RECORD.size
        self._data, self._rest = data[:whole], data[whole:]
        self.records = list(HASH_RECORD.iter_unpack(self._data))
        self.num_taken = self._num_passed = 0

    def pass_on(self) -> bytes:
        """Return the records taken since the last call, packed."""
        taken = self._data[self._num_passed * HASH_RECORD.size : self.num_taken * HASH_RECORD.size]
        self._num_passed = self.num_taken
        return taken


class _Group(NamedTuple):
    """A message of requests that has been sent to one process."""

    source: _Source
    num_files: int
    size_bytes: int


class HasherPool:
    """Requests files from the hashing processes, and receives the results in the same order.

    Before each `wait`, the records taken so far must be passed on to the committing process: a
    hashing process may itself be waiting for the bytes of its ring that these records use.

    Args:
        hashers: the processes; each of them gets the next group of files in turn.
    """

    def __init__(self, hashers: Sequence[Hasher]) -> None:
        self._sources = [_Source(hasher) for hasher in hashers]
        self._turn = 0
        self._root: OpenRoot | None = None
        # Requests that have not been sent, and the directory of the last file among them.
        self._unsent: list[bytes] = []
        self._num_unsent_files = 0
        self._unsent_bytes = 0
        self._directory = b""
        self._groups: deque[_Group] = deque()
        # Files of the oldest group that were received.
        self._num_served = 0
        self._num_in_flight = 0
        self._in_flight_bytes = 0
        # A write must never block, since nobody would receive results meanwhile. A pipe may be full
        # when half of its bytes are unused, because a write that does not fit into the last page
        # begins a new one. A quarter in flight and a quarter to be written always fit.
        sizes = [fcntl.fcntl(hasher.requests, fcntl.F_GETPIPE_SZ) for hasher in hashers]
        self._limit_bytes = min(sizes) // 4

    def has_room(self) -> bool:
        """Return whether another file may be requested now."""
        return self._num_in_flight < _IN_FLIGHT_MAX and self._in_flight_bytes < self._limit_bytes

    def begin_root(self, root: OpenRoot) -> None:
        """Begin another tree; the pool must be idle."""
        self._root = root
        for source in self._sources:
            source.has_root = False

    def request(self, directory: bytes, name: bytes) -> None:
        """Request a file; it is sent with the next group.

        Args:
            directory: path of its directory, relative to the root.
            name: its name in that directory.

        Raises:
            ImportTreeError: the path is too long.
            HasherEndedError: the process has ended.
        """
        size = len(name) + 1
        if not self._unsent or directory != self._directory:
            if len(directory) >= self._limit_bytes - NAME_MAX - 3:
                shown = display(directory[:80])
                raise ImportTreeError(
                    f"{shown}...: the path has {len(directory)} bytes, too many to import"
                )
            size += len(directory) + 2
            self._unsent.append(b"/" + directory)
            self._directory = directory
        self._unsent.append(name)
        self._unsent_bytes += size
        self._in_flight_bytes += size
        self._num_in_flight += 1
        self._num_unsent_files += 1
        if self._num_unsent_files >= _GROUP_SIZE:
            self.send()

    def send(self) -> None:
        """Send the requests that have not been sent, as a group.

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
        """Return whether `take` can be called; if it cannot, `wait` must be called first."""
        if not self._groups:
            self.send()
        source = self._groups[0].source
        return source.num_taken < len(source.records)

    def wait(self) -> None:
        """Wait for records of the oldest group; those taken so far must have been passed on.

        Raises:
            HasherEndedError: the process has ended.
        """
        self._groups[0].source.read()

    def take(self) -> tuple[memoryview, HashTuple]:
        """Return the next record of the oldest requested file, and the ring that it refers to."""
        group = self._groups[0]
        source = group.source
        record = source.records[source.num_taken]
        source.num_taken += 1
        if record[0] not in INNER_KINDS:
            self._num_in_flight -= 1
            self._num_served += 1
            if self._num_served == group.num_files:
                self._groups.popleft()
                self._num_served = 0
                self._in_flight_bytes -= group.size_bytes
        return source.ring, record

    def taken(self) -> Iterator[tuple[int, bytes]]:
        """Yield the index of each hashing process with its records taken since the last call.

        The records are packed.
        """
        for source in self._sources:
            if records := source.pass_on():
                yield source.hasher.index, records

    def is_idle(self) -> bool:
        """Return whether all requested files have been received."""
        return not self._groups and not self._unsent
