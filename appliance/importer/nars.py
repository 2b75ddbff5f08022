"""The NAR of a tree, and those of parts of it, digested at the same time."""

import hashlib
from collections.abc import Collection
from typing import NamedTuple

from appliance.nar.writer import Buffer, NarWriter


class Digested(NamedTuple):
    """What a NAR came to."""

    size: int
    sha256: bytes


class Nars:
    """NARs that are under way: of all of them, the last one ends first.

    Every method but `begin` and `end` writes to all of them, as that of `NarWriter` does.

    Args:
        wanted: paths from the root, which is the empty one, of what gets a NAR of its own.
    """

    def __init__(self, wanted: Collection[bytes]) -> None:
        self._wanted = wanted
        # Of those under way: path, digest, and writer that feeds it.
        self._paths: list[bytes] = []
        self._digests: list[hashlib._Hash] = []
        self._writers: list[NarWriter] = []

    def begin(self, name: bytes, path: bytes) -> None:
        """Begin the node at `path`: the entry `name` of the open directory, or the root."""
        if path:
            for writer in self._writers:
                writer.entry(name)
        if path in self._wanted:
            digest = hashlib.sha256()
            self._paths.append(path)
            self._digests.append(digest)
            self._writers.append(NarWriter(digest.update))

    def end(self, path: bytes) -> Digested | None:
        """End the node at `path`, which is written; return its NAR if it has one of its own."""
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
        """Write the next part of the content of the file."""
        for writer in self._writers:
            writer.content(data)

    def file(self, content: Buffer, *, executable: bool) -> None:
        """Write a file whole."""
        for writer in self._writers:
            writer.file(content, executable=executable)

    def entries(self, data: Buffer) -> None:
        """Write whole entries of the open directory, framed already."""
        for writer in self._writers:
            writer.entries(data)
