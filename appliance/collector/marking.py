"""Marking the blobs and Directories below store paths.

Each object of the store as it is in one snapshot has a mark, a number: 0 if nothing has reached it.
What is put later has none, and is never removed by the collection that the marks are for.
"""

from array import array
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
# The pages of Directories that were read are released each time this many have been.
_DIRECTORIES_AT_A_TIME: Final = 2048


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
        self.blob_marks = array("l", bytes(array("l").itemsize * len(self.blobs)))
        self.directory_marks = array("l", bytes(array("l").itemsize * len(self.directories)))
        self.damage: list[str] = []
        self._env = store.env
        self._num_walked = 0
        # Directories that were put after the snapshot and have been walked.
        self._new: set[bytes] = set()

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

    def _read(self, view: Snapshot, digest: bytes, mark: int) -> bytes | None:
        self._num_walked += 1
        if not self._num_walked % _DIRECTORIES_AT_A_TIME:
            self._env.drop_pages()
        encoded = view.directory(digest)
        is_right = encoded is not None and (digest == EMPTY_DIGEST or Digest.of(encoded) == digest)
        if not is_right and mark == LIVE and len(self.damage) < _DAMAGE_MAX:
            what = "is missing" if encoded is None else "is damaged"
            self.damage.append(f"directory {digest.hex()} {what}")
        return encoded


def _may_mark(present: int, mark: int) -> bool:
    return not present or (mark == LIVE and present != LIVE)


def _is_dead(number: int, marks: "array[int]", first_removed: int) -> bool:
    return number >= 0 and (not marks[number] or marks[number] >= first_removed)
