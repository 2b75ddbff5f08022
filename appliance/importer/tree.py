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
from appliance.importer.committer import Committer
from appliance.importer.hasher_pool import HasherPool, Piece
from appliance.importer.progress import Reporter
from appliance.importer.records import Kind
from appliance.importer.walk import Event, Step, walk
from appliance.nar.writer import NarWriter

# Steps of the walk taken ahead of the one in hand, files or not.
_AHEAD_MAX: Final = 4096


class Tree(NamedTuple):
    """What a tree came to."""

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
    """The import of one tree; its objects go to `committer` as they are complete."""

    def __init__(
        self,
        root: bytes,
        pool: HasherPool,
        committer: Committer,
        reporter: Reporter,
        dialect: SizeDialect,
    ) -> None:
        self._pool = pool
        self._committer = committer
        self._reporter = reporter
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
            StoreError: from an earlier commit, or the disk.
        """
        while self._refill():
            event = self._ahead.popleft()
            if self._open[1:] and event.step is not Step.END_DIRECTORY:
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

    def _refill(self) -> bool:
        """Walk on if there is little ahead; return whether there is a step to take."""
        ahead = self._ahead
        if self._pool.is_low():
            while len(ahead) < _AHEAD_MAX and self._pool.has_room():
                event = next(self._walk, None)
                if event is None:
                    break
                if event.step is Step.FILE:
                    self._pool.request(event.detail)
                ahead.append(event)
            self._pool.send()
        return bool(ahead)

    def _file(self, event: Event) -> None:
        piece = self._pool.receive()
        record = piece.record
        if record.kind <= Kind.LAST:
            self._nar.regular(record.file_size, executable=record.executable)
        while record.kind == Kind.PIECE:
            self._nar.content(piece.content)
            piece = self._pool.receive()
            record = piece.record
        if record.kind != Kind.LAST:
            raise _refusal(piece)
        if record.size:
            self._nar.content(piece.content)
        self._keep(piece)
        node = FileNode(event.name, Digest(record.digest), record.file_size, record.executable)
        self._open[-1].files.append(node)
        self._reporter.file_done(record.file_size, event.detail)

    def _keep(self, piece: Piece) -> None:
        digest = piece.record.digest
        if self._committer.has_blob(digest):
            if piece.staged is not None:
                piece.staged.unlink()
        elif piece.staged is not None:
            self._committer.batch.add_file(digest, piece.staged, piece.record.file_size)
        else:
            self._committer.batch.add_blob(digest, piece.content)
        self._committer.commit_if_large()

    def _end_directory(self) -> None:
        self._nar.end_directory()
        name, directories, files, symlinks = self._open.pop()
        directory = Directory(directories, files, symlinks)
        encoded = directory.to_bytes()
        digest = Digest.of(encoded)
        if digest != EMPTY_DIGEST:
            self._committer.batch.add_directory(digest, encoded)
        size = directory.size(self._dialect)
        self._open[-1].directories.append(DirectoryNode(name, digest, size))


def _refusal(piece: Piece) -> ImportTreeError | StoreError:
    reason = bytes(piece.content).decode()
    match piece.record.kind:
        case Kind.REFUSED:
            return ImportTreeError(reason)
        case Kind.FULL:
            return StoreFullError(reason)
        case _:
            return StoreError(reason)
