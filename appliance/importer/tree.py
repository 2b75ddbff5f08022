"""Importing one tree: its walk and its files' content become a NAR, directories and blobs."""

import hashlib
from typing import NamedTuple, NoReturn

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.nodes import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.path_info import encode_nar_addressed
from appliance.castore.size_dialect import SizeDialect
from appliance.castore.store_path import nar_path
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.ahead import Ahead
from appliance.importer.feed import Feed
from appliance.importer.records import HashKind, HashTuple, ObjectKind, pack_path_info
from appliance.importer.walk import Event, Step
from appliance.nar.writer import NarWriter


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

    def __init__(self, ahead: Ahead, feed: Feed, dialect: SizeDialect) -> None:
        self._ahead = ahead
        self._feed = feed
        self._dialect = dialect
        self._sha256 = hashlib.sha256()
        self._nar = NarWriter(self._sha256.update)
        # The bottom one holds nothing but the root.
        self._open = [_OpenDirectory(b"", [], [], [])]
        # Frames that lie in a row in a ring, still to be hashed.
        self._run_ring = memoryview(b"")
        self._run_start = self._run_end = 0

    def run(self) -> Tree:
        """Import to the end; raises what `import_tree` does."""
        for event in self._ahead:
            if event.step is Step.FILE:
                self._file(event)
                continue
            self._end_run()
            if event.step is Step.END_DIRECTORY:
                self._end_directory()
                continue
            self._begin_entry(event.name)
            if event.step is Step.SYMLINK:
                self._open[-1].symlinks.append(SymlinkNode(event.name, event.detail))
                self._nar.symlink(event.detail)
            else:
                self._open.append(_OpenDirectory(event.name, [], [], []))
                self._nar.directory()
        self._end_run()
        self._feed.report()
        self._feed.pass_on()
        nar_size = self._nar.finish()
        root = self._open[0]
        nodes: list[Node] = [*root.directories, *root.files, *root.symlinks]
        return Tree(nodes[0], nar_size, self._sha256.digest())

    def _begin_entry(self, name: bytes) -> None:
        if name:
            self._nar.entry(name)

    def _file(self, event: Event) -> None:
        name = event.name
        ring, record = self._receive()
        kind, executable, lead, offset, size, _, file_size, _, frame_size, digest = record
        if frame_size and name:
            start = offset - lead
            if start != self._run_end or ring is not self._run_ring:
                self._end_run()
                self._run_start = start
                self._run_ring = ring
            self._run_end = start + frame_size
        else:
            self._end_run()
            self._begin_entry(name)
            if kind == HashKind.LAST:
                self._nar.file(ring[offset : offset + size], executable=executable)
            else:
                digest = self._pieces(ring, record, event.detail)
        self._open[-1].files.append(FileNode(name, Digest(digest), file_size, executable))
        self._feed.file_done(file_size if kind == HashKind.LAST else 0, event.detail)

    def _receive(self) -> tuple[memoryview, HashTuple]:
        pool = self._feed.pool
        while not pool.has_received():
            # What is passed on may be overwritten.
            self._end_run()
            self._feed.report()
            self._feed.pass_on()
            pool.wait()
        return pool.take()

    def _pieces(self, ring: memoryview, record: HashTuple, path: bytes) -> bytes:
        """Take all pieces of the large file `path`, from `record` on; return the digest."""
        if record[0] == HashKind.PIECE:
            _, executable, _, _, _, _, file_size, *_ = record
            self._nar.regular(file_size, executable=executable)
        while True:
            kind, _, _, offset, size, *_, digest = record
            content = ring[offset : offset + size]
            if kind not in {HashKind.PIECE, HashKind.LAST}:
                _refuse(kind, bytes(content).decode(errors="replace"))
            self._nar.content(content)
            self._feed.piece_done(size, path)
            if kind == HashKind.LAST:
                return bytes(digest)
            ring, record = self._receive()

    def _end_run(self) -> None:
        if self._run_start != self._run_end:
            self._nar.entries(self._run_ring[self._run_start : self._run_end])
            self._run_start = self._run_end = 0

    def _end_directory(self) -> None:
        self._nar.end_directory()
        name, directories, files, symlinks = self._open.pop()
        directory = Directory(directories, files, symlinks)
        encoded = directory.to_bytes()
        digest = Digest.of(encoded)
        if digest != EMPTY_DIGEST:
            self._feed.put(ObjectKind.DIRECTORY, encoded, digest)
        size = directory.size(self._dialect)
        self._open[-1].directories.append(DirectoryNode(name, digest, size))


def _refuse(kind: int, reason: str) -> NoReturn:
    if kind == HashKind.REFUSED:
        raise ImportTreeError(reason)
    raise (StoreFullError if kind == HashKind.FULL else StoreError)(reason)


def import_tree(name: str, ahead: Ahead, feed: Feed, dialect: SizeDialect) -> bytes:
    """Import a tree; return the content of its PATH_INFO, for the store path named `name`.

    Raises:
        ImportTreeError: something in the tree cannot be imported, or changed meanwhile.
        StoreError: a staged file could not be written.
        HasherEndedError: a hashing process has ended.
    """
    tree = TreeImport(ahead, feed, dialect).run()
    path = nar_path(tree.nar_sha256, name)
    path_info = encode_nar_addressed(
        path, tree.node, nar_size=tree.nar_size, nar_sha256=tree.nar_sha256
    )
    return pack_path_info(path, path_info)
