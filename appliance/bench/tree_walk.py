"""What a file system holds: walked through FUSE requests, or through system calls on a mount."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeVar

from appliance.bench import fuse_requests
from appliance.bench.bench_guest import BenchGuest
from appliance.bench.fuse_requests import DirectoryRecord, ParsedReply
from appliance.bench.generator import ROOM_MAX
from appliance.errors import BenchError
from appliance.fuse_proto._fuse_wire import ENTRY_OUT_SIZE, OPEN_OUT_SIZE, EntryOut

_LISTING_ROOM: Final = 32 << 10
_TARGET_ROOM: Final = 4096
_T = TypeVar("_T")


class Entry(NamedTuple):
    """Something in the tree; `path` is relative to its start, and empty for the start itself.

    `nodeid` and `parent` are those of FUSE requests, and 0 in a tree that is mounted here.
    """

    path: bytes
    mode: int
    size: int
    nodeid: int = 0
    parent: int = 0

    @property
    def name(self) -> bytes:
        """The last component of the path."""
        return self.path.rpartition(b"/")[2]

    @property
    def is_directory(self) -> bool:
        """Whether it is one."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular one."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it is one."""
        return stat.S_ISLNK(self.mode)


class WalkedTree(Protocol):
    """A tree whose entries can be listed and read."""

    def walk(self) -> Iterator[Entry]:
        """Yield every entry, the start first, and each directory before what is in it."""

    def content(self, entry: Entry) -> Iterator[bytes]:
        """Yield the content of a file in pieces."""

    def target(self, entry: Entry) -> bytes:
        """Return where a symlink leads."""


class GuestTree:
    """A tree behind a back-end, from `start` on, a path without a slash at its ends."""

    def __init__(self, guest: BenchGuest, start: str = "") -> None:
        self.guest = guest
        self._start = os.fsencode(start)

    def walk(self) -> Iterator[Entry]:
        """Yield every entry, the start first, and each directory before what is in it."""
        start = self._find_start()
        yield start
        pending = [start] if start.is_directory else []
        while pending:
            directory = pending.pop()
            for entry in self._list(directory):
                yield entry
                if entry.is_directory:
                    pending.append(entry)

    def content(self, entry: Entry) -> Iterator[bytes]:
        """Yield the content of a file in pieces."""
        fh = self.open(entry)
        offset = 0
        size = min(ROOM_MAX, self.guest.max_read)
        while piece := self._body(
            f"READ of {shown(entry.path)} at {offset}",
            self.guest.ask(fuse_requests.read(entry.nodeid, offset, size, fh=fh or 0), room=size),
        ):
            yield piece
            offset += len(piece)
        self.release(entry, fh)

    def target(self, entry: Entry) -> bytes:
        """Return where a symlink leads."""
        reply = self.guest.ask(fuse_requests.readlink(entry.nodeid), room=_TARGET_ROOM)
        return self._body(f"READLINK of {shown(entry.path)}", reply)

    def open(self, entry: Entry) -> int | None:
        """Open a file or directory; return its handle, or None if the back-end needs no opens."""
        make, name = (
            (fuse_requests.opendir, "OPENDIR")
            if entry.is_directory
            else (fuse_requests.open_, "OPEN")
        )
        reply = self.guest.ask(make(entry.nodeid), room=OPEN_OUT_SIZE)
        if reply.error == errno.ENOSYS:
            return None
        what = f"{name} of {shown(entry.path)}"
        return _parsed(what, fuse_requests.parse_open, self._body(what, reply)).fh

    def release(self, entry: Entry, fh: int | None) -> None:
        """Close what `open` has opened."""
        if fh is None:
            return
        make = fuse_requests.releasedir if entry.is_directory else fuse_requests.release
        self.guest.ask(make(entry.nodeid, fh=fh), room=0)

    def _find_start(self) -> Entry:
        reply = self.guest.ask(fuse_requests.getattr_(fuse_requests.ROOT))
        what = "GETATTR of the root"
        attr = _parsed(what, fuse_requests.parse_attr, self._body(what, reply)).attr
        entry = Entry(b"", attr.mode, attr.size, fuse_requests.ROOT)
        for name in filter(None, self._start.split(b"/")):
            found = self._look_up(entry, name)
            entry = Entry(b"", found.attr.mode, found.attr.size, found.nodeid, entry.nodeid)
        return entry

    def _look_up(self, directory: Entry, name: bytes) -> EntryOut:
        what = f"LOOKUP of {shown(name)} in {shown(directory.path)}"
        reply = self.guest.ask(fuse_requests.lookup(directory.nodeid, name), room=ENTRY_OUT_SIZE)
        found = _parsed(what, fuse_requests.parse_entry, self._body(what, reply))
        if found.nodeid == 0:
            raise BenchError(f"{what}: it is not there")
        return found

    def _list(self, directory: Entry) -> Iterator[Entry]:
        fh = self.open(directory)
        offset = 0
        prefix = directory.path + b"/" if directory.path else b""
        while records := self._records(directory, offset, fh or 0):
            for found, record in records:
                offset = record.off
                if record.name in {b".", b".."}:
                    continue
                entry = found if found and found.nodeid else self._look_up(directory, record.name)
                yield Entry(
                    prefix + record.name,
                    entry.attr.mode,
                    entry.attr.size,
                    entry.nodeid,
                    directory.nodeid,
                )
        self.release(directory, fh)

    def _records(
        self, directory: Entry, offset: int, fh: int
    ) -> list[tuple[EntryOut | None, DirectoryRecord]]:
        what = f"listing {shown(directory.path)} at {offset}"
        if not self.guest.has_readdirplus:
            request = fuse_requests.readdir(directory.nodeid, offset, _LISTING_ROOM, fh=fh)
            body = self._body(what, self.guest.ask(request, room=_LISTING_ROOM))
            return [(None, each) for each in _parsed(what, fuse_requests.parse_dirents, body)]
        request = fuse_requests.readdirplus(directory.nodeid, offset, _LISTING_ROOM, fh=fh)
        body = self._body(what, self.guest.ask(request, room=_LISTING_ROOM))
        return list(_parsed(what, fuse_requests.parse_direntplus, body))

    def _body(self, what: str, reply: ParsedReply) -> bytes:
        if reply.error:
            raise BenchError(f"{what}: {os.strerror(reply.error)}")
        return reply.body


class MountedTree:
    """A tree that is mounted here, at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def walk(self) -> Iterator[Entry]:
        """Yield every entry, the start first, and each directory before what is in it."""
        status = self.root.lstat()
        start = Entry(b"", status.st_mode, status.st_size)
        yield start
        pending = [start] if start.is_directory else []
        while pending:
            for entry in self._list(pending.pop()):
                yield entry
                if entry.is_directory:
                    pending.append(entry)

    def content(self, entry: Entry) -> Iterator[bytes]:
        """Yield the content of a file in pieces."""
        with self.place(entry).open("rb", buffering=0) as file:
            while piece := file.read(ROOM_MAX):
                yield piece

    def target(self, entry: Entry) -> bytes:
        """Return where a symlink leads."""
        return os.fsencode(self.place(entry).readlink())

    def place(self, entry: Entry) -> Path:
        """Return the absolute path of an entry."""
        return self.root / os.fsdecode(entry.path)

    def _list(self, directory: Entry) -> Iterator[Entry]:
        prefix = directory.path + b"/" if directory.path else b""
        with os.scandir(self.place(directory)) as entries:
            for each in entries:
                status = each.stat(follow_symlinks=False)
                yield Entry(prefix + os.fsencode(each.name), status.st_mode, status.st_size)


def _parsed(what: str, parse: Callable[[bytes], _T], body: bytes) -> _T:
    try:
        return parse(body)
    except ValueError as exc:
        raise BenchError(f"{what}: {exc}") from exc


def shown(path: bytes) -> str:
    """Return a path for a message, on one line."""
    return repr(os.fsdecode(path)) if path else "the start"
