"""Blobs of a cache that are there in part: which ranges, within which bound, in which file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.castore.digest import DIGEST_SIZE, Digest
from appliance.store.blob_cache import BlobCache, BlobTooLargeError
from appliance.store.blob_files import BlobFile
from appliance.store.blob_parts import BlobParts, OtherListError, PartLostError
from appliance.store.partial_blob import PartialBlob

SIZE: Final = 4 << 20
MAX_BYTES: Final = 6 << 20
LIST: Final = bytes(DIGEST_SIZE)
CONTENT: Final = os.urandom(SIZE)
DIGEST: Final = Digest.of(CONTENT)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[BlobCache]:
    cache = BlobCache(tmp_path / "cache", MAX_BYTES)
    yield cache
    cache.close()


def begin(cache: BlobCache, digest: Digest = DIGEST, size: int = SIZE) -> PartialBlob:
    begun = BlobParts(cache).begin(digest, size, LIST)
    assert begun is not None
    return begun


def write(cache: BlobCache, record: PartialBlob, start: int, end: int) -> PartialBlob:
    parts = BlobParts(cache)
    assert parts.reserve(record, end - start, ())
    fd = parts.open(record)
    os.pwrite(fd, CONTENT[start:end], start)
    os.close(fd)
    return parts.add_ranges(record, [(start, end)])


def files(cache: BlobCache) -> list[Path]:
    return [path for path in (cache.store.path / "blobs").rglob("*") if path.is_file()]


def bytes_on_disk(cache: BlobCache) -> int:
    return sum(path.stat().st_blocks * 512 for path in files(cache))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=12))
def test_ranges_are_a_set_of_bytes(ranges: list[tuple[int, int]]) -> None:
    record = PartialBlob.new(DIGEST, 100, LIST)
    expected: set[int] = set()
    for start, length in ranges:
        record = record.with_ranges([(start, start + length)])
        expected |= set(range(start, start + length))
    bounds = list(record.bounds)
    assert bounds == sorted(set(bounds))
    for start in range(100):
        for end in (start + 1, start + 7):
            assert record.has(start, end) == (set(range(start, end)) <= expected)
    assert list(PartialBlob.unpack(DIGEST, record.pack()).bounds) == bounds
    assert record.is_whole == (expected == set(range(100)))


def test_a_part_is_no_blob(cache: BlobCache) -> None:
    record = write(cache, begin(cache), 0, 100_000)
    with cache.store.snapshot() as snapshot:
        assert snapshot.blob(DIGEST) is None
        assert not snapshot.has_blob(DIGEST)
        found = snapshot.partial_blob(DIGEST)
        assert found is not None
        assert (found.has(0, 100_000), found.has(0, 100_001)) == (True, False)
    assert (cache.has(DIGEST), cache.find(DIGEST), cache.has_part(DIGEST)) == (False, None, True)
    assert list(record.bounds) == [0, 100_000]


def test_all_parts_become_a_blob_like_any_other(cache: BlobCache) -> None:
    record = write(cache, begin(cache), SIZE // 2, SIZE)
    record = write(cache, record, 0, SIZE // 2)
    assert record.is_whole
    with cache.store.snapshot() as snapshot:
        found = snapshot.partial_blob(DIGEST)
        assert found is not None
        assert list(found.bounds) == [SIZE // 2, SIZE]
    BlobParts(cache).complete(record)
    with cache.store.snapshot() as snapshot:
        assert snapshot.blob(DIGEST) == BlobFile(DIGEST, SIZE)
        assert snapshot.partial_blob(DIGEST) is None
    (path,) = files(cache)
    assert path.name == DIGEST.hex()
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o444
    assert cache.charged_bytes() == SIZE
    assert BlobParts(cache).begin(DIGEST, SIZE, LIST) is None


def test_a_part_is_charged_for_what_it_takes_up(cache: BlobCache) -> None:
    record = write(cache, begin(cache), 1 << 20, (1 << 20) + 300_000)
    assert bytes_on_disk(cache) <= cache.charged_bytes() < 400_000
    write(cache, record, 0, 4096)
    assert bytes_on_disk(cache) <= cache.charged_bytes() < 400_000


def test_parts_are_evicted_like_blobs(cache: BlobCache) -> None:
    first = write(cache, begin(cache), 0, 3 << 20)
    other = begin(cache, Digest(os.urandom(32)))
    parts = BlobParts(cache)
    assert not parts.reserve(other, 4 << 20, {DIGEST})
    assert parts.reserve(other, 4 << 20, ())
    assert parts.find(DIGEST) is None
    assert files(cache) == []
    assert cache.charged_bytes() <= MAX_BYTES
    for work in (
        lambda: parts.reserve(first, 1, ()),
        lambda: parts.add_ranges(first, [(0, 10)]),
        lambda: parts.complete(first),
    ):
        with pytest.raises(PartLostError):
            work()


def test_the_file_of_an_evicted_part_is_never_taken_for_the_next_one(cache: BlobCache) -> None:
    first = write(cache, begin(cache), 0, SIZE - 1)
    cache.drop(DIGEST)
    second = begin(cache)
    os.close(BlobParts(cache).open(second))
    assert first.key != second.key
    with pytest.raises(FileNotFoundError):
        cache.store.open_blob(BlobFile(first.key, SIZE))
    # Whoever was slower leaves no file behind.
    os.close(BlobParts(cache).open(first._replace(bounds=())))
    with pytest.raises(PartLostError):
        BlobParts(cache).reserve(first, 1, ())
    assert len(files(cache)) == 1


def test_parts_outlive_the_process_that_fetched_them(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", MAX_BYTES)
    record = write(cache, begin(cache), 0, 1 << 20)
    cache.close()
    cache = BlobCache(tmp_path / "cache", MAX_BYTES)
    found = begin(cache)
    assert (found.token, list(found.bounds)) == (record.token, [0, 1 << 20])
    fd = BlobParts(cache).open(found)
    assert os.pread(fd, 1 << 20, 0) == CONTENT[: 1 << 20]
    os.close(fd)
    cache.close()


def test_a_part_whose_file_is_gone_begins_anew(cache: BlobCache) -> None:
    record = write(cache, begin(cache), 0, 1 << 20)
    (path,) = files(cache)
    path.unlink()
    with pytest.raises(PartLostError):
        BlobParts(cache).open(record)
    assert list(begin(cache).bounds) == []


def test_another_list_of_chunks_does_not_share_the_file(cache: BlobCache) -> None:
    record = write(cache, begin(cache), 0, 1 << 20)
    for size, list_digest in ((SIZE, bytes([1] * 32)), (SIZE + 1, LIST)):
        with pytest.raises(OtherListError):
            BlobParts(cache).begin(DIGEST, size, list_digest)
    assert begin(cache).token == record.token


def test_the_whole_blob_takes_the_place_of_its_part(cache: BlobCache) -> None:
    write(cache, begin(cache), 0, 1 << 20)
    assert cache.reserve(DIGEST, SIZE, ())
    assert files(cache) == []
    assert not cache.has_part(DIGEST)
    assert cache.charged_bytes() == SIZE


def test_a_blob_that_fits_no_cache_has_no_parts(cache: BlobCache) -> None:
    with pytest.raises(BlobTooLargeError):
        BlobParts(cache).begin(DIGEST, MAX_BYTES + 1, LIST)
    assert not cache.has_part(DIGEST)
