"""READ of a blob of which a cache has a part: the handler answers what is there, C leaves it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

import pytest

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.castore.directory import FileNode
from appliance.fuse_proto.operations import NotReady
from appliance.session.wants import BlobWanted
from appliance.store import schema
from appliance.store.blob_cache import BlobCache
from appliance.store.blob_parts import BlobParts
from appliance.store.partial_blob import PartialBlob
from appliance.store.store_reader import StoreReader
from tests.fakes import fuse_client
from tests.fs.guest import basename
from tests.worker.twins import ROOM, Twins

ROOT: Final = 1
SIZE: Final = (3 << 20) + 11
CONTENT: Final = os.urandom(SIZE)
DIGEST: Final = Digest.of(CONTENT)
NODE: Final = FileNode(basename("file"), DIGEST, SIZE, executable=False)
HALF: Final = SIZE // 2


class PartCache:
    """A cache with the file of one store path, which only one LMDB library may have open."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "cache"
        self.store_path = directory
        with self.opened() as cache:
            self.store_path = cache.store.path

    @contextmanager
    def opened(self) -> Iterator[BlobCache]:
        cache = BlobCache(self._path, 1 << 30)
        try:
            yield cache
        finally:
            cache.close()

    def write(self, *ranges: tuple[int, int]) -> PartialBlob:
        with self.opened() as cache:
            parts = BlobParts(cache)
            record = parts.begin(DIGEST, SIZE, bytes(DIGEST_SIZE))
            assert record is not None
            fd = parts.open(record)
            for start, end in ranges:
                os.pwrite(fd, CONTENT[start:end], start)
            os.close(fd)
            return parts.add_ranges(record, ranges)

    @contextmanager
    def twins(self, node: FileNode) -> Iterator[Twins]:
        store = StoreReader(self.store_path)
        twins = Twins(store, [node], is_cache=True)
        try:
            yield twins
        finally:
            twins.close()
            store.close()


@pytest.fixture
def cache(tmp_path: Path) -> PartCache:
    return PartCache(tmp_path)


def read(twins: Twins, offset: int, size: int, room: int = ROOM) -> bytes | BlobWanted:
    """Return what the handler answers, or wants; C must leave it."""
    nodeid = twins.lookup(ROOT, basename("file")).nodeid
    request = fuse_client.read(nodeid, offset, size)
    assert twins.plain.answer(request, len(request), room) is None
    try:
        with twins.handler.batch():
            reply = twins.dispatcher.handle_untrusted(memoryview(request), len(request), room)
            assert reply is not None
            return fuse_client.parse_reply(fuse_client.wire(reply)).body
    except NotReady as exc:
        return cast("BlobWanted", exc.want)


def test_what_is_there_is_answered_and_the_rest_is_wanted_by_its_range(cache: PartCache) -> None:
    cache.write((4096, HALF), (SIZE - 100, SIZE))
    with cache.twins(NODE) as twins:
        assert read(twins, 4096, 10_000) == CONTENT[4096:14_096]
        assert read(twins, HALF - 10, 10) == CONTENT[HALF - 10 : HALF]
        assert read(twins, SIZE - 100, 4096) == CONTENT[-100:]
        assert read(twins, 4095, 10) == BlobWanted(DIGEST, SIZE, 4095, 10)
        assert read(twins, HALF - 10, 11) == BlobWanted(DIGEST, SIZE, HALF - 10, 11)
        assert read(twins, 0, 4096) == BlobWanted(DIGEST, SIZE, 0, 4096)
        # Neither more than the file has nor more than there is room for.
        assert read(twins, SIZE - 101, 4096) == BlobWanted(DIGEST, SIZE, SIZE - 101, 101)
        assert read(twins, 0, 1 << 20, 16 + 512) == BlobWanted(DIGEST, SIZE, 0, 512)
        assert twins.used_by_c == []
        assert DIGEST in twins.used


def test_a_part_is_answered_until_the_blob_is_complete_and_then_c_has_it(cache: PartCache) -> None:
    cache.write((0, SIZE - 1))
    request = fuse_client.read
    with cache.twins(NODE) as twins:
        assert read(twins, 5, 10) == CONTENT[5:15]
        assert read(twins, SIZE - 5, 5) == BlobWanted(DIGEST, SIZE, SIZE - 5, 5)
    record = cache.write((SIZE - 1, SIZE))
    with cache.opened() as opened:
        BlobParts(opened).complete(record)
    with cache.twins(NODE) as twins:
        nodeid = twins.lookup(ROOT, basename("file")).nodeid
        assert twins.both(request(nodeid, 5, 10)) == CONTENT[5:15]


def forget_file(cache: BlobCache, record: PartialBlob) -> None:
    cache.store.files.remove(record.key)


def shorten_file(cache: BlobCache, record: PartialBlob) -> None:
    os.truncate(cache.store.path / "blobs" / DIGEST.hex()[:2] / record.key.hex(), HALF)


def change_token(cache: BlobCache, record: PartialBlob) -> None:
    # As if the blob had been evicted and begun anew: the old file must not be taken for the new.
    other = record._replace(token=bytes(8))
    blobs = cache.store.env.database(schema.BLOBS)
    cache.store.env.write(lambda txn: txn.put(DIGEST, other.pack(), db=blobs))


@pytest.mark.parametrize("damage", [forget_file, shorten_file, change_token])
def test_nothing_is_answered_from_a_file_that_is_not_that_of_the_record(
    cache: PartCache, damage: Callable[[BlobCache, PartialBlob], None]
) -> None:
    record = cache.write((0, SIZE - 1))
    with cache.opened() as opened:
        damage(opened, record)
    with cache.twins(NODE) as twins:
        assert read(twins, 0, 10) == BlobWanted(DIGEST, SIZE, 0, 10)


def test_a_node_that_states_another_size_reads_no_more_than_there_is(cache: PartCache) -> None:
    cache.write((5, SIZE))
    larger = NODE._replace(size=SIZE + 1)
    smaller = NODE._replace(size=SIZE - 1)
    with cache.twins(larger) as twins:
        assert read(twins, 9, 10) == BlobWanted(DIGEST, SIZE + 1, 9, 10)
    with cache.twins(smaller) as twins:
        assert read(twins, SIZE - 11, 100) == CONTENT[-11:-1]
