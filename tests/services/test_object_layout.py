"""Objects as Tvix and Snix write them, by what is known of their layout; and ours, read so."""

import asyncio
import io
import os
import struct
from pathlib import Path

import pytest
import zstandard

from appliance.castore.chunking import Chunker, unpack
from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode
from appliance.errors import ContentMissingError, CorruptBlobError
from appliance.protos import castore_rpc_pb2
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.object_layout import closure_key, directories_untrusted, list_key
from appliance.services.open_services import open_services
from tests.contracts.rig import (
    Rig,
    closure,
    fresh_leaf,
    parent_of,
    put_blob,
    put_closure,
    read_blob,
)


class Objects:
    """A directory of objects, written and read without our code."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rig = Rig(f"objectstore+file://{directory}")

    def path(self, kind: str, digest: Digest) -> Path:
        text = digest.hex()
        return self.directory / kind / "b3" / text[:4] / text

    def write(self, kind: str, digest: Digest, content: bytes) -> None:
        path = self.path(kind, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def write_blob(self, content: bytes) -> Digest:
        """Write a blob as `chunk_and_upload` of Snix does (castore, object_store.rs)."""
        digest = Digest.of(content)
        chunker = Chunker()
        chunker.update(content)
        chunks = list(unpack(chunker.finish()))
        at = 0
        for chunk in chunks:
            self.write("chunks", chunk.digest, streamed(content[at : at + chunk.size]))
            at += chunk.size
        response = castore_rpc_pb2.StatBlobResponse()
        if len(chunks) > 1:
            for chunk in chunks:
                response.chunks.add(digest=chunk.digest, size=chunk.size)
        self.write("blobs", digest, response.SerializeToString())
        return digest

    def write_closure(self, *directories: Directory) -> Digest:
        """Write Directories, parents first."""
        encoded = [one.to_bytes() for one in directories]
        framed = b"".join(struct.pack(">I", len(one)) + one for one in encoded)
        self.write("dirs", directories[0].digest(), streamed(framed))
        return directories[0].digest()


def streamed(content: bytes) -> bytes:
    # As an encoder that does not know the size from the start.
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(tmp_path)


def test_names_of_objects() -> None:
    digest = Digest.of(b"Hello World")
    text = "41f8394111eb713a22165c46c90ab8f0fd9399c92028fd6d288944b23ff5bf76"
    assert list_key(digest) == f"blobs/b3/41f8/{text}"
    assert closure_key(digest) == f"dirs/b3/41f8/{text}"


@pytest.mark.parametrize("size", [1, 100_000, 140_000, 700_000, 3_000_000])
def test_blobs_of_others_are_read(objects: Objects, size: int) -> None:
    content = os.urandom(size)
    digest = objects.write_blob(content)

    async def work(services: Services) -> None:
        assert await services.blobs.has(digest)
        chunks = await services.blobs.stat(digest)
        assert chunks is not None
        assert sum(chunk.size for chunk in chunks) in {0, size}
        assert await read_blob(services.blobs, digest) == content

    objects.rig.run(work)


@pytest.mark.parametrize("size", [0, 1, 140_000, 3_000_000])
def test_blobs_of_ours_are_those_of_others(objects: Objects, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    objects.rig.run(lambda services: put_blob(services.blobs, content))

    others = Objects(tmp_path / "others")
    others.write_blob(content)
    names = [
        {path.relative_to(one.directory) for path in one.directory.glob("[bc]*/b3/*/*")}
        for one in (objects, others)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        ours, theirs = (objects.directory / name).read_bytes(), (others.directory / name)
        if name.parts[0] == "chunks":
            decompressed = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(ours)).read()
            assert Digest.of(decompressed).hex() == name.name
        else:
            assert ours == theirs.read_bytes()


def test_closures_of_others_are_read(objects: Objects) -> None:
    leaf, other = fresh_leaf(), fresh_leaf()
    middle = parent_of(leaf, Directory())
    top = parent_of(middle, other, leaf)
    empty = Directory()
    # Both with the empty directory and without.
    for members in ([top, middle, other, leaf, empty], [top, other, middle, leaf]):
        root = objects.write_closure(*members)
        found = objects.rig.run(lambda services: closure(services.directories, top.digest()))
        assert [one for one in found if one != empty] == [one for one in members if one != empty]
        assert root == top.digest()
        assert objects.rig.run(lambda services: found_below(services, top, leaf)) == leaf


async def found_below(services: Services, top: Directory, below: Directory) -> Directory | None:
    """Return a Directory that was asked for by its digest once the root had been."""
    assert await services.directories.get(top.digest()) == top
    return await services.directories.get(below.digest())


def test_closures_of_ours_are_those_of_others(objects: Objects) -> None:
    leaf = fresh_leaf()
    top = parent_of(leaf, Directory())
    root = objects.rig.run(lambda s: put_closure(s.directories, leaf, Directory(), top))
    compressed = objects.path("dirs", root).read_bytes()
    framed = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(compressed)).read()
    found = []
    while framed:
        (size,) = struct.unpack_from(">I", framed)
        found.append(framed[4 : 4 + size])
        framed = framed[4 + size :]
    assert found[0] == top.to_bytes()
    assert sorted(found) == sorted([leaf.to_bytes(), b"", top.to_bytes()])


DAMAGED = {
    "not compressed": b"\0\0\0\1x",
    "cut off": streamed(struct.pack(">I", 40) + b"x" * 40)[:20],
    "ends in a frame": streamed(struct.pack(">I", 40) + b"x"),
    "ends in a length": streamed(b"\0\0"),
    "too long": streamed(struct.pack(">I", 1 << 31)),
    "no directory": streamed(struct.pack(">I", 3) + b"abc"),
    "another one": streamed(struct.pack(">I", 0)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_closure_that_is_damaged_is_refused(objects: Objects, content: bytes) -> None:
    digest = fresh_leaf().digest()
    objects.write("dirs", digest, content)

    async def work(services: Services) -> None:
        with pytest.raises((CorruptBlobError, ContentMissingError), match=digest.hex()):
            await closure(services.directories, digest)

    objects.rig.run(work)


def test_frames_of_a_bomb_are_read_no_further_than_they_may_go() -> None:
    bomb = streamed(struct.pack(">I", 16 << 20) + bytes(15 << 20))
    with pytest.raises(CorruptBlobError, match="ends early"):
        list(directories_untrusted(bomb))


def test_missing_member_of_a_closure_is_missed(objects: Objects) -> None:
    leaf = fresh_leaf()
    root = objects.write_closure(parent_of(leaf))

    async def work(services: Services) -> None:
        with pytest.raises(ContentMissingError, match="1 directories are missing"):
            await closure(services.directories, root)

    objects.rig.run(work)


def test_directory_that_does_not_belong_to_a_closure_is_refused(objects: Objects) -> None:
    top = parent_of(fresh_leaf())
    objects.write_closure(top, fresh_leaf())

    async def work(services: Services) -> None:
        with pytest.raises(CorruptBlobError, match="is no directory below it"):
            await closure(services.directories, top.digest())

    objects.rig.run(work)


def test_blob_with_a_missing_or_wrong_chunk_is_an_error(objects: Objects) -> None:
    content = os.urandom(2_000_000)
    digest = objects.write_blob(content)
    chunker = Chunker()
    chunker.update(content)
    chunk = list(unpack(chunker.finish()))[2]
    path = objects.path("chunks", chunk.digest)
    whole = path.read_bytes()
    wrong = {
        b"": CorruptBlobError,
        b"garbage": CorruptBlobError,
        streamed(content[: chunk.size - 1]): CorruptBlobError,
        streamed(bytes(1 << 24)): CorruptBlobError,
        whole[:-20]: CorruptBlobError,
    }
    for damaged, kind in wrong.items():
        path.write_bytes(damaged)
        with pytest.raises(kind, match=chunk.digest.hex()):
            objects.rig.run(lambda services: read_blob(services.blobs, digest))
    path.unlink()
    with pytest.raises(ContentMissingError, match=chunk.digest.hex()):
        objects.rig.run(lambda services: read_blob(services.blobs, digest))


def test_list_that_is_none_is_refused(objects: Objects) -> None:
    digest = Digest.of(b"x")
    objects.write("blobs", digest, b"\xff\xff")

    async def work(services: Services) -> None:
        with pytest.raises(CorruptBlobError, match="list of chunks is malformed"):
            await services.blobs.stat(digest)

    objects.rig.run(work)


def test_one_bucket_serves_all_three_services(tmp_path: Path) -> None:
    address = parse_service_uri("objectstore+memory:")

    async def main() -> None:
        async with open_services(ServiceAddresses(address, address, address)) as services:
            content = os.urandom(2_000_000)
            digest = await put_blob(services.blobs, content)
            top = Directory(files=[FileNode(b"f", digest, len(content), executable=False)])
            assert await put_closure(services.directories, top) == top.digest()
            assert await services.blobs.has(digest)

    asyncio.run(main())
    assert not list(tmp_path.iterdir())
