"""Imports one tree: computes the digest of its NAR, and makes its Directories.

`import_tree` follows the walk of a tree, receives its files from the hashing processes, and puts
Directories into the `Feed`. A part of the tree that is to be imported as a store path of its own is
done on the way: its NAR is hashed beside that of the whole tree (`NestedNars`).
"""

import hashlib
from collections.abc import Collection
from functools import partial
from typing import Final, NamedTuple, NoReturn

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import (
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    WrongSortingError,
)
from appliance.castore.directory_encoder import (
    ENCODED_MAX,
    PEER_ENCODED_MAX,
    DirectoryEncoder,
)
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ImportTreeError, StoreError, StoreFullError
from appliance.importer.records import HashKind, HashTuple, ObjectKind, pack_path_info
from appliance.importer.roots import CHANGED
from appliance.importer.stream import Feed
from appliance.importer.walk import LookaheadWalk, Step, too_large
from appliance.nix.nar import Buffer, NarWriter
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import nar_path

_ROOT: Final = b""


class Tree(NamedTuple):
    """An imported tree, or part of one; its node has no name."""

    node: Node
    nar_size: int
    nar_sha256: bytes


class _OpenDirectory(NamedTuple):
    """A directory that the walk is in, with the entries so far."""

    name: bytes
    path: bytes
    encoder: DirectoryEncoder


class TreeImport:
    """The import of one tree.

    Args:
        walk: the walk of the tree, which requests its files.
        feed: brings the files and takes the objects; no file but those of `walk` is requested.
        dialect: how the entries of directories are counted.
        parts: paths, relative to the root, of the parts to return as trees of their own.
    """

    def __init__(
        self, walk: LookaheadWalk, feed: Feed, dialect: SizeDialect, parts: Collection[bytes]
    ) -> None:
        self._walk = walk
        self._feed = feed
        self._dialect = dialect
        self._has_parts = bool(parts)
        self._wanted = frozenset((_ROOT, *parts))
        self._nars = NestedNars(self._wanted)
        self._trees: dict[bytes, Tree] = {}
        self._open: list[_OpenDirectory] = []
        # The current file, or the last one: path of its directory and its name.
        self._file_at: tuple[bytes, bytes] | None = None
        # Offsets in a ring of adjacent frames that have not been hashed: SHA-256 of one long piece
        # takes less time than of many short ones.
        self._run_ring = memoryview(b"")
        self._run_start = self._run_end = 0

    def run(self) -> dict[bytes, Tree]:
        """Import the whole tree; see `import_tree`."""
        try:
            self._take_all()
        except WrongSortingError as exc:  # the directory was listed with the same name twice
            path = self._walk.root.describe(self._open[-1].path)
            raise ImportTreeError(f"{path}: {CHANGED}") from exc
        self._report()
        self._feed.pass_on()
        return self._trees

    def _take_all(self) -> None:
        for step, name, detail in self._walk:
            if step is Step.FILE:
                self._file(name, detail)
                continue
            self._end_run()
            if step is Step.SYMLINK:
                self._symlink(name, detail)
            elif step is Step.DIRECTORY:
                self._nars.begin(name, detail)
                self._nars.directory()
                self._open.append(_OpenDirectory(name, detail, DirectoryEncoder()))
            else:
                self._end_directory()

    def _file(self, name: bytes, directory: bytes) -> None:
        ring, record = self._receive()
        self._file_at = directory, name
        kind, executable, lead, offset, size, _, file_size, _, frame_size, digest = record
        # Without parts, the path only has to differ from that of the root; joining it takes time.
        path = _join(directory, name) if self._has_parts else name
        if frame_size and path not in self._wanted:
            start = offset - lead
            if start != self._run_end or ring is not self._run_ring:
                self._end_run()
                self._run_start = start
                self._run_ring = ring
            self._run_end = start + frame_size
        else:
            self._end_run()
            self._nars.begin(name, path)
            if kind == HashKind.LAST:
                self._nars.file(ring[offset : offset + size], executable=executable)
            else:
                digest = self._pieces(ring, record)
            self._end_node(path, FileNode(b"", Digest(digest), file_size, executable))
        if self._open:
            self._open[-1].encoder.add_file(name, digest, file_size, executable=executable)
        self._feed.file_done(file_size if kind == HashKind.LAST else 0)

    def _end_node(self, path: bytes, node: Node) -> None:
        nar = self._nars.end(path)
        if nar is not None:
            self._trees[path] = Tree(node, nar.size, nar.sha256)

    def _receive(self) -> tuple[memoryview, HashTuple]:
        pool = self._feed.pool
        while not pool.has_received():
            # Passing records on lets their bytes in the ring be overwritten, so hash them first.
            self._end_run()
            self._report()
            self._feed.pass_on()
            pool.wait()
        return pool.take()

    def _report(self) -> None:
        if self._file_at is not None:
            self._feed.report(partial(self._describe_file, *self._file_at))

    def _describe_file(self, directory: bytes, name: bytes) -> str:
        root = self._walk.root
        return root.describe(_join(directory, name or root.entry))

    def _pieces(self, ring: memoryview, record: HashTuple) -> bytes:
        """Receive all pieces of a file that has no frame, `record` first; return the digest."""
        if record[0] == HashKind.PIECE:
            _, executable, _, _, _, _, file_size, *_ = record
            self._nars.regular(file_size, executable=executable)
        while True:
            kind, _, _, offset, size, *_, digest = record
            content = ring[offset : offset + size]
            if kind in {HashKind.PIECE, HashKind.LAST}:
                if size:
                    self._nars.content(content)
                self._feed.piece_done(size)
            elif kind != HashKind.CHUNKS:  # those are for the committing process
                _refuse(kind, bytes(content).decode(errors="replace"))
            if kind == HashKind.LAST:
                return bytes(digest)
            ring, record = self._receive()

    def _end_run(self) -> None:
        if self._run_start != self._run_end:
            self._nars.entries(self._run_ring[self._run_start : self._run_end])
            self._run_start = self._run_end = 0

    def _symlink(self, name: bytes, target: bytes) -> None:
        path = _join(self._open[-1].path, name) if self._open else _ROOT
        self._nars.begin(name, path)
        self._nars.symlink(target)
        self._end_node(path, SymlinkNode(b"", target))
        if self._open:
            self._open[-1].encoder.add_symlink(name, target)

    def _end_directory(self) -> None:
        self._nars.end_directory()
        name, path, encoder = self._open.pop()
        encoded = encoder.to_bytes()
        if len(encoded) > PEER_ENCODED_MAX:
            self._check_size(path, len(encoder), len(encoded))
        digest = Digest.of(encoded)
        if digest != EMPTY_DIGEST:
            self._feed.put(ObjectKind.DIRECTORY, encoded, digest)
        size = encoder.size(self._dialect)
        self._end_node(path, DirectoryNode(b"", digest, size))
        if self._open:
            self._open[-1].encoder.add_directory(name, digest, size)

    def _check_size(self, path: bytes, num_entries: int, num_bytes: int) -> None:
        text = self._walk.root.describe(path)
        if num_bytes > ENCODED_MAX:
            raise too_large(text, num_entries)
        self._feed.warn_of_large_directory(
            f"{text}: its {num_entries} entries make a Directory of more than "
            f"{PEER_ENCODED_MAX >> 20} MiB, which only peers with a raised limit for gRPC "
            "messages receive"
        )


def _join(directory: bytes, name: bytes) -> bytes:
    return b"%b/%b" % (directory, name) if directory else name


def _refuse(kind: int, reason: str) -> NoReturn:
    if kind == HashKind.REFUSED:
        raise ImportTreeError(reason)
    raise (StoreFullError if kind == HashKind.FULL else StoreError)(reason)


def import_tree(
    walk: LookaheadWalk, feed: Feed, dialect: SizeDialect, parts: Collection[bytes] = ()
) -> dict[bytes, Tree]:
    """Import a tree; see `TreeImport` for the arguments.

    Returns:
        The tree, at the empty path, and the parts that the walk found, at their paths in it.

    Raises:
        ImportTreeError: something in the tree cannot be imported, or changed while it was read.
        StoreError: a staged file could not be written.
        HasherEndedError: a hashing process has ended.
    """
    return TreeImport(walk, feed, dialect, parts).run()


def path_info_of(tree: Tree, name: str) -> bytes:
    """Return the content of the PATH_INFO object for `tree` as a store path named `name`."""
    path = nar_path(tree.nar_sha256, name)
    path_info = encode_nar_addressed(
        path, tree.node, nar_size=tree.nar_size, nar_sha256=tree.nar_sha256
    )
    return pack_path_info(path, path_info)


# --- The NARs of a tree and of its parts ---


class Digested(NamedTuple):
    """Size in bytes and digest of a NAR."""

    size: int
    sha256: bytes


class NestedNars:
    """Hashes the NARs of a tree and of parts of it at the same time.

    The NARs that have begun are nested like their nodes. Every method but `begin` and `end` calls
    the method of the same name of the `NarWriter` of each of them.

    Args:
        wanted: paths of the nodes to get NARs of their own, relative to the root; the root itself
            has the empty path.
    """

    def __init__(self, wanted: Collection[bytes]) -> None:
        self._wanted = wanted
        # For each NAR that has begun, outermost first: its path, its digest, and the writer to it.
        self._paths: list[bytes] = []
        self._digests: list[hashlib._Hash] = []
        self._writers: list[NarWriter] = []

    def begin(self, name: bytes, path: bytes) -> None:
        """Begin the node at `path`; unless it is the root, it is `name` in the open directory."""
        if path:
            for writer in self._writers:
                writer.entry(name)
        if path in self._wanted:
            digest = hashlib.sha256()
            self._paths.append(path)
            self._digests.append(digest)
            self._writers.append(NarWriter(digest.update))

    def end(self, path: bytes) -> Digested | None:
        """End the node at `path`; return its NAR if it has one of its own."""
        if self._paths[-1] != path:
            return None
        self._paths.pop()
        size = self._writers.pop().finish()
        return Digested(size, self._digests.pop().digest())

    def symlink(self, target: bytes) -> None:
        """Write a symlink."""
        for writer in self._writers:
            writer.symlink(target)

    def directory(self) -> None:
        """Open a directory."""
        for writer in self._writers:
            writer.directory()

    def end_directory(self) -> None:
        """Close the open directory."""
        for writer in self._writers:
            writer.end_directory()

    def regular(self, size: int, *, executable: bool) -> None:
        """Begin a file."""
        for writer in self._writers:
            writer.regular(size, executable=executable)

    def content(self, data: Buffer) -> None:
        """Write the next part of the content of a file."""
        for writer in self._writers:
            writer.content(data)

    def file(self, content: Buffer, *, executable: bool) -> None:
        """Write a file whole."""
        for writer in self._writers:
            writer.file(content, executable=executable)

    def entries(self, data: Buffer) -> None:
        """Write whole entries of the open directory, given in the form they have in a NAR."""
        for writer in self._writers:
            writer.entries(data)
