"""Marking the blobs and Directories below store paths.

Each object of the store as it is in one snapshot has a mark, a number: 0 if nothing has reached it.
What is put later has none, and is never removed by the collection that the marks are for.

Theory of operation. In the order of a walk, Directories lie all over the file: each would need a
page of its own, and would need it again when the next one in that page is met. What is live needs
no order, however, as all of it gets one mark. So `mark_live` goes through the table of Directories
in the order of its keys and reads those that are waiting. What these refer to waits in turn: it is
met further on, or in the next pass. Nothing is read twice, a page is read at most once for each
pass, and there are no more passes than a tree has levels. Waiting takes a byte for each Directory.

Only the marks of dead paths, which say what each one alone frees, are given in a walk (`mark`).
"""

from array import array
from collections.abc import Iterable
from typing import Final

from appliance.castore.digest import DIGEST_SIZE, EMPTY_DIGEST, Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.castore.references import digests_in
from appliance.collector.digest_index import DigestIndex
from appliance.db.environment import ReadTransaction
from appliance.store import removal, schema
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

LIVE: Final = 1
# The numbers from here on are those of dead paths, see `Marks.mark`.
FIRST_DEAD: Final = 2
_DAMAGE_MAX: Final = 10
# The pages that were read are counted each time this many Directories have been.
_DIRECTORIES_PER_COUNT: Final = 256


class Marks:
    """The marks of all objects that a snapshot has.

    Attributes:
        blobs: numbers and stored sizes of the blobs.
        directories: the same of the Directories; an image counts with its Directory.
        blob_marks: the mark of each blob, by its number.
        directory_marks: the mark of each Directory, by its number.
        damage: a line for each Directory that is missing or damaged below what was marked live; not
            more than ten.
    """

    def __init__(self, store: Store, txn: ReadTransaction) -> None:
        self.blobs = DigestIndex(removal.sizes(store, txn, schema.BLOBS))
        self.directories = DigestIndex(removal.sizes(store, txn, schema.DIRECTORIES))
        for digest, size in removal.image_sizes(store, txn):
            number = self.directories.number_of(digest)
            if number >= 0:
                self.directories.sizes[number] += size
        self.blob_marks = array("I", bytes(array("I").itemsize * len(self.blobs)))
        self.directory_marks = array("I", bytes(array("I").itemsize * len(self.directories)))
        self.damage: list[str] = []
        self._env = store.env
        self._num_read = 0
        # Directories that were put after the snapshot and have been walked.
        self._new: set[bytes] = set()

    def mark_live(self, view: Snapshot, nodes: Iterable[Node]) -> None:
        """Mark what is at and below all of `nodes` LIVE; see the theory of operation."""
        waiting = bytearray(len(self.directories))
        for node in nodes:
            if isinstance(node, FileNode):
                self.mark_blob(node.digest)
            elif isinstance(node, DirectoryNode):
                self._wait_for(view, waiting, [node.digest])
        at = 0
        # After the last one that is waiting, the table is gone through from its beginning.
        while (number := waiting.find(1, at)) >= 0 or at:
            at = number + 1
            if number < 0:
                continue
            waiting[number] = 0
            # Nearly always one; see `DigestIndex`.
            prefix = self.directories.prefix_of(number)
            for digest, encoded in view.directories_beginning(prefix):
                self._check(digest, encoded, LIVE)
                directories, blobs = digests_in(encoded)
                self.blobs.write(self.blob_marks, blobs, LIVE)
                self._wait_for(view, waiting, directories)

    def mark(self, view: Snapshot, node: Node, mark: int = LIVE) -> int:
        """Mark what is at and below a node, and return the stored bytes that were marked.

        With LIVE, whatever is not marked so yet is marked. Any other mark is given only to what has
        none: marked with one number after the other, each object has that of the first path that
        reaches it.

        Args:
            view: where Directories are read.
            node: the node.
            mark: LIVE, or a number from FIRST_DEAD on.
        """
        if isinstance(node, FileNode):
            return self.mark_blob(node.digest, mark)
        if isinstance(node, DirectoryNode):
            return self.mark_directory(view, node.digest, mark)
        return 0

    def mark_blob(self, digest: bytes, mark: int = LIVE) -> int:
        """Mark a blob; see `mark`."""
        number = self.blobs.number_of(digest)
        if number < 0 or not _may_mark(self.blob_marks[number], mark):
            return 0
        self.blob_marks[number] = mark
        return self.blobs.sizes[number]

    def mark_directory(self, view: Snapshot, root: bytes, mark: int = LIVE) -> int:
        """Mark a Directory and all below it; see `mark`."""
        marks, sizes = self.directory_marks, self.directories.sizes
        number_of, mark_blob = self.directories.number_of, self.mark_blob
        marked_bytes = 0
        stack = [root]
        while stack:
            digest = stack.pop()
            number = number_of(digest)
            if number >= 0:
                if not _may_mark(marks[number], mark):
                    continue
                marks[number] = mark
                marked_bytes += sizes[number]
            elif digest in self._new:
                continue
            encoded = self._read(view, digest, mark)
            if encoded is None:
                continue
            if number < 0:
                self._new.add(digest)
            directories, blobs = digests_in(encoded)
            if any(len(child) != DIGEST_SIZE for child in directories):
                continue  # it is damaged, which was noted
            for blob in blobs:
                marked_bytes += mark_blob(blob, mark)
            stack += directories
        return marked_bytes

    def is_dead_blob(self, digest: bytes, first_removed: int) -> bool:
        """Whether a blob was in the snapshot, and its mark is none or `first_removed` or higher."""
        return _is_dead(self.blobs.number_of(digest), self.blob_marks, first_removed)

    def is_dead_directory(self, digest: bytes, first_removed: int) -> bool:
        """The same for a Directory."""
        return _is_dead(self.directories.number_of(digest), self.directory_marks, first_removed)

    def unmarked_bytes(self) -> int:
        """Return the stored bytes of all objects without a mark."""
        return sum(
            size
            for index, marks in (
                (self.blobs, self.blob_marks),
                (self.directories, self.directory_marks),
            )
            for size, mark in zip(index.sizes, marks, strict=True)
            if not mark
        )

    def num_dead(self, first_removed: int) -> tuple[int, int]:
        """Return the numbers of dead blobs and of dead Directories, see `is_dead_blob`."""
        return (
            sum(1 for mark in self.blob_marks if not mark or mark >= first_removed),
            sum(1 for mark in self.directory_marks if not mark or mark >= first_removed),
        )

    def _wait_for(self, view: Snapshot, waiting: bytearray, digests: Iterable[bytes]) -> None:
        for digest in digests:
            number = self.directories.number_of(digest)
            if number < 0:  # it is the empty one, or missing
                if len(digest) == DIGEST_SIZE:  # otherwise that was noted as damage
                    self.mark_directory(view, digest)
            elif self.directory_marks[number] != LIVE:
                self.directory_marks[number] = LIVE
                waiting[number] = 1

    def _read(self, view: Snapshot, digest: bytes, mark: int) -> bytes | None:
        encoded = view.directory(digest)
        self._check(digest, encoded, mark)
        return encoded

    def _check(self, digest: bytes, encoded: bytes | None, mark: int) -> None:
        # Notes damage below what is live. Called for each Directory that is read, so pages are
        # released here, too.
        self._num_read += 1
        if not self._num_read % _DIRECTORIES_PER_COUNT:
            self._env.limit_pages()
        is_right = encoded is not None and (digest == EMPTY_DIGEST or Digest.of(encoded) == digest)
        if not is_right and mark == LIVE and len(self.damage) < _DAMAGE_MAX:
            what = "is missing" if encoded is None else "is damaged"
            self.damage.append(f"directory {digest.hex()} {what}")


def _may_mark(present: int, mark: int) -> bool:
    return not present or (mark == LIVE and present != LIVE)


def _is_dead(number: int, marks: "array[int]", first_removed: int) -> bool:
    return number >= 0 and (not marks[number] or marks[number] >= first_removed)
