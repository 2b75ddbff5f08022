"""What only the services of a store in LMDB meet: descriptors, temporary files, full disks."""

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode
from appliance.errors import ServiceLimitError, StoreFullError
from appliance.services.contracts import DirectoryPutter
from appliance.services.lmdb_blobs import LmdbBlobService
from appliance.services.lmdb_directories import LmdbDirectoryService
from appliance.store.schema import INLINE_MAX
from appliance.store.writer import AsyncStore
from tests.contracts.rig import put_blob, read_blob
from tests.db.test_environment import small_disk
from tests.store.audit import blob_path


def run(path: Path, work: Callable[[AsyncStore], Awaitable[None]]) -> None:
    async def main() -> None:
        store = AsyncStore.open(path, create=True)
        try:
            async with asyncio.timeout(30):
                await work(store)
        finally:
            store.close()

    asyncio.run(main())


async def put_large(store: AsyncStore) -> tuple[LmdbBlobService, Digest]:
    blobs = LmdbBlobService(store)
    writer = await blobs.open_write()
    await writer.write(os.urandom(INLINE_MAX + 1))
    return blobs, await writer.close()


async def open_and_give_up(blobs: LmdbBlobService, digest: Digest) -> None:
    opening = asyncio.create_task(blobs.open_read(digest))
    await asyncio.sleep(0)
    opening.cancel()
    with suppress(asyncio.CancelledError):
        await opening


@asynccontextmanager
async def no_more_descriptors() -> AsyncIterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_reading_given_up_before_the_blob_is_open_leaves_no_descriptor(tmp_path: Path) -> None:
    async def work(store: AsyncStore) -> None:
        blobs, digest = await put_large(store)
        num_before = num_descriptors()
        for _ in range(20):
            await open_and_give_up(blobs, digest)
        # The threads may have the last ones in hand yet.
        for _ in range(1000):
            if num_descriptors() <= num_before:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{num_descriptors()} descriptors, {num_before} before")

    run(tmp_path / "store", work)


def test_blob_that_cannot_be_opened_for_lack_of_descriptors_is_not_corrupt(tmp_path: Path) -> None:
    async def work(store: AsyncStore) -> None:
        blobs, digest = await put_large(store)
        async with no_more_descriptors():
            with pytest.raises(ServiceLimitError, match="Too many open files"):
                await blobs.open_read(digest)
        reader = await blobs.open_read(digest)
        assert reader is not None
        await reader.close()

    run(tmp_path / "store", work)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, INLINE_MAX)])
def test_blob_whose_file_is_not_whole_is_absent_until_it_is_put_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    async def work(store: AsyncStore) -> None:
        blobs, digest = await put_large(store)
        content = blob_path(store.store, digest).read_bytes()
        damage(blob_path(store.store, digest))
        assert not await blobs.has(digest)
        assert await blobs.stat(digest) is None
        assert await blobs.open_read(digest) is None

        assert await put_blob(blobs, content) == digest
        assert await blobs.has(digest)
        assert await read_blob(blobs, digest) == content

    run(tmp_path / "store", work)


@pytest.mark.slow
def test_closure_of_small_directories_meets_a_full_disk(tmp_path: Path) -> None:
    async def put_many(putter: DirectoryPutter) -> None:
        for number in range(10_000):
            names = [b"%08d-%08d" % (number, index) for index in range(20)]
            files = [FileNode(name, Digest(bytes(32)), 1, executable=False) for name in names]
            await putter.put(Directory(files=files))

    async def work(store: AsyncStore) -> None:
        putter = LmdbDirectoryService(store).put_multiple_start()
        with pytest.raises(StoreFullError):
            await put_many(putter)
        await putter.abort()

    with small_disk(tmp_path / "disk", "3m") as disk:
        run(disk / "store", work)
