"""The resolver of one local store."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import ENOENT
from itertools import islice
from typing import Final, TypeVar

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node
from appliance.errors import CorruptBlobError, PathInfoError, StoreError
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath, StorePathError
from appliance.resolve.resolver import RootListing, SingleFlight
from appliance.session.wants import BlobWanted
from appliance.store.blob_files import BlobFile
from appliance.store.image_maker import make_images
from appliance.store.store import Store

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
_ROOT_CHUNK: Final = 1024


class LocalResolver:
    """Finds paths in `store`, and makes the images that it lacks; see `resolving.Resolver`.

    Images are there already, unless the store was filled by a release that made none.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Making the images of a large path must not keep other guests' lookups waiting.
        self._reading = ThreadPoolExecutor(1, "resolver")
        self._making = ThreadPoolExecutor(1, "images")
        self._directories: SingleFlight[bytes, None] = SingleFlight()

    async def root_node(self, name: bytes) -> Node:
        """See `Resolver.root_node`; the images of the path are there when this returns."""
        node, has_image = await self._read(lambda: self._find(name))
        if not has_image and isinstance(node, DirectoryNode):
            # Whoever enters a directory that can have no image is told then.
            with suppress(StoreError):
                await self.directory(node.digest)
        return node

    async def root_listing(self, generation: int) -> RootListing:
        """See `Resolver.root_listing`."""
        return await self._read(lambda: self._list(generation))

    async def directory(self, digest: bytes) -> None:
        """See `Resolver.directory`; makes the images of all directories below, too."""

        async def make() -> None:
            await asyncio.get_running_loop().run_in_executor(self._making, self._make, digest)

        await self._directories.do(digest, make)

    async def blob(self, want: BlobWanted) -> None:
        """See `Resolver.blob`; a worker sees for itself what a local store has."""
        raise AssertionError(want)

    async def open_blob(self, want: BlobWanted) -> int | None:
        """See `Resolver.open_blob`."""
        return await self._read(lambda: open_blob(self._store, want))

    def used(self, keys: Sequence[bytes]) -> None:
        """Do nothing: what is local is not a cache."""

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        await self._read(self._store.env.reap_readers)

    async def close(self) -> None:
        """End the threads; what they are at comes to its end."""
        await self._directories.close()
        self._reading.shutdown(cancel_futures=True)
        self._making.shutdown(cancel_futures=True)

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)

    def _find(self, name: bytes) -> tuple[Node, bool]:
        digest = path_digest(name)
        with self._store.snapshot() as snapshot:
            encoded = snapshot.path_info(digest)
            if encoded is None:
                raise OSError(ENOENT, f"{name!r} is not in the store")
            node = root_node(name, encoded)
            has_image = (
                not isinstance(node, DirectoryNode) or snapshot.image(node.digest) is not None
            )
        return node, has_image

    def _make(self, digest: bytes) -> None:
        _LOG.info(
            "directory %s: its image and those below it are made, as the store has none",
            Digest(digest),
        )
        make_images(self._store, Digest(digest))
        with self._store.snapshot() as snapshot:
            if snapshot.image(digest) is None:
                raise CorruptBlobError(f"directory {Digest(digest)}: no image can be made of it")

    def _list(self, generation: int) -> RootListing:
        with self._store.snapshot() as snapshot:
            chunk = list(islice(snapshot.path_infos_since(generation), _ROOT_CHUNK))
            is_complete = len(chunk) < _ROOT_CHUNK
            reached = snapshot.generation if is_complete else chunk[-1][0]
        nodes = [node for _generation, encoded in chunk if (node := listed_node(encoded))]
        return RootListing(nodes, reached, fresh_until_ns=0, is_complete=is_complete)


def path_digest(name: bytes) -> bytes:
    """Return the digest (20 bytes) of the store path with this base name.

    Raises:
        OSError: ENOENT, it is no store path.
    """
    try:
        return StorePath.parse(name).digest
    except StorePathError as exc:
        raise OSError(ENOENT, str(exc)) from exc


def root_node(name: bytes, path_info: bytes) -> Node:
    """Return the root node of the path called `name`, of which `path_info` was found.

    Raises:
        PathInfoError: it breaks a rule.
        OSError: ENOENT, the path with that digest has another name.
    """
    node = read_path_info(path_info).node
    if node.name != name:
        raise OSError(ENOENT, f"the store has {node.name!r} by that digest, not {name!r}")
    return node


def listed_node(path_info: bytes) -> Node | None:
    """Return the root node in a PathInfo of a listing, or None if it breaks a rule; logged."""
    # One bad PathInfo must not keep all other paths from being listed.
    try:
        return read_path_info(path_info).node
    except PathInfoError as exc:
        _LOG.error("a path is left out of the root's listing: %s", exc)
        return None


def open_blob(store: Store, want: BlobWanted) -> int | None:
    """See `Resolver.open_blob`."""
    with store.snapshot() as snapshot:
        blob = snapshot.blob(want.digest)
    if not isinstance(blob, BlobFile) or blob.size != want.size:
        return None
    try:
        fd = store.open_blob(blob)
    except OSError:
        return None  # a worker says so when it is read
    if os.fstat(fd).st_size == want.size:
        return fd
    os.close(fd)
    return None
