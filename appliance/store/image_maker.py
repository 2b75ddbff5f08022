"""Making all images of a store path that an earlier release stored without them."""

import logging
from typing import Final

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.errors import CorruptBlobError, DirectoryError
from appliance.store.store import Store

_LOG: Final = logging.getLogger(__name__)
# Bytes of encoded Directories whose images are committed in one transaction.
_COMMIT_BYTES: Final = 1 << 20


def make_images(store: Store, root: Digest) -> None:
    """Make the images of the directory `root` and all below it, children before their parents.

    Where a directory has an image, so have all directories below it, and the walk stops there. A
    directory that is missing or corrupt is logged and left without an image; a guest that enters it
    gets an error.

    Raises:
        StoreError: the store cannot be written.
    """
    maker = _Maker(store)
    # Each directory is pushed twice: once to visit its children, once to make its own image.
    stack = [(root, False)]
    seen = {root}
    while stack:
        digest, is_below_done = stack.pop()
        if is_below_done:
            maker.make(digest)
            continue
        stack.append((digest, True))
        for child in maker.children(digest):
            if child not in seen:
                seen.add(child)
                stack.append((child, False))
    maker.commit()


class _Maker:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._directories: dict[bytes, bytes] = {}
        self._num_bytes = 0
        self._bad: set[Digest] = set()

    def children(self, digest: Digest) -> list[Digest]:
        try:
            directory = self._read(digest)
        except (CorruptBlobError, DirectoryError) as exc:
            _LOG.error("directory %s: %s", digest, exc)
            self._bad.add(digest)
            return []
        return [] if directory is None else [node.digest for node in directory.directories]

    def make(self, digest: Digest) -> None:
        if digest in self._bad or (directory := self._read(digest)) is None:
            return
        self._directories[digest] = encoded = directory.to_bytes()
        self._num_bytes += len(encoded)
        if self._num_bytes >= _COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        self._store.put_images(self._directories)
        self._directories = {}
        self._num_bytes = 0

    def _read(self, digest: Digest) -> Directory | None:
        with self._store.snapshot() as snapshot:
            if snapshot.image(digest) is not None:
                return None
            encoded = snapshot.directory(digest)
        if encoded is None:
            raise CorruptBlobError("not in the store")
        directory = Directory.from_bytes(encoded)
        if directory.digest() != digest:
            raise CorruptBlobError(f"the stored content has digest {directory.digest()}")
        return directory
