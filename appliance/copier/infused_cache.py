"""A binary cache whose URLs of NARs say which content a path has, beside a store of this machine.

Caches of Snix and of `appliance http` have the root node in such a URL (see `nar_urls`). Of two
paths with the same content, such as a package before and after a rebuild that changed nothing, only
one has to cross: the NAR of the other is rendered from the store. Nobody signs the URL, and nothing
is believed for it: the copy compares the NAR with the signed hash, whoever has sent it.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.copier.binary_cache import BinaryCache, HttpCacheFiles, LocalCacheFiles
from appliance.copier.copier import CopySource
from appliance.copier.service_source import ServiceClosures, open_service_source
from appliance.copier.source_address import CacheAddress
from appliance.errors import StoreError
from appliance.http_cache.nar_urls import node_in_url
from appliance.nix.nar import Event
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.store_path import StorePath
from appliance.services.addresses import ServiceAddresses
from appliance.services.contracts import BlobService, Services
from appliance.store.writer import AsyncStore

_PIECE_SIZE: Final = 1 << 20


class InfusedCache:
    """A cache as a source; what the store has whole is not asked of it.

    Args:
        cache: the cache.
        closures: the store.
    """

    def __init__(self, cache: BinaryCache, closures: ServiceClosures) -> None:
        self.num_readers = cache.num_readers
        self.needs_signatures = cache.needs_signatures
        self._cache = cache
        self._closures = closures

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """See `CopySource.claim`."""
        return self._cache.claim(path)

    def events(self, claim: NarInfoFile) -> Generator[Event, None, None]:
        """See `CopySource.events`."""
        node = node_in_url(claim.url)
        if node is not None and self._closures.run(lambda services: _is_whole(node, services)):
            yield from self._closures.events_of(node)
        else:
            yield from self._cache.events(claim)


@contextmanager
def open_cache(
    address: CacheAddress, target: ServiceAddresses, stores: dict[Path, AsyncStore]
) -> Iterator[CopySource]:
    """Open a cache; if the target is a store of this machine, what that has is not asked for.

    Args:
        address: of the cache.
        target: where is copied to.
        stores: stores that this process has open already, by their paths.

    Raises:
        StoreError: it is not a cache, or is for another store directory.
    """
    directory = address.directory()
    files = HttpCacheFiles(address.base) if directory is None else LocalCacheFiles(directory)
    cache = BinaryCache(files, address.base)
    if target.one_store() is None:
        yield cache
        return
    with open_service_source(target, stores) as closures:
        yield InfusedCache(cache, closures)


async def _is_whole(node: Node, services: Services) -> bool:
    """Whether all content of a node is there, and undamaged."""
    digests: Iterable[Digest] = ()
    try:
        match node:
            case FileNode(_, digest, _):
                digests = {digest}
            case DirectoryNode(_, digest, _):
                found = [one async for one in services.directories.get_recursive(digest)]
                if not found:
                    return False
                digests = {file.digest for directory in found for file in directory.files}
        for digest in digests:
            if not await _is_undamaged(digest, services.blobs):
                return False
    except StoreError:
        return False
    return True


async def _is_undamaged(digest: Digest, blobs: BlobService) -> bool:
    reader = await blobs.open_read(digest)
    if reader is None:
        return False
    hasher = blake3()
    try:
        while piece := await reader.read(_PIECE_SIZE):
            hasher.update(piece)
    finally:
        await reader.close()
    return hasher.digest() == digest
