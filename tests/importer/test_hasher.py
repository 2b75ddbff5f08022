"""The loop of a hashing process, run in this process."""

import mmap
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from blake3 import blake3

from appliance.castore.chunking import Chunker
from appliance.importer.hard_links import HardLinks
from appliance.importer.hasher import PIECE_MAX, HasherLoop
from appliance.importer.records import HASH_RECORD, HashKind, HashRecord, pack_root_request
from appliance.importer.walk import open_root

RING_SIZE = 32 << 20
BLOCK = 4096


class Read(NamedTuple):
    """The records of one file, its content, and the packed list of its chunks."""

    kind: int
    content: bytes
    last: HashRecord
    chunks: bytes


class Rig:
    """Hashes files below `tree`."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.staging = tree.with_name("staging")
        tree.mkdir()
        self.staging.mkdir()

    def read(self, *names: str) -> list[Read]:
        root = open_root(os.fsencode(self.tree))
        requests = pack_root_request(root) + b"/\0" + b"".join(b"%b\0" % n.encode() for n in names)
        records, ring = self.run(requests)
        root.close()
        reads = []
        content = chunks = b""
        for record in records:
            part = ring[record.offset : record.offset + record.size]
            if record.kind == HashKind.CHUNKS:
                chunks += part
                continue
            content += part
            if record.kind != HashKind.PIECE:
                reads.append(Read(record.kind, content, record, chunks))
                content = chunks = b""
        return reads

    def run(self, requests: bytes) -> tuple[list[HashRecord], mmap.mmap]:
        ring = mmap.mmap(-1, RING_SIZE)
        ring[:] = b"\xff" * RING_SIZE
        asked, asking = os.pipe()
        results, telling = os.pipe()
        returned = os.eventfd(0)
        os.write(asking, requests)
        os.close(asking)
        HasherLoop(asked, telling, returned, ring, os.fspath(self.staging)).run()
        os.close(telling)
        with os.fdopen(results, "rb") as file:
            records = [*map(HashRecord._make, HASH_RECORD.iter_unpack(file.read()))]
        os.close(asked)
        os.close(returned)
        return records, ring

    def staged(self) -> dict[int, Path]:
        return {int(path.name): path for path in self.staging.iterdir()}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "tree")


# --- Chunks ---


@pytest.mark.parametrize("size", [PIECE_MAX + 1, 2 * PIECE_MAX, 9 * PIECE_MAX + 4097])
def test_a_large_file_is_cut_into_chunks_on_the_way(rig: Rig, size: int) -> None:
    content = os.urandom(size)
    (rig.tree / "a").write_bytes(content)
    (rig.tree / "b").write_bytes(content[:PIECE_MAX])
    large, small = rig.read("a", "b")
    chunker = Chunker()
    chunker.update(content)
    assert (large.content, small.content) == (content, content[:PIECE_MAX])
    assert large.chunks == chunker.finish()
    assert small.chunks == b""


# --- Files with several names ---


def test_a_large_file_with_several_names_is_staged_once(rig: Rig) -> None:
    content = os.urandom(2 * PIECE_MAX + 1)
    (rig.tree / "a").write_bytes(content)
    for name in "bcde":
        (rig.tree / name).hardlink_to(rig.tree / "a")
    reads = rig.read(*"abcde")
    assert [read.kind for read in reads] == [HashKind.LAST] * 5
    assert all(read.content == content for read in reads)
    assert {bytes(read.last.digest) for read in reads} == {blake3(content).digest()}
    assert [read.last.staged for read in reads] == [1, 0, 0, 0, 0]
    assert [bool(read.chunks) for read in reads] == [True, False, False, False, False]
    assert [path.read_bytes() for path in rig.staged().values()] == [content]


def test_a_file_that_changed_since_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    (tmp_path / "link").hardlink_to(path)
    links = HardLinks()
    links.remember(path.stat(), b"digest")
    assert links.digest((tmp_path / "link").stat()) == b"digest"
    path.chmod(0o755)
    assert links.digest(path.stat()) is None


@pytest.mark.slow
def test_the_number_of_remembered_files_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    (tmp_path / "link").hardlink_to(path)
    links = HardLinks()
    fields = list(path.stat())
    for inode in range(100_000):
        fields[1] = inode
        links.remember(os.stat_result(fields), b"digest")
    assert len(links._files) <= 1 << 14


# --- Zeros ---


@pytest.mark.parametrize("size", [PIECE_MAX // 2, PIECE_MAX, 3 * PIECE_MAX, 3 * PIECE_MAX + 7])
@pytest.mark.parametrize("is_sparse", [False, True], ids=["zeros", "holes"])
def test_blocks_of_zeros_are_holes_of_what_is_staged(
    rig: Rig, size: int, *, is_sparse: bool
) -> None:
    data = os.urandom(BLOCK - 100)
    start = size - size % BLOCK - 2 * BLOCK + 50
    content = bytes(start) + data + bytes(size - start - len(data))
    with (rig.tree / "file").open("wb") as file:
        if is_sparse:
            file.seek(start)
            file.write(data)
            file.truncate(size)
        else:
            file.write(content)
    (read,) = rig.read("file")
    assert (read.kind, read.last.digest) == (HashKind.LAST, blake3(content).digest())
    assert read.content == content
    (path,) = rig.staged().values()
    assert path.read_bytes() == content
    fd = os.open(path, os.O_RDONLY)
    first = start - start % BLOCK
    assert os.lseek(fd, 0, os.SEEK_DATA) == first
    assert os.lseek(fd, first, os.SEEK_HOLE) == first + BLOCK
    os.close(fd)


def test_a_file_of_nothing_but_zeros_takes_no_disk(rig: Rig) -> None:
    with (rig.tree / "file").open("wb") as file:
        file.truncate(5 * PIECE_MAX)
    (read,) = rig.read("file")
    assert read.last.digest == blake3(bytes(5 * PIECE_MAX)).digest()
    (path,) = rig.staged().values()
    assert (path.stat().st_size, path.stat().st_blocks) == (5 * PIECE_MAX, 0)


# --- Where it reads ---


def test_a_root_that_is_another_directory_by_now_is_not_read(rig: Rig, tmp_path: Path) -> None:
    (rig.tree / "file").write_bytes(b"content")
    root = open_root(os.fsencode(rig.tree))
    rig.tree.rename(tmp_path / "moved")
    rig.tree.mkdir()
    (rig.tree / "file").write_bytes(b"of another")
    (record,), ring = rig.run(pack_root_request(root) + b"/\0file\0")
    root.close()
    assert record.kind == HashKind.REFUSED
    message = ring[record.offset : record.offset + record.size]
    assert message == f"{rig.tree}/file: changed while it was read".encode()


def test_a_symlink_in_place_of_a_directory_is_a_tree_that_changed(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"not of the tree")
    (rig.tree / "dir").symlink_to(tmp_path / "outside")
    root = open_root(os.fsencode(rig.tree))
    (record,), ring = rig.run(pack_root_request(root) + b"/dir\0file\0")
    root.close()
    assert record.kind == HashKind.REFUSED
    message = ring[record.offset : record.offset + record.size]
    assert message == f"{rig.tree}/dir/file: changed while it was read".encode()
