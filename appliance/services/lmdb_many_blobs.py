"""Many small blobs of a store in LMDB at a time: one turn of a thread, one commit."""

from collections.abc import Sequence

from appliance.castore.digest import Digest
from appliance.errors import disk_error
from appliance.services.contracts import Buffer
from appliance.store.batch import Batch
from appliance.store.writer import AsyncStore


class LmdbManyBlobs:
    """The small blobs of an open store (lent); see `ManyBlobs`."""

    def __init__(self, shared: AsyncStore) -> None:
        self._shared = shared

    async def has_many(self, digests: Sequence[Digest]) -> Sequence[bool]:
        """See `ManyBlobs.has_many`."""
        return await self._shared.run(lambda: self._has(digests))

    async def put_many(self, contents: Sequence[Buffer]) -> None:
        """See `ManyBlobs.put_many`."""
        if contents:
            await self._shared.commit(await self._shared.run(lambda: _batch_of(contents)))

    def _has(self, digests: Sequence[Digest]) -> list[bool]:
        store = self._shared.store
        try:
            with store.snapshot() as snapshot:
                return [snapshot.has_blob(digest) for digest in digests]
        except OSError as exc:
            raise disk_error(exc, store.path) from exc


def _batch_of(contents: Sequence[Buffer]) -> Batch:
    batch = Batch()
    for content in contents:
        batch.add_blob(Digest.of(content), content)
    return batch
