"""The PathInfo service of an object store; `object_layout` says where what is.

A PathInfo is merged with the one that is there, and put on the condition that this is still the
same, so that two writers do not undo each other's work.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from appliance.castore.directory import Node
from appliance.errors import ContentMissingError, CorruptBlobError, PathInfoError, StoreError
from appliance.nix.path_info import PathInfo, read_path_info
from appliance.nix.path_info_rules import accepted, check_claims, nar_key
from appliance.services.contracts import BlobService, DirectoryService, NarInfo
from appliance.services.known_contents import KnownContents
from appliance.services.nar_render import nar_info
from appliance.services.object_bucket import Bucket
from appliance.services.object_layout import PATH_INFO_OBJECT_MAX, PATH_INFOS, path_info_key
from appliance.services.path_info_checks import check_stated_size

if TYPE_CHECKING:
    from appliance.castore.digest import Digest

# How often a PathInfo that others put at the same time is put anew.
_ATTEMPTS_MAX: Final = 16
# Requests of a listing under way at a time.
_LISTED_AT_A_TIME: Final = 32


class ObjectPathInfoService:
    """The PathInfos in a bucket.

    Args:
        bucket: where they are.
        blobs: where the contents of files are.
        directories: where the directories are.
        may_replace: a PathInfo that is put replaces one that it contradicts.
    """

    def __init__(
        self,
        bucket: Bucket,
        blobs: BlobService,
        directories: DirectoryService,
        *,
        may_replace: bool = False,
    ) -> None:
        self._bucket = bucket
        self._blobs = blobs
        self._directories = directories
        self._may_replace = may_replace
        self._nar_infos: dict[Digest, NarInfo] = {}
        # Not every store keeps two puts at the same moment apart.
        self._puts: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def get(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path."""
        key = path_info_key(path_digest)
        encoded = await self._bucket.get(key, PATH_INFO_OBJECT_MAX)
        if encoded is not None:
            self._check_untrusted(key, encoded, path_digest)
        return encoded

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`; nothing is ever removed by us, so references stay."""
        info = check_claims(path_info)
        await check_stated_size(info, self._blobs, self._directories)
        if needs_references:
            await self._check_references(info)
        async with self._puts.setdefault(path_info_key(info.path.digest), asyncio.Lock()):
            return await self._merge(info, path_info)

    async def list(self) -> AsyncIterator[bytes]:
        """Yield all PathInfos, unchecked: a bad one must not hide the others."""
        under_way: deque[asyncio.Task[bytes | None]] = deque()
        try:
            async for key in self._bucket.list(PATH_INFOS):
                work = self._bucket.get(key, PATH_INFO_OBJECT_MAX)
                under_way.append(asyncio.create_task(work))
                if len(under_way) >= _LISTED_AT_A_TIME:
                    encoded = await under_way.popleft()
                    if encoded is not None:
                        yield encoded
            while under_way:
                encoded = await under_way.popleft()
                if encoded is not None:
                    yield encoded
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def calculate_nar(self, node: Node) -> NarInfo:
        """Return size and digest of the NAR of `node`; they are kept once calculated."""
        key = nar_key(node)
        info = self._nar_infos.get(key)
        if info is None:
            info = await nar_info(node, self._blobs, self._directories)
            self._nar_infos[key] = info
        return info

    async def _check_references(self, info: PathInfo) -> None:
        for reference in info.references:
            key = path_info_key(reference)
            if reference != info.path.digest and not await self._bucket.has(key):
                raise ContentMissingError(
                    f"{info.path.absolute()}: refers to {reference.hex()}, which is not there"
                )

    async def _merge(self, info: PathInfo, path_info: bytes) -> bytes:
        key = path_info_key(info.path.digest)
        known = KnownContents(self._nar_infos)
        for _ in range(_ATTEMPTS_MAX):
            found = await self._bucket.get_versioned(key, PATH_INFO_OBJECT_MAX)
            if found is None:
                kept = accepted(None, path_info, known, may_replace=self._may_replace)
                if await self._bucket.put_new(key, kept):
                    return kept
                continue
            old, version = found
            self._check_untrusted(key, old, info.path.digest)
            for node in (read_path_info(old).node, info.node):
                await known.read(node, self._directories)
            kept = accepted(old, path_info, known, may_replace=self._may_replace)
            if kept == old or await self._bucket.replace(key, kept, version):
                return kept
        raise StoreError(f"{self._bucket.name}: {key}: is changed by others again and again")

    def _check_untrusted(self, key: str, encoded: bytes, path_digest: bytes) -> None:
        try:
            path = read_path_info(encoded).path
        except PathInfoError as exc:
            raise CorruptBlobError(f"{self._bucket.name}: {key}: {exc}") from exc
        if path.digest != path_digest:
            raise CorruptBlobError(f"{self._bucket.name}: {key}: is of another path")
