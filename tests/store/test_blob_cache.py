"""The cache alone, and the fetcher that fills it, over services in this process."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.errors import ContentMissingError, CorruptBlobError
from appliance.services.contracts import BlobReader
from appliance.services.fetch import FETCHES_MAX, BlobFetcher
from appliance.services.memory_services import MemoryBlobService
from appliance.store.blob_cache import BlobCache, BlobTooLargeError, charge_of
from appliance.store.blob_files import BlobFile
from appliance.store.schema import INLINE_MAX
from tests.store.audit import blob_path, read_file

MAX_BYTES = 1 << 20
SMALL = 10_000
LARGE = 200_000


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlobCache]:
    cache = BlobCache(tmp_path / "cache", MAX_BYTES)
    yield cache
    cache.close()


class SlowBlobs(MemoryBlobService):
    """Blobs in memory; reading one in `held` waits until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[Digest, asyncio.Event] = {}
        self.opened: list[Digest] = []
        self.is_holding = asyncio.Event()

    async def open_read(self, digest: Digest) -> BlobReader | None:
        self.opened.append(digest)
        if digest in self.held:
            self.is_holding.set()
            await self.held[digest].wait()
        return await super().open_read(digest)

    async def put(self, content: bytes) -> Digest:
        writer = await self.open_write()
        await writer.write(content)
        return await writer.close()


@asynccontextmanager
async def fetching(
    cache: BlobCache, grace_s: float = 0
) -> AsyncIterator[tuple[SlowBlobs, BlobFetcher]]:
    blobs = SlowBlobs()
    fetcher = BlobFetcher(blobs, cache, grace_s=grace_s)
    try:
        yield blobs, fetcher
    finally:
        await fetcher.close()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(main())


def content_in(cache: BlobCache, digest: Digest) -> bytes | None:
    with cache.store.snapshot() as snapshot:
        blob = snapshot.blob(digest)
        if isinstance(blob, BlobFile):
            return read_file(cache.store, blob)
        return None if blob is None else bytes(blob)


def files_of(cache: BlobCache) -> list[Path]:
    return [path for path in cache.store.path.glob("*/*/*") if path.is_file()]


@pytest.mark.parametrize("size", [0, 1, INLINE_MAX, INLINE_MAX + 1, LARGE])
def test_a_blob_is_fetched_once(cache: BlobCache, size: int) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            content = os.urandom(size)
            digest = await blobs.put(content)
            await asyncio.gather(*(fetcher.fetch(digest, size) for _ in range(5)))
            await fetcher.fetch(digest, size)
            assert content_in(cache, digest) == content
            assert len(blobs.opened) <= 1

    run(work)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_bound_holds_and_the_least_recently_used_goes_first(
    cache: BlobCache, size: int
) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            favourite = await blobs.put(os.urandom(size))
            await fetcher.fetch(favourite, size)
            num_fitting = MAX_BYTES // charge_of(size)
            digests = [await blobs.put(os.urandom(size)) for _ in range(3 * num_fitting)]
            for digest in digests:
                await fetcher.fetch(digest, size)
                await fetcher.touch([favourite])
                assert cache.charged_bytes() <= MAX_BYTES
                assert sum(path.stat().st_size for path in files_of(cache)) <= MAX_BYTES
            present = [digest for digest in digests if content_in(cache, digest) is not None]
            assert present == digests[-(num_fitting - 1) :]
            assert content_in(cache, favourite) is not None

    run(work)


def test_blobs_that_fit_only_in_turns_are_fetched_in_turns(cache: BlobCache) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            size = MAX_BYTES * 3 // 4
            digests = [await blobs.put(os.urandom(size)) for _ in range(3)]
            await asyncio.gather(*(fetcher.fetch(digest, size) for digest in digests))
            assert sum(content_in(cache, digest) is not None for digest in digests) == 1
            assert len(files_of(cache)) == 1

    run(work)


def test_a_blob_larger_than_the_cache_is_refused(cache: BlobCache) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            kept = await blobs.put(b"kept")
            await fetcher.fetch(kept, 4)
            digest = await blobs.put(os.urandom(MAX_BYTES + 1))
            with pytest.raises(BlobTooLargeError, match="more than the whole cache may hold"):
                await fetcher.fetch(digest, MAX_BYTES + 1)
            assert content_in(cache, kept) == b"kept"

    run(work)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_what_failed_leaves_nothing_and_is_asked_for_again(cache: BlobCache, size: int) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            content = os.urandom(size)
            digest = Digest.of(content)
            with pytest.raises(ContentMissingError):
                await fetcher.fetch(digest, size)
            await blobs.put(content)
            for wrong_size in (size - 1, size + 1):
                with pytest.raises(CorruptBlobError):
                    await fetcher.fetch(digest, wrong_size)
            assert cache.charged_bytes() == 0
            assert files_of(cache) == []
            await fetcher.fetch(digest, size)
            with pytest.raises(CorruptBlobError, match=f"has {size} bytes, expected"):
                await fetcher.fetch(digest, size + 1)
            assert content_in(cache, digest) == content

    run(work)


def test_no_more_are_fetched_at_a_time_than_is_allowed(cache: BlobCache) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            release = asyncio.Event()
            digests = [await blobs.put(b"%d" % number) for number in range(1000, 1200)]
            blobs.held = dict.fromkeys(digests, release)
            fetches = [asyncio.create_task(fetcher.fetch(digest, 4)) for digest in digests]
            for _ in range(200):
                await asyncio.sleep(0)
            assert len(blobs.opened) == FETCHES_MAX
            release.set()
            await asyncio.gather(*fetches)

    run(work)


async def ahead_is_over(fetcher: BlobFetcher) -> None:
    while fetcher._ahead._running:
        await asyncio.wait(fetcher._ahead._running)


def test_what_is_fetched_ahead_is_fetched_once(cache: BlobCache) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            digests = [await blobs.put(b"%04d" % number) for number in range(100)]
            release = blobs.held[digests[-1]] = asyncio.Event()
            fetcher.fetch_ahead((digest, 4) for digest in digests)
            await blobs.is_holding.wait()
            joined = asyncio.create_task(fetcher.fetch(digests[-1], 4))
            await asyncio.sleep(0)
            release.set()
            await joined
            for digest in digests:
                await fetcher.fetch(digest, 4)
            assert sorted(blobs.opened) == sorted(digests)

    run(work)


def test_what_does_not_come_ahead_keeps_no_fetch_waiting(cache: BlobCache) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            stuck = [await blobs.put(b"%04d" % number) for number in range(100)]
            blobs.held = {digest: asyncio.Event() for digest in stuck}
            fetcher.fetch_ahead((digest, 4) for digest in stuck)
            for number in range(FETCHES_MAX + 1):
                await fetcher.fetch(await blobs.put(b"%d" % number), len(b"%d" % number))
            not_begun = stuck[-1]
            blobs.held[not_begun].set()
            await fetcher.fetch(not_begun, 4)

    run(work)


def test_what_is_fetched_ahead_stays_within_the_bound(cache: BlobCache) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            digests = [await blobs.put(os.urandom(SMALL)) for _ in range(200)]
            fetcher.fetch_ahead((digest, SMALL) for digest in digests)
            await ahead_is_over(fetcher)
            assert MAX_BYTES // 2 < cache.charged_bytes() <= MAX_BYTES

    run(work)


def test_what_is_fetched_ahead_evicts_nothing_that_was_waited_for_just_now(
    cache: BlobCache,
) -> None:
    async def work() -> None:
        async with fetching(cache, grace_s=30) as (blobs, fetcher):
            num_fitting = MAX_BYTES // charge_of(SMALL)
            kept = [await blobs.put(os.urandom(SMALL)) for _ in range(num_fitting)]
            for digest in kept:
                await fetcher.fetch(digest, SMALL)
            more = await blobs.put(os.urandom(SMALL))
            fetcher.fetch_ahead([(more, SMALL)])
            await ahead_is_over(fetcher)
            assert blobs.opened[-1] == more
            assert content_in(cache, more) is None
            assert all(content_in(cache, digest) is not None for digest in kept)

    run(work)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_who_is_told_a_wrong_size_spoils_it_for_no_other(
    cache: BlobCache,
    is_ahead: bool,  # noqa: FBT001 -- a pytest parameter
) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            digest = await blobs.put(b"content")
            release = blobs.held[digest] = asyncio.Event()
            wrong: list[asyncio.Task[None]] = []
            if is_ahead:
                fetcher.fetch_ahead([(digest, 6)])
            else:
                wrong.append(asyncio.create_task(fetcher.fetch(digest, 6)))
            await blobs.is_holding.wait()
            right = asyncio.create_task(fetcher.fetch(digest, 7))
            await asyncio.sleep(0)
            release.set()
            await right
            assert content_in(cache, digest) == b"content"
            for task in wrong:
                with pytest.raises(CorruptBlobError, match="more than 6"):
                    await task

    run(work)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 5)])
def test_a_damaged_file_is_fetched_again(cache: BlobCache, damage: Callable[[Path], None]) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            content = os.urandom(LARGE)
            digest = await blobs.put(content)
            await fetcher.fetch(digest, LARGE)
            (path,) = files_of(cache)
            damage(path)
            await fetcher.fetch(digest, LARGE)
            assert content_in(cache, digest) == content

    run(work)


def test_a_reservation_of_a_killed_process_ages_and_goes(cache: BlobCache) -> None:
    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            assert cache.reserve(Digest(bytes(32)), MAX_BYTES, ())
            digest = await blobs.put(os.urandom(LARGE))
            await fetcher.fetch(digest, LARGE)
            assert cache.charged_bytes() == charge_of(LARGE)

    run(work)


def test_a_file_without_a_record_goes_with_its_reservation(cache: BlobCache) -> None:
    # This is what a process leaves if it is killed after it has moved the file to its place.
    digest = Digest(bytes(32))
    assert cache.reserve(digest, LARGE, ())
    blob_path(cache.store, digest).parent.mkdir(parents=True)
    blob_path(cache.store, digest).write_bytes(bytes(LARGE))
    assert cache.reserve(Digest(b"1" * 32), MAX_BYTES, ())
    assert files_of(cache) == []


def test_a_lower_bound_takes_effect_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    cache = BlobCache(path, MAX_BYTES)

    async def work() -> None:
        async with fetching(cache) as (blobs, fetcher):
            for _ in range(5):
                await fetcher.fetch(await blobs.put(os.urandom(LARGE)), LARGE)

    run(work)
    cache.close()
    cache = BlobCache(path, MAX_BYTES // 3)
    assert 0 < cache.charged_bytes() <= MAX_BYTES // 3
    assert len(files_of(cache)) == 1
    cache.close()


def test_the_cache_of_another_boot_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    other = path / "v1-00000000-0000-0000-0000-000000000000"
    other.mkdir(parents=True)
    BlobCache(path, MAX_BYTES).close()
    assert not other.exists()
    (only,) = path.iterdir()
    assert only.name.startswith("v3-")
