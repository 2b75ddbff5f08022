"""Importing one tree: its walk and its files' content become a NAR, directories and blobs."""

import hashlib
from collections import deque
from typing import Final, NamedTuple

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.nodes import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SizeDialect,
    SymlinkNode,
)
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.feed import Feed
from appliance.importer.hasher_pool import Hasher
from appliance.importer.records import HashKind, HashRecord
from appliance.importer.walk import Event, Step, walk
from appliance.nar.writer import NarWriter

# Steps of the walk taken ahead of the one in hand, files or not.
_AHEAD_MAX: Final = 4096


class Tree(NamedTuple):
    """What a tree came to; its node has no name."""

    node: Node
    nar_size: int
    nar_sha256: bytes


class _OpenDirectory(NamedTuple):
    """A directory whose entries are being collected, each list in the order of names."""

    name: bytes
    directories: list[DirectoryNode]
    files: list[FileNode]
    symlinks: list[SymlinkNode]


class TreeImport:
    """The import of one tree; its content comes and its objects go through `feed`."""

    def __init__(self, root: bytes, feed: Feed, dialect: SizeDialect) -> None:
        self._feed = feed
        self._dialect = dialect
        self._walk = walk(root)
        self._ahead: deque[Event] = deque()
        self._sha256 = hashlib.sha256()
        self._nar = NarWriter(self._sha256.update)
        # The bottom one holds nothing but the root.
        self._open = [_OpenDirectory(b"", [], [], [])]

    def run(self) -> Tree:
        """Import to the end.

        Raises:
            ImportTreeError: something in the tree cannot be imported, or changed meanwhile.
            StoreError: a staged file could not be written.
            HasherEndedError: a hashing process has ended.
        """
        ahead = self._ahead
        while ahead or self._walk_on():
            if self._feed.pool.is_low():
                self._walk_on()
            event = ahead.popleft()
            if event.name and event.step is not Step.END_DIRECTORY:
                self._nar.entry(event.name)
            if event.step is Step.FILE:
                self._file(event)
            elif event.step is Step.SYMLINK:
                self._open[-1].symlinks.append(SymlinkNode(event.name, event.detail))
                self._nar.symlink(event.detail)
            elif event.step is Step.DIRECTORY:
                self._open.append(_OpenDirectory(event.name, [], [], []))
                self._nar.directory()
            else:
                self._end_directory()
        nar_size = self._nar.finish()
        root = self._open[0]
        nodes: list[Node] = [*root.directories, *root.files, *root.symlinks]
        return Tree(nodes[0], nar_size, self._sha256.digest())

    def _walk_on(self) -> bool:
        """Walk until enough is ahead; return whether there is a step to take."""
        pool = self._feed.pool
        while len(self._ahead) < _AHEAD_MAX and pool.has_room():
            event = next(self._walk, None)
            if event is None:
                break
            if event.step is Step.FILE:
                pool.request(event.detail)
            self._ahead.append(event)
        pool.send()
        return bool(self._ahead)

    def _file(self, event: Event) -> None:
        hasher, record = self._feed.pool.receive()
        if record.kind == HashKind.PIECE:
            hasher, record = self._pieces(hasher, record)
        if record.kind != HashKind.LAST:
            self._refuse(hasher, record)
        content = hasher.ring[record.offset : record.offset + record.size]
        if record.size == record.file_size:
            self._nar.file(content, executable=record.executable)
        else:
            self._nar.content(content)
        self._feed.keep(hasher, record)
        node = FileNode(event.name, Digest(record.digest), record.file_size, record.executable)
        self._open[-1].files.append(node)
        self._feed.reporter.file_done(record.file_size, event.detail)

    def _pieces(self, hasher: Hasher, record: HashRecord) -> tuple[Hasher, HashRecord]:
        """Take all pieces of a large file but the last, which is returned."""
        self._nar.regular(record.file_size, executable=record.executable)
        while record.kind == HashKind.PIECE:
            self._nar.content(hasher.ring[record.offset : record.offset + record.size])
            self._feed.objects.used(hasher.index, record)
            hasher, record = self._feed.pool.receive()
        return hasher, record

    def _refuse(self, hasher: Hasher, record: HashRecord) -> None:
        content = bytes(hasher.ring[record.offset : record.offset + record.size])
        reason = content.decode(errors="replace")
        self._feed.objects.used(hasher.index, record)
        if record.kind == HashKind.REFUSED:
            raise ImportTreeError(reason)
        raise (StoreFullError if record.kind == HashKind.FULL else StoreError)(reason)

    def _end_directory(self) -> None:
        self._nar.end_directory()
        name, directories, files, symlinks = self._open.pop()
        directory = Directory(directories, files, symlinks)
        encoded = directory.to_bytes()
        digest = Digest.of(encoded)
        if digest != EMPTY_DIGEST:
            self._feed.keep_directory(digest, encoded)
        size = directory.size(self._dialect)
        self._open[-1].directories.append(DirectoryNode(name, digest, size))
