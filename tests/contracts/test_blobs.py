"""What every blob service does."""

import itertools

import pytest

from appliance.castore.chunking import BlobChunk, Chunker, unpack
from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.services.contracts import Services
from tests.contracts.rig import Rig, fresh_bytes, put_blob, read_blob

SIZES = (1, 4096, 65536, 65537, 1 << 20, (5 << 20) + 3)


def test_unknown_blob_is_absent(rig: Rig) -> None:
    digest = Digest.of(fresh_bytes())

    async def work(services: Services) -> None:
        assert not await services.blobs.has(digest)
        assert await services.blobs.stat(digest) is None
        assert await services.blobs.open_read(digest) is None

    rig.run(work)


def test_empty_blob_is_there_before_anybody_puts_it(rig: Rig) -> None:
    async def work(services: Services) -> None:
        assert await services.blobs.has(EMPTY_DIGEST)
        assert await read_blob(services.blobs, EMPTY_DIGEST) == b""

    rig.run(work)


def test_empty_blob_can_be_put(rig: Rig) -> None:
    async def work(services: Services) -> None:
        writer = await services.blobs.open_write()
        assert await writer.close() == EMPTY_DIGEST
        assert await read_blob(services.blobs, EMPTY_DIGEST) == b""

    rig.run(work)


@pytest.mark.parametrize("size", SIZES)
def test_blob_comes_back_as_it_was_put(rig: Rig, size: int) -> None:
    content = fresh_bytes(size)

    async def work(services: Services) -> None:
        digest = await put_blob(services.blobs, content)
        assert digest == Digest.of(content)
        assert await services.blobs.has(digest)
        assert await services.blobs.stat(digest) is not None
        assert await read_blob(services.blobs, digest) == content

    rig.run(work)


@pytest.mark.parametrize("piece", [1000, 65536, 300_000])
def test_blob_may_be_written_in_pieces(rig: Rig, piece: int) -> None:
    content = fresh_bytes(1_000_000)

    async def work(services: Services) -> None:
        writer = await services.blobs.open_write()
        buffer = bytearray()
        for start in range(0, len(content), piece):
            buffer[:] = content[start : start + piece]
            await writer.write(buffer)
        digest = await writer.close()
        assert await read_blob(services.blobs, digest) == content

    rig.run(work)


def test_blob_put_twice_is_one(rig: Rig) -> None:
    content = fresh_bytes(100_000)

    async def work(services: Services) -> None:
        assert await put_blob(services.blobs, content) == await put_blob(services.blobs, content)
        assert await read_blob(services.blobs, Digest.of(content)) == content

    rig.run(work)


def test_blob_aborted_is_absent(rig: Rig) -> None:
    content = fresh_bytes(100_000)

    async def work(services: Services) -> None:
        writer = await services.blobs.open_write()
        await writer.write(content)
        await writer.abort()
        assert not await services.blobs.has(Digest.of(content))

    rig.run(work)


@pytest.mark.parametrize("size", [12, 70_000, 2_500_000])
def test_reader_goes_on_wherever_it_is_sent(rig: Rig, size: int) -> None:
    content = fresh_bytes(size)
    length = len(content)
    offsets = [0, length // 2, 1, length - 3, length, 0, length + 10, length // 3]

    async def work(services: Services) -> None:
        reader = await services.blobs.open_read(await put_blob(services.blobs, content))
        assert reader is not None
        for offset, num in itertools.product(offsets, (1, 5000)):
            await reader.seek(offset)
            assert await reader.read(num) == content[offset : offset + num]
        await reader.close()

    rig.run(work)


# --- Chunks ---


def chunks_of(content: bytes) -> list[BlobChunk]:
    chunker = Chunker()
    chunker.update(content)
    return list(unpack(chunker.finish()))


@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, (5 << 20) + 3])
def test_a_large_blob_has_the_chunks_of_its_content(rig: Rig, size: int) -> None:
    content = fresh_bytes(size - 4)
    expected = chunks_of(content) if size > rig.cuts_over else []

    async def work(services: Services) -> None:
        digest = await put_blob(services.blobs, content)
        assert list(await services.blobs.stat(digest) or ()) == expected

    rig.run(work)


def test_a_chunk_is_read_by_its_digest(rig: Rig) -> None:
    content = fresh_bytes(3_000_000)
    others = content[:2_000_000] + fresh_bytes(500_000)

    async def work(services: Services) -> None:
        await put_blob(services.blobs, content)
        await put_blob(services.blobs, others)
        at = 0
        for chunk in chunks_of(content):
            expected = content[at : at + chunk.size]
            assert await read_blob(services.blobs, chunk.digest) == expected
            reader = await services.blobs.open_read(chunk.digest)
            assert reader is not None
            await reader.seek(chunk.size - 7)
            assert await reader.read(100) == expected[-7:]
            await reader.close()
            at += chunk.size
        assert at == len(content)

    rig.run(work)


def test_a_chunk_is_no_blob_that_need_not_be_put(rig: Rig) -> None:
    content = fresh_bytes(3_000_000)
    chunk = chunks_of(content)[-1]

    async def work(services: Services) -> None:
        await put_blob(services.blobs, content)
        assert list(await services.blobs.stat(chunk.digest) or ()) == []
        assert await services.blobs.stat(chunk.digest) is not None
        assert not await services.blobs.has(chunk.digest)
        assert await put_blob(services.blobs, content[-chunk.size :]) == chunk.digest
        assert await services.blobs.has(chunk.digest)
        assert await read_blob(services.blobs, chunk.digest) == content[-chunk.size :]

    rig.run(work)


def test_known_blob_is_read_in_jumps(rig: Rig) -> None:
    content = bytes(range(255)) * 4096
    positions = [0, 10, 25, 12380, len(content), len(content) + 1, 5]

    async def work(services: Services) -> None:
        digest = await put_blob(services.blobs, content)
        assert digest.hex() == "a82c5154a7a0c262c6fdb929a317585646f8fbcf80326d0a7b8747edaf2d99d2"
        reader = await services.blobs.open_read(digest)
        assert reader is not None
        for position in positions:
            await reader.seek(position)
            assert await reader.read(10) == content[position : position + 10]
        await reader.close()

    rig.run(work)


def test_read_returns_less_at_the_end_only(rig: Rig) -> None:
    content = fresh_bytes(3_000_000)

    async def work(services: Services) -> None:
        reader = await services.blobs.open_read(await put_blob(services.blobs, content))
        assert reader is not None
        sizes = [len(await reader.read(700_000)) for _ in range(6)]
        assert sizes == [700_000] * 4 + [len(content) - 2_800_000, 0]
        await reader.close()
        await reader.close()

    rig.run(work)


def test_what_one_client_puts_another_finds(shared_rig: Rig) -> None:
    content = fresh_bytes(100)
    digest = shared_rig.run(lambda services: put_blob(services.blobs, content))

    assert shared_rig.run(lambda services: read_blob(services.blobs, digest)) == content
