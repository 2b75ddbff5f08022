"""Parts of large blobs, fetched from a real server that may lie, into a real cache."""

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import pytest

from appliance.castore.chunking import SNIX, BlobChunk
from appliance.castore.digest import Digest
from appliance.errors import ContentMissingError, CorruptBlobError, WrongDigestError
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.fetch import BlobFetcher
from appliance.services.open_services import open_services
from appliance.store.blob_cache import BlobCache, BlobTooLargeError
from appliance.store.blob_files import BlobFile
from appliance.store.blob_parts import BlobParts
from tests.fakes.scripted_services import ScriptedServices

T = TypeVar("T")

DEADLINE_S: Final = 60
MIB: Final = 1 << 20
SIZE: Final = 24 * MIB + 5
CONTENT: Final = random.Random(3).randbytes(SIZE)
DIGEST: Final = Digest.of(CONTENT)
CACHE_BYTES: Final = 1 << 30


class Fetching:
    """A fetcher of a cache, as one process has it."""

    def __init__(self, fetcher: BlobFetcher, cache: BlobCache) -> None:
        self.fetcher = fetcher
        self.cache = cache

    async def read(
        self, start: int, length: int, digest: Digest = DIGEST, size: int = SIZE
    ) -> bytes:
        """Read as a worker does: what the cache has, or what is there after a fetch."""
        for _ in range(16):
            found = self.present(start, length, digest)
            if found is not None:
                return found
            await self.fetcher.fetch_range(digest, size, start, start + length)
        raise AssertionError("provided 16 times and missed all the same")

    def present(self, start: int, length: int, digest: Digest = DIGEST) -> bytes | None:
        with self.cache.store.snapshot() as snapshot:
            blob = snapshot.blob(digest)
            partial = snapshot.partial_blob(digest)
            if isinstance(blob, BlobFile):
                file = blob
            elif partial is not None and partial.has(start, start + length):
                file = BlobFile(partial.key, partial.size)
            else:
                return None
        try:
            fd = self.cache.store.open_blob(file)
        except FileNotFoundError:
            return None  # the blob has become whole since the snapshot
        try:
            return os.pread(fd, length, start)
        finally:
            os.close(fd)

    async def until_whole(self) -> None:
        await self.until_quiet()
        assert self.cache.has(DIGEST)

    async def until_quiet(self) -> None:
        chunks = self.fetcher._chunks
        while tasks := [*chunks._fetching._tasks.values(), *chunks._tasks]:
            await asyncio.wait(tasks)


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[ScriptedServices]:
    with ScriptedServices(tmp_path) as services:
        services.cut(CONTENT)
        yield services


def run(
    peer: ScriptedServices,
    directory: Path,
    work: Callable[[Fetching], Awaitable[T]],
    *,
    cache_bytes: int = CACHE_BYTES,
) -> T:
    """Run `work` with a fetcher that stands for one process."""

    async def main() -> T:
        address = parse_service_uri(peer.uri)
        cache = BlobCache(directory / "cache", cache_bytes)
        try:
            async with (
                asyncio.timeout(DEADLINE_S),
                open_services(ServiceAddresses(address, address, address)) as services,
            ):
                fetcher = BlobFetcher(services.blobs, cache, grace_s=0.0)
                try:
                    return await work(Fetching(fetcher, cache))
                finally:
                    await fetcher.close()
        finally:
            cache.close()

    return asyncio.run(main())


def num_sent(peer: ScriptedServices, chunks: list[BlobChunk]) -> int:
    return sum(peer.reads[chunk.digest] for chunk in chunks)


def disk_bytes(cache: BlobCache) -> int:
    paths = [path for path in (cache.store.path / "blobs").rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in paths)


def test_a_read_fetches_the_chunks_that_it_needs_and_no_others(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    async def work(fetching: Fetching) -> None:
        for start in (17 * MIB, 3 * MIB + 1, SIZE - 4096):
            before = peer.num_sent
            assert await fetching.read(start, 4096) == CONTENT[start : start + 4096]
            await fetching.until_quiet()
            assert 0 < peer.num_sent - before <= 2 * SNIX.max
        assert peer.reads[DIGEST] == 0
        assert fetching.present(0, 1) is None
        assert not fetching.cache.has(DIGEST)

    run(peer, tmp_path, work)


def test_a_read_over_several_chunks_gets_all_of_them(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    async def work(fetching: Fetching) -> None:
        assert await fetching.read(5 * MIB, 3 * MIB) == CONTENT[5 * MIB : 8 * MIB]

    run(peer, tmp_path, work)


@pytest.mark.slow
@pytest.mark.parametrize("sends_ranges", [True, False], ids=["ranges", "chunks"])
def test_a_reader_in_order_gets_every_chunk_once_and_the_blob_becomes_whole(
    peer: ScriptedServices, tmp_path: Path, *, sends_ranges: bool
) -> None:
    peer.sends_ranges = sends_ranges

    async def work(fetching: Fetching) -> None:
        for start in range(0, SIZE, 128 << 10):
            length = min(128 << 10, SIZE - start)
            assert await fetching.read(start, length) == CONTENT[start : start + length]
        await fetching.until_whole()
        await fetching.until_quiet()
        with fetching.cache.store.snapshot() as snapshot:
            assert snapshot.blob(DIGEST) == BlobFile(DIGEST, SIZE)
        assert fetching.cache.charged_bytes() == -(-SIZE // 4096) * 4096

    run(peer, tmp_path, work)
    assert peer.num_sent == SIZE
    assert peer.reads[DIGEST] == 0
    num_calls = peer.ranges[DIGEST] + num_sent(peer, peer.chunks[DIGEST])
    num_chunks = len(peer.chunks[DIGEST])
    assert num_calls < num_chunks / 3 if sends_ranges else num_calls == num_chunks


@pytest.mark.parametrize("damage", ["wrong", "short"])
def test_a_range_that_is_wrong_is_asked_for_by_chunk(
    peer: ScriptedServices, tmp_path: Path, damage: str
) -> None:
    peer.sends_ranges = True
    at = 2 * MIB
    tail = damaged(CONTENT[at : at + 1]) + CONTENT[at + 1 :] if damage == "wrong" else b""
    peer.blobs[DIGEST] = CONTENT[:at] + tail

    async def work(fetching: Fetching) -> None:
        assert await fetching.read(0, 6 * MIB) == CONTENT[: 6 * MIB]

    run(peer, tmp_path, work)
    assert peer.ranges[DIGEST] > 0
    assert peer.num_sent < 13 * MIB


@pytest.mark.slow
def test_reads_in_any_order_make_up_the_blob(peer: ScriptedServices, tmp_path: Path) -> None:
    starts = list(range(0, SIZE, 256 << 10))
    random.Random(4).shuffle(starts)

    async def read(fetching: Fetching, start: int) -> None:
        length = min(256 << 10, SIZE - start)
        assert await fetching.read(start, length) == CONTENT[start : start + length]

    async def work(fetching: Fetching) -> None:
        for at in range(0, len(starts), 8):
            await asyncio.gather(*(read(fetching, start) for start in starts[at : at + 8]))
        await fetching.until_whole()

    run(peer, tmp_path, work)


def test_a_reader_waits_for_its_own_chunks_only(peer: ScriptedServices, tmp_path: Path) -> None:
    chunks = peer.chunks[DIGEST]
    releases = [peer.hold(chunk.digest) for chunk in chunks[:10]]

    async def work(fetching: Fetching) -> None:
        held = asyncio.create_task(fetching.read(0, 4096))
        await asyncio.sleep(0)
        assert await fetching.read(20 * MIB, 4096) == CONTENT[20 * MIB : 20 * MIB + 4096]
        assert not held.done()
        for release in releases:
            release()
        assert await held == CONTENT[:4096]

    run(peer, tmp_path, work)


def test_equal_reads_share_a_fetch(peer: ScriptedServices, tmp_path: Path) -> None:
    async def work(fetching: Fetching) -> None:
        reads = [fetching.read(9 * MIB + at, 4096) for at in range(0, 64 << 10, 4096)]
        await asyncio.gather(*reads)

    run(peer, tmp_path, work)
    assert max(peer.reads.values()) == 1


# --- Peers that lie, or have no chunks ---


def damaged(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [damaged, lambda content: content[:-1], lambda content: content + b"?", lambda _content: b""],
    ids=["wrong", "shorter", "longer", "empty"],
)
def test_a_wrong_chunk_is_never_readable(
    peer: ScriptedServices, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    chunk = peer.chunks[DIGEST][0]
    peer.blobs[chunk.digest] = damage(CONTENT[: chunk.size])

    async def work(fetching: Fetching) -> None:
        with pytest.raises(WrongDigestError, match=f"blob {DIGEST}: chunk {chunk.digest}"):
            await fetching.read(0, 4096)
        assert fetching.present(0, 1) is None
        # The others are right, and failures are not remembered.
        assert await fetching.read(8 * MIB, 10) == CONTENT[8 * MIB : 8 * MIB + 10]
        peer.blobs[chunk.digest] = CONTENT[: chunk.size]
        assert await fetching.read(0, 4096) == CONTENT[:4096]

    run(peer, tmp_path, work)


@pytest.mark.slow
def test_chunks_that_make_up_another_blob_are_dropped_and_the_list_is_not_believed_again(
    peer: ScriptedServices, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = damaged(CONTENT)
    peer.chunks[DIGEST] = peer.cut(other)

    async def work(fetching: Fetching) -> None:
        wrong = f"blob {DIGEST}: the chunks that the service lists make up {Digest.of(other)}"
        assert await fetching.read(0, MIB) == other[:MIB]
        with caplog.at_level(logging.ERROR), pytest.raises(CorruptBlobError, match=wrong):
            await fetching.read(0, SIZE)
        await fetching.until_quiet()
        assert wrong in caplog.text
        assert not fetching.cache.has(DIGEST)
        assert not fetching.cache.has_part(DIGEST)
        assert disk_bytes(fetching.cache) == 0
        # The blob itself is right: it comes whole.
        assert await fetching.read(SIZE - 10, 10) == CONTENT[-10:]
        assert fetching.cache.has(DIGEST)

    run(peer, tmp_path, work)
    assert peer.reads[DIGEST] >= 1


@pytest.mark.parametrize("fault", ["none", "one", "sum", "zero", "huge"])
def test_a_list_that_cannot_be_gone_by_means_the_whole_blob(
    peer: ScriptedServices, tmp_path: Path, fault: str
) -> None:
    chunks = peer.chunks[DIGEST]
    peer.chunks[DIGEST] = {
        "none": [],
        "one": [BlobChunk(DIGEST, SIZE)],
        "sum": chunks[:-1],
        "zero": [*chunks, BlobChunk(Digest.of(b""), 0)],
        "huge": [BlobChunk(chunks[0].digest, SIZE - 7), BlobChunk(chunks[1].digest, 7)],
    }[fault]

    async def work(fetching: Fetching) -> None:
        assert await fetching.read(9 * MIB, 100) == CONTENT[9 * MIB : 9 * MIB + 100]
        assert fetching.cache.has(DIGEST)

    run(peer, tmp_path, work)
    assert peer.reads[DIGEST] == 1


def test_without_chunks_no_byte_is_readable_before_all_are_verified(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    peer.chunks.clear()
    peer.blobs[DIGEST] = damaged(CONTENT)

    async def work(fetching: Fetching) -> None:
        with pytest.raises(CorruptBlobError):
            await fetching.read(0, 4096)
        assert fetching.present(0, 1) is None

    run(peer, tmp_path, work)


def test_a_listed_chunk_that_the_peer_does_not_have_means_the_whole_blob(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    del peer.blobs[peer.chunks[DIGEST][3].digest]

    async def work(fetching: Fetching) -> None:
        assert await fetching.read(0, 3 * MIB) == CONTENT[: 3 * MIB]
        assert fetching.cache.has(DIGEST)

    run(peer, tmp_path, work)


def test_a_blob_that_is_not_there_is_missing(peer: ScriptedServices, tmp_path: Path) -> None:
    async def work(fetching: Fetching) -> None:
        with pytest.raises(ContentMissingError):
            await fetching.read(0, 10, Digest.of(b"nothing"), SIZE)

    run(peer, tmp_path, work)


# --- The cache ---


def test_what_a_process_fetched_is_there_for_the_next(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    async def half(fetching: Fetching) -> None:
        await fetching.fetcher.fetch_range(DIGEST, SIZE, 0, SIZE // 2)

    async def rest(fetching: Fetching) -> int:
        before = peer.num_sent
        assert await fetching.read(100, 5 * MIB) == CONTENT[100 : 100 + 5 * MIB]
        assert peer.num_sent == before
        await fetching.fetcher.fetch_range(DIGEST, SIZE, SIZE // 2, SIZE)
        await fetching.until_whole()
        return peer.num_sent - before

    run(peer, tmp_path, half)
    assert run(peer, tmp_path, rest) <= SIZE // 2 + 2 * SNIX.max


def test_a_whole_fetch_completes_what_is_there_in_part(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    async def work(fetching: Fetching) -> None:
        await fetching.read(10 * MIB, 10)
        await fetching.fetcher.fetch(DIGEST, SIZE)
        assert fetching.cache.find(DIGEST) == SIZE

    run(peer, tmp_path, work)
    assert peer.reads[DIGEST] == 0
    assert peer.num_sent == SIZE


@pytest.mark.slow
def test_the_bound_holds_while_parts_of_many_blobs_are_read(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    contents = [random.Random(seed).randbytes(4 * MIB) for seed in range(6)]
    for content in contents:
        peer.cut(content)
    bound = 10 * MIB

    async def work(fetching: Fetching) -> None:
        chance = random.Random(5)
        for _ in range(60):
            content = chance.choice(contents)
            start = chance.randrange(4 * MIB - 100)
            found = await fetching.read(start, 100, Digest.of(content), 4 * MIB)
            assert found == content[start : start + 100]
            assert fetching.cache.charged_bytes() <= bound
            assert disk_bytes(fetching.cache) <= bound

    run(peer, tmp_path, work, cache_bytes=bound)


def test_a_blob_that_fits_no_cache_is_refused(peer: ScriptedServices, tmp_path: Path) -> None:
    async def work(fetching: Fetching) -> None:
        with pytest.raises(BlobTooLargeError):
            await fetching.read(0, 10)

    run(peer, tmp_path, work, cache_bytes=SIZE // 2)
    assert peer.num_sent == 0


def test_parts_that_are_evicted_while_they_are_fetched_are_fetched_again(
    peer: ScriptedServices, tmp_path: Path
) -> None:
    chunk = peer.chunks[DIGEST][0]
    release = peer.hold(chunk.digest)

    async def work(fetching: Fetching) -> None:
        reading = asyncio.create_task(fetching.read(0, 4096))
        await asyncio.to_thread(peer.until_read, chunk.digest)
        first = BlobParts(fetching.cache).find(DIGEST)
        fetching.cache.drop(DIGEST)
        release()
        assert await reading == CONTENT[:4096]
        second = BlobParts(fetching.cache).find(DIGEST)
        assert first is not None
        assert second is not None
        assert first.token != second.token
        paths = list((fetching.cache.store.path / "blobs").rglob("*"))
        assert [path.name for path in paths if path.is_file()] == [second.key.hex()]

    run(peer, tmp_path, work)
