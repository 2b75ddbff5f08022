"""The PathInfo service of a store in LMDB."""

from collections.abc import AsyncIterator, Sequence
from itertools import islice
from typing import Final

from appliance.castore.directory import Node
from appliance.errors import CorruptBlobError, PathInfoError
from appliance.nix.path_info import read_path_info
from appliance.nix.path_info_rules import check_claims, nar_key
from appliance.services.contracts import BlobService, DirectoryService, NarInfo
from appliance.services.nar_render import nar_info
from appliance.services.path_info_checks import check_stated_size
from appliance.store.batch import Batch
from appliance.store.writer import AsyncStore

# PathInfos read in one transaction for a listing.
_LIST_CHUNK: Final = 256


class LmdbPathInfoService:
    """The PathInfos of an open store.

    Args:
        shared: the store (lent).
        blobs: where the contents of files are.
        directories: where the directories are.
        may_replace: a PathInfo that is put replaces one that it contradicts.
    """

    def __init__(
        self,
        shared: AsyncStore,
        blobs: BlobService,
        directories: DirectoryService,
        *,
        may_replace: bool = False,
    ) -> None:
        self._shared = shared
        self._may_replace = may_replace
        self._blobs = blobs
        self._directories = directories

    async def get(self, path_digest: bytes) -> bytes | None:
        """Return the PathInfo of a store path."""
        return await self._shared.run(lambda: self._get(path_digest))

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`."""
        info = check_claims(path_info)
        await check_stated_size(info, self._blobs, self._directories)
        batch = Batch()
        batch.may_replace_paths = self._may_replace
        batch.add_path_info(info.path.digest, path_info, needs_references=needs_references)
        await self._shared.commit(batch)
        return await self.get(info.path.digest) or path_info

    async def list(self) -> AsyncIterator[bytes]:
        """Yield all PathInfos by ascending digest; raise for a bad one after all others."""
        after = b""
        bad: CorruptBlobError | None = None
        while chunk := await self._shared.run(lambda: self._chunk(after)):  # noqa: B023 - awaited at once
            for path_digest, path_info in chunk:
                try:
                    _check_stored(path_digest, path_info)
                except CorruptBlobError as exc:
                    bad = bad or exc
                else:
                    yield path_info
            after = chunk[-1][0]
        if bad is not None:
            raise bad

    async def calculate_nar(self, node: Node) -> NarInfo:
        """Return size and digest of the NAR of `node`; they are kept once calculated."""
        key = nar_key(node)
        known = await self._shared.run(lambda: self._known_nar(key))
        if known is not None:
            return known
        info = await nar_info(node, self._blobs, self._directories)
        if self._shared.store.is_writable:
            batch = Batch()
            batch.add_nar_info(key, info.size, info.sha256)
            await self._shared.commit(batch)
        return info

    def _get(self, path_digest: bytes) -> bytes | None:
        with self._shared.store.snapshot() as snapshot:
            path_info = snapshot.path_info(path_digest)
        if path_info is not None:
            _check_stored(path_digest, path_info)
        return path_info

    def _chunk(self, after: bytes) -> Sequence[tuple[bytes, bytes]]:
        with self._shared.store.snapshot() as snapshot:
            return [*islice(snapshot.path_infos(after), _LIST_CHUNK)]

    def _known_nar(self, key: bytes) -> NarInfo | None:
        with self._shared.store.snapshot() as snapshot:
            known = snapshot.nar_info(key)
        return None if known is None else NarInfo(*known)


def _check_stored(path_digest: bytes, path_info: bytes) -> None:
    try:
        path = read_path_info(path_info).path
    except PathInfoError as exc:
        raise CorruptBlobError(f"PathInfo {path_digest.hex()}: {exc}") from exc
    if path.digest != path_digest:
        raise CorruptBlobError(f"PathInfo {path_digest.hex()}: it is that of {path.basename()}")
