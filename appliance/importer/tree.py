"""Importing one tree: its walk and its files' content become a NAR, directories and blobs."""

import hashlib
from typing import NamedTuple, NoReturn

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory_encoder import (
    ENCODED_MAX,
    PEER_ENCODED_MAX,
    DirectoryEncoder,
)
from appliance.castore.nodes import (
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    WrongSortingError,
)
from appliance.castore.path_info import encode_nar_addressed
from appliance.castore.size_dialect import SizeDialect
from appliance.castore.store_path import nar_path
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.ahead import Ahead
from appliance.importer.feed import Feed
from appliance.importer.listing import too_large
from appliance.importer.records import HashKind, HashTuple, ObjectKind, pack_path_info
from appliance.importer.root import CHANGED
from appliance.importer.walk import Step
from appliance.nar.writer import NarWriter


class Tree(NamedTuple):
    """What a tree came to; its node has no name."""

    node: Node
    nar_size: int
    nar_sha256: bytes


class _OpenDirectory(NamedTuple):
    """A directory whose entries are being encoded."""

    name: bytes
    path: bytes
    encoder: DirectoryEncoder


class TreeImport:
    """The import of one tree; its content comes and its objects go through `feed`."""

    def __init__(self, ahead: Ahead, feed: Feed, dialect: SizeDialect) -> None:
        self._ahead = ahead
        self._feed = feed
        self._dialect = dialect
        self._sha256 = hashlib.sha256()
        self._nar = NarWriter(self._sha256.update)
        self._open: list[_OpenDirectory] = []
        self._root: Node | None = None
        # The file in hand, or done last: path of its directory and its name.
        self._file_at: tuple[bytes, bytes] | None = None
        # Frames that lie in a row in a ring, still to be hashed.
        self._run_ring = memoryview(b"")
        self._run_start = self._run_end = 0

    def run(self) -> Tree:
        """Import to the end; raises what `import_tree` does."""
        try:
            self._take_all()
        except WrongSortingError as exc:  # a name that was listed twice
            raise ImportTreeError(
                f"{self._ahead.root.describe(self._open[-1].path)}: {CHANGED}"
            ) from exc
        self._end_run()
        self._report()
        self._feed.pass_on()
        nar_size = self._nar.finish()
        assert self._root is not None
        return Tree(self._root, nar_size, self._sha256.digest())

    def _take_all(self) -> None:
        for step, name, detail in self._ahead:
            if step is Step.FILE:
                self._file(name, detail)
                continue
            self._end_run()
            if step is Step.END_DIRECTORY:
                self._end_directory()
                continue
            self._begin_entry(name)
            if step is Step.SYMLINK:
                self._nar.symlink(detail)
                self._add_symlink(name, detail)
            else:
                self._nar.directory()
                self._open.append(_OpenDirectory(name, detail, DirectoryEncoder()))

    def _begin_entry(self, name: bytes) -> None:
        if name:
            self._nar.entry(name)

    def _file(self, name: bytes, directory: bytes) -> None:
        ring, record = self._receive()
        self._file_at = directory, name
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
                digest = self._pieces(ring, record)
        self._add_file(name, digest, file_size, executable=executable)
        self._feed.file_done(file_size if kind == HashKind.LAST else 0)

    def _receive(self) -> tuple[memoryview, HashTuple]:
        pool = self._feed.pool
        while not pool.has_received():
            # What is passed on may be overwritten.
            self._end_run()
            self._report()
            self._feed.pass_on()
            pool.wait()
        return pool.take()

    def _report(self) -> None:
        if self._file_at is not None:
            self._feed.report(self._describe_file)

    def _describe_file(self) -> str:
        assert self._file_at is not None
        directory, name = self._file_at
        root = self._ahead.root
        path = name or root.entry
        return root.describe(b"%b/%b" % (directory, path) if directory else path)

    def _pieces(self, ring: memoryview, record: HashTuple) -> bytes:
        """Take all pieces of a large file, from `record` on; return the digest."""
        if record[0] == HashKind.PIECE:
            _, executable, _, _, _, _, file_size, *_ = record
            self._nar.regular(file_size, executable=executable)
        while True:
            kind, _, _, offset, size, *_, digest = record
            content = ring[offset : offset + size]
            if kind not in {HashKind.PIECE, HashKind.LAST}:
                _refuse(kind, bytes(content).decode(errors="replace"))
            self._nar.content(content)
            self._feed.piece_done(size)
            if kind == HashKind.LAST:
                return bytes(digest)
            ring, record = self._receive()

    def _end_run(self) -> None:
        if self._run_start != self._run_end:
            self._nar.entries(self._run_ring[self._run_start : self._run_end])
            self._run_start = self._run_end = 0

    def _add_file(self, name: bytes, digest: bytes, size: int, *, executable: bool) -> None:
        if self._open:
            self._open[-1].encoder.add_file(name, digest, size, executable=executable)
        else:
            self._root = FileNode(name, Digest(digest), size, executable)

    def _add_symlink(self, name: bytes, target: bytes) -> None:
        if self._open:
            self._open[-1].encoder.add_symlink(name, target)
        else:
            self._root = SymlinkNode(name, target)

    def _end_directory(self) -> None:
        self._nar.end_directory()
        name, path, encoder = self._open.pop()
        encoded = encoder.to_bytes()
        self._check_size(path, len(encoder), len(encoded))
        digest = Digest.of(encoded)
        if digest != EMPTY_DIGEST:
            self._feed.put(ObjectKind.DIRECTORY, encoded, digest)
        size = encoder.size(self._dialect)
        if self._open:
            self._open[-1].encoder.add_directory(name, digest, size)
        else:
            self._root = DirectoryNode(name, digest, size)

    def _check_size(self, path: bytes, num_entries: int, num_bytes: int) -> None:
        text = self._ahead.root.describe(path)
        if num_bytes > ENCODED_MAX:
            raise too_large(text, num_entries)
        if num_bytes > PEER_ENCODED_MAX:
            self._feed.warn_of_large_directory(
                f"{text}: its {num_entries} entries make a Directory of more than "
                f"{PEER_ENCODED_MAX >> 20} MiB, which only peers with a raised limit for gRPC "
                "messages receive"
            )


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
