"""How playbacks load content: as guests do, but for nobody who waits."""

from collections.abc import Awaitable, Callable

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node
from appliance.resolve.closure_loader import ClosureLoader
from appliance.services.fetch import BlobFetcher
from appliance.store.profiles import ProfiledBlob


class ProfileLoader:
    """The `Loader` of playbacks; used on the event loop of what it is made of.

    Args:
        find_path: returns the root node of a store path, and has its Directories come.
        has_image: returns whether the image of a Directory is in the cache.
        closures: loads Directories.
        fetcher: fetches blobs.
    """

    def __init__(
        self,
        find_path: Callable[[bytes], Awaitable[Node]],
        has_image: Callable[[Digest], Awaitable[bool]],
        closures: ClosureLoader,
        fetcher: BlobFetcher,
    ) -> None:
        self._find_path = find_path
        self._has_image = has_image
        self._closures = closures
        self._fetcher = fetcher

    async def load_path(self, name: bytes) -> bool:
        """See `Loader.load_path`."""
        node = await self._find_path(name)
        if not isinstance(node, DirectoryNode):
            return True
        if not await self._has_image(node.digest):
            await self._closures.load_closure(node.digest)
            return True
        await self._closures.join_closure(node.digest)
        return False

    async def load_directory(self, digest: Digest) -> bool:
        """See `Loader.load_directory`."""
        if await self._has_image(digest):
            return False
        await self._closures.load(digest)
        return True

    def has_range(self, read: ProfiledBlob) -> bool:
        """See `Loader.has_range`."""
        return self._fetcher.has_range(read.digest, read.start, read.end)

    async def load_range(self, read: ProfiledBlob) -> None:
        """See `Loader.load_range`."""
        await self._fetcher.fetch_range_ahead(read.digest, read.size, read.start, read.end)
