"""The importing process's side of the hashing processes."""

import fcntl
import mmap
import os
import signal
import traceback
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, Self

from appliance.errors import ImportTreeError
from appliance.importer.hasher import HasherLoop
from appliance.importer.records import NO_STAGED, RECORD, Kind, Record
from appliance.importer.walk import display
from appliance.worker.process import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator

_RING_SIZE: Final = 16 << 20
_PIPE_SIZE: Final = 1 << 18
_RESULTS_SIZE: Final = 1 << 16
# Content is given back in steps of this, so that its process never waits for a whole ring.
_RETURN_BYTES: Final = 1 << 20
# Files asked for and not yet taken back.
_WINDOW: Final = 1024
# Consecutive files go to one process, in one message.
_GROUP: Final = 32


class _Group(NamedTuple):
    """A message of requests that is being served."""

    hasher: "_Hasher"
    num_files: int
    size_bytes: int


class _Hasher:
    """One hashing process: its pid, our ends of its pipes, its ring."""

    def __init__(self, staging: Path) -> None:
        self.staging = staging
        self.ring = mmap.mmap(-1, _RING_SIZE)
        self.view = memoryview(self.ring)
        child_requests, self.requests = os.pipe2(os.O_CLOEXEC)
        self._results, child_results = os.pipe2(os.O_CLOEXEC)
        self._returned = os.eventfd(0, os.EFD_CLOEXEC)
        with suppress(PermissionError):  # the user has as much pipe memory as is allowed
            fcntl.fcntl(self.requests, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self.pipe_size = fcntl.fcntl(self.requests, fcntl.F_GETPIPE_SZ)
        self._rest = b""
        self._records: Iterator[Record] = iter(())
        self._used_bytes = 0
        parent_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.requests)
            os.close(self._results)
            loop = HasherLoop(child_requests, child_results, self._returned, self.ring, staging)
            _run_child(loop, parent_pid)
        os.close(child_requests)
        os.close(child_results)

    def send(self, paths: list[bytes]) -> int:
        """Ask for `paths`; return the size of the message. The pipe must have room for it."""
        data = memoryview(b"\0".join([*paths, b""]))
        size = len(data)
        try:
            while data:
                data = data[os.write(self.requests, data) :]
        except BrokenPipeError:
            self._raise_ended()
        return size

    def receive(self) -> Record:
        """Return the next record, waiting for it; its content is there until the next call.

        Raises:
            ImportTreeError: the process has ended.
        """
        if self._used_bytes >= _RETURN_BYTES:
            self._give_back()
        record = next(self._records, None)
        while record is None:
            self._give_back()
            self._read_records()
            record = next(self._records, None)
        self._used_bytes += record.used
        return record

    def kill(self) -> None:
        """End the process, whatever it does, and close its pipes.

        The ring goes with the last view of it.
        """
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        for fd in (self.requests, self._results, self._returned):
            os.close(fd)

    def _give_back(self) -> None:
        if self._used_bytes:
            os.eventfd_write(self._returned, self._used_bytes)
            self._used_bytes = 0

    def _read_records(self) -> None:
        data = os.read(self._results, _RESULTS_SIZE)
        if not data:
            self._raise_ended()
        data = self._rest + data
        whole = len(data) - len(data) % RECORD.size
        self._rest = data[whole:]
        self._records = map(Record._make, RECORD.iter_unpack(data[:whole]))

    def _raise_ended(self) -> NoReturn:
        # Left a zombie, for `kill`: the pid stays its own.
        exited = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        code = exited.si_status
        how = f"status {code}" if exited.si_code == os.CLD_EXITED else signal.Signals(code).name
        raise HasherEndedError(f"a hashing process ended ({how}); start the import again")


class HasherEndedError(ImportTreeError):
    """A hashing process has ended, so nothing more can be imported."""


class Piece(NamedTuple):
    """A record with its content, and where the staged file is, if there is one."""

    record: Record
    content: memoryview
    staged: Path | None


class HasherPool:
    """A few hashing processes that serve files in turns; results come in the order of asking.

    Must be made before this process has threads or an LMDB environment.
    """

    def __init__(self, staging: Path, num_hashers: int) -> None:
        self._hashers: list[_Hasher] = []
        self._turn = 0
        self._unsent: list[bytes] = []
        self._groups: deque[_Group] = deque()
        # Of the oldest group.
        self._num_served = 0
        self._num_in_flight = 0
        self._in_flight_bytes = 0
        try:
            for number in range(num_hashers):
                directory = staging / str(number)
                directory.mkdir(mode=0o700)
                self._hashers.append(_Hasher(directory))
        except BaseException:
            self.close()
            raise
        # A pipe can be half empty and full: a write does not share a page with the one before
        # it if it does not fit. A quarter in flight and a quarter to come always fit.
        self._limit_bytes = min(hasher.pipe_size for hasher in self._hashers) // 4

    def is_low(self) -> bool:
        """Whether so little is asked for that the processes may soon be idle."""
        return self._num_in_flight < _WINDOW // 2

    def has_room(self) -> bool:
        """Whether another file may be asked for now."""
        return self._num_in_flight < _WINDOW and self._in_flight_bytes < self._limit_bytes

    def request(self, path: bytes) -> None:
        """Ask for a file.

        Raises:
            ImportTreeError: the path is too long.
        """
        if len(path) >= self._limit_bytes:
            raise ImportTreeError(f"{display(path[:80])}...: the path is too long to import")
        self._unsent.append(path)
        self._num_in_flight += 1
        self._in_flight_bytes += len(path) + 1
        if len(self._unsent) >= _GROUP:
            self.send()

    def send(self) -> None:
        """Send what was asked for."""
        if self._unsent:
            hasher = self._hashers[self._turn]
            size = hasher.send(self._unsent)
            self._groups.append(_Group(hasher, len(self._unsent), size))
            self._turn = (self._turn + 1) % len(self._hashers)
            self._unsent.clear()

    def receive(self) -> Piece:
        """Return the next piece of the oldest file asked for; valid until the next call.

        Raises:
            ImportTreeError: the process has ended.
        """
        if not self._groups:
            self.send()
        hasher = self._groups[0].hasher
        record = hasher.receive()
        if record.kind != Kind.PIECE:
            self._finish_file()
        content = hasher.view[record.offset : record.offset + record.size]
        if record.staged == NO_STAGED:
            return Piece(record, content, None)
        return Piece(record, content, hasher.staging / str(record.staged))

    def drain(self) -> None:
        """Take back all that was asked for, and remove what was staged."""
        while self._groups or self._unsent:
            piece = self.receive()
            if piece.staged is not None and piece.record.kind == Kind.LAST:
                piece.staged.unlink(missing_ok=True)

    def close(self) -> None:
        """End the processes."""
        for hasher in self._hashers:
            hasher.kill()
        self._hashers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _finish_file(self) -> None:
        self._num_in_flight -= 1
        self._num_served += 1
        group = self._groups[0]
        if self._num_served == group.num_files:
            self._groups.popleft()
            self._num_served = 0
            self._in_flight_bytes -= group.size_bytes


def _run_child(loop: HasherLoop, parent_pid: int) -> NoReturn:
    status = 1
    try:
        die_with_parent(parent_pid)
        # Ctrl-C reaches the whole foreground group; the parent decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        loop.run()
        status = 0
    except Exception:  # noqa: BLE001 -- the parent learns of it by the status; os._exit drops it
        traceback.print_exc()
    finally:
        os._exit(status)
