"""The resolver of one local store, and what it shares with the resolver of remote services.

The functions at the end turn stored records into nodes and descriptors, for both resolvers.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from errno import EINVAL, ENOENT
from itertools import islice
from typing import Final, TypeVar

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node
from appliance.errors import CorruptBlobError, PathInfoError, StoreError
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath, StorePathError
from appliance.resolve.resolver import RootListing, SessionGrants, errno_of
from appliance.services.tasks import SingleFlight
from appliance.session.wants import (
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
    Want,
)
from appliance.store.blob_files import BlobFile
from appliance.store.image_maker import make_images
from appliance.store.profiles import Profile
from appliance.store.store import Store

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
# Paths in one part of a listing, which takes one transaction.
_ROOT_CHUNK: Final = 1024


class LocalResolver:
    """Finds paths in `store` (lent), and makes images that it lacks; see `Resolver`.

    Images are missing only in a store that was filled by a release that made none. Blobs are always
    where workers read.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Two threads: making the images of a large path must not delay lookups of other guests.
        self._reading = ThreadPoolExecutor(1, "resolver")
        self._making = ThreadPoolExecutor(1, "images")
        self._images: SingleFlight[bytes, None] = SingleFlight()

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        """See `Resolver.resolve`."""
        match want:
            case RootNameWanted(name):
                return await errno_of(want, session.add_name(name, self._root_node))
            case RootListWanted():
                return await errno_of(want, session.add_listing(self._root_listing))
            case DirectoryWanted(digest):
                return await errno_of(want, self._make_images(digest))
            case BlobWanted():
                return 0
            case _:
                return EINVAL

    async def root_nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        """See `Resolver.root_nodes`."""
        return await self._read(lambda: self._find_all(names))

    async def open_blob(self, want: BlobWanted) -> int | None:
        """See `Resolver.open_blob`."""
        return await self._read(lambda: open_blob(self._store, want))

    def used(self, keys: Sequence[bytes]) -> None:
        """Do nothing: a local store is not a cache."""

    def play(self, _name: str, _profile: Profile) -> Callable[[], None]:
        """Do nothing: everything is here."""
        return lambda: None

    async def reap_readers(self) -> None:
        """See `Resolver.reap_readers`."""
        await self._read(self._store.env.reap_readers)

    async def close(self) -> None:
        """See `Resolver.close`; waits for what the threads are doing now."""
        await self._images.close()
        self._reading.shutdown(cancel_futures=True)
        self._making.shutdown(cancel_futures=True)

    async def _root_node(self, name: bytes) -> Node:
        # The images of the path exist when this returns.
        node, has_image = await self._read(lambda: self._find(name))
        if not has_image and isinstance(node, DirectoryNode):
            # A directory of which no image can be made fails when it is entered.
            with suppress(StoreError):
                await self._make_images(node.digest)
        return node

    async def _root_listing(self, generation: int) -> RootListing:
        return await self._read(lambda: self._list(generation))

    async def _make_images(self, digest: bytes) -> None:
        async def make() -> None:
            await asyncio.get_running_loop().run_in_executor(self._making, self._make, digest)

        await self._images.do(digest, make)

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)

    # --- In the threads ---

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

    def _find_all(self, names: Sequence[bytes]) -> Sequence[Node]:
        nodes = []
        for name in names:
            with suppress(OSError):
                nodes.append(self._find(name)[0])
        return nodes

    def _make(self, digest: bytes) -> None:
        _LOG.info(
            "directory %s: making its image and those below it, as the store has none",
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
        OSError: ENOENT, the name is not that of a store path.
    """
    try:
        return StorePath.parse(name).digest
    except StorePathError as exc:
        raise OSError(ENOENT, str(exc)) from exc


def root_node(name: bytes, path_info: bytes) -> Node:
    """Return the root node of the path called `name` from the PathInfo that was found for it.

    Raises:
        PathInfoError: `path_info` breaks a rule.
        OSError: ENOENT, the path with that digest has another name.
    """
    node = read_path_info(path_info).node
    if node.name != name:
        raise OSError(ENOENT, f"the store has {node.name!r} under that digest, not {name!r}")
    return node


def listed_node(path_info: bytes) -> Node | None:
    """Return the root node in a PathInfo of a listing, or None, logged, if it breaks a rule."""
    # One bad PathInfo must not hide all other paths.
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
        return None  # the worker that reads it reports the error
    if os.fstat(fd).st_size == want.size:
        return fd
    os.close(fd)
    return None
