"""The chunks of a store: there with their blob, gone with it, absent in older stores."""

import asyncio
import hashlib
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar

from appliance.castore.chunking import Chunker, unpack
from appliance.castore.digest import Digest
from appliance.db.environment import Environment
from appliance.nix.nar import NarWriter
from appliance.nix.store_path import nar_path
from appliance.services.lmdb_blobs import LmdbBlobService
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.chunk_table import ChunkPlace
from appliance.store.store import Store
from appliance.store.writer import AsyncStore
from tests.contracts.rig import put_blob, read_blob
from tests.fakes.appliance_process import import_tree
from tests.store.audit import blob_path

T = TypeVar("T")

_RANDOM: Final = random.Random(1)
BASE: Final = _RANDOM.randbytes(3 << 20)
# The first two thirds are those of BASE.
SIMILAR: Final = BASE[: 2 << 20] + _RANDOM.randbytes(1 << 20)


def packed_chunks(content: bytes) -> bytes:
    chunker = Chunker()
    chunker.update(content)
    return chunker.finish()


def put(store: Store, content: bytes) -> Digest:
    digest = Digest.of(content)
    staged = store.path / "staged"
    staged.write_bytes(content)
    batch = Batch()
    batch.add_file(digest, staged, len(content), packed_chunks(content))
    store.commit(batch)
    return digest


def num_rows(store: Store) -> list[int]:
    databases = [store.env.database(name) for name in (schema.CHUNKS, schema.CHUNK_PLACES)]
    with store.env.read() as txn:
        return [txn.stat(database)["entries"] for database in databases]


def with_blobs(
    path: Path, work: Callable[[LmdbBlobService], Awaitable[T]], *, is_readonly: bool = False
) -> T:
    async def main() -> T:
        store = AsyncStore.open(path, is_readonly=is_readonly)
        try:
            return await work(LmdbBlobService(store))
        finally:
            store.close()

    return asyncio.run(main())


def test_chunks_come_and_go_with_their_blob(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    base, similar = put(store, BASE), put(store, SIMILAR)
    chunks = list(unpack(packed_chunks(BASE)))
    common = set(chunks) & set(unpack(packed_chunks(SIMILAR)))
    assert len(common) > 2
    assert store.chunks_of(base) == packed_chunks(BASE)
    offset = 0
    for chunk in chunks:
        here = ChunkPlace(base, offset, chunk.size)
        there = ChunkPlace(similar, offset, chunk.size)
        expected = {here, there} if chunk in common else {here}
        assert set(store.places_of_chunk(chunk.digest)) == expected
        offset += chunk.size
    store.env.write(lambda txn: store.remove_blob(txn, base))
    assert store.chunks_of(base) is None
    assert [bool(store.places_of_chunk(chunk.digest)) for chunk in chunks] == [
        chunk in common for chunk in chunks
    ]
    store.env.write(lambda txn: store.remove_blob(txn, similar))
    assert num_rows(store) == [0, 0]
    store.close()


def test_a_chunk_is_read_from_any_blob_whose_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = Store.open(path, create=True)
    put(store, BASE)
    similar = put(store, SIMILAR)
    first = next(unpack(packed_chunks(BASE)))

    async def read(blobs: LmdbBlobService) -> tuple[bytes | None, bool]:
        return await read_blob(blobs, first.digest), await blobs.stat(first.digest) is not None

    places = store.places_of_chunk(first.digest)
    one, other = (blob_path(store, place.blob) for place in places)
    store.close()
    # The first one that is looked at is gone, and then the other is too short.
    one.unlink()
    assert with_blobs(path, read) == (BASE[: first.size], True)
    other.chmod(0o644)
    os.truncate(other, 1 << 20)
    assert with_blobs(path, read) == (None, False)
    assert similar in {place.blob for place in places}


def test_a_store_of_an_earlier_release_has_blobs_that_are_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "store"
    store = Store.open(path, create=True)
    digest = put(store, BASE)
    store.close()
    env = Environment(
        path,
        databases=schema.DATABASES,
        newer_databases=schema.NEWER_DATABASES,
        is_readonly=False,
        is_durable=False,
    )
    for name in (schema.CHUNKS, schema.CHUNK_PLACES):
        env.write(lambda txn, name=name: txn.drop(env.database(name)))  # type: ignore[misc]
    env.close()

    async def stat(blobs: LmdbBlobService) -> list[object]:
        first = next(unpack(packed_chunks(BASE)))
        return [list(await blobs.stat(digest) or ()), await blobs.stat(first.digest)]

    async def put_again(blobs: LmdbBlobService) -> Digest:
        return await put_blob(blobs, BASE)

    assert with_blobs(path, stat, is_readonly=True) == [[], None]
    assert with_blobs(path, stat) == [[], None]
    assert with_blobs(path, put_again) == digest
    assert with_blobs(path, stat) == [list(unpack(packed_chunks(BASE))), ()]


def nar_of(tree: Path) -> bytes:
    """Return the NAR of a directory of files."""
    parts: list[bytes] = []
    writer = NarWriter(lambda data: parts.append(bytes(data)))
    writer.directory()
    for path in sorted(tree.iterdir()):
        writer.entry(path.name.encode())
        writer.file(path.read_bytes(), executable=False)
    writer.end_directory()
    writer.finish()
    return b"".join(parts)


def test_an_import_cuts_what_it_reads(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    sizes = [1 << 20, (1 << 20) + 1, (40 << 20) + 5]
    contents = [os.urandom(size) for size in sizes]
    for number, content in enumerate(contents):
        (tree / f"{number}").write_bytes(content)
        (tree / f"{number}-small").write_bytes(content[:100])
    (name,) = import_tree(f"lmdb://{tmp_path}/store", tree)
    nar_sha256 = hashlib.sha256(nar_of(tree)).digest()
    assert nar_path(nar_sha256, "tree").basename() == name
    store = Store.open(tmp_path / "store", is_readonly=True)
    found = [store.chunks_of(Digest.of(content)) for content in contents]
    store.close()
    assert found == [None, *map(packed_chunks, contents[1:])]
