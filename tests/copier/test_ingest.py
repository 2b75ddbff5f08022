"""Trees of files and NARs become the same blobs and Directories, and what is broken an error."""

import hashlib
import io
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import FileNode, SymlinkNode
from appliance.castore.size_dialect import SizeDialect
from appliance.copier.claims import Content
from appliance.copier.file_tree import tree_events
from appliance.copier.ingest import CopyProgress, CopyStoppedError, Staging, TreeEvent, TreeIngest
from appliance.errors import ApplianceError, ImportTreeError, NarError
from appliance.nix.nar import NarWriter, read_nar
from appliance.store.batch import Batch
from appliance.store.schema import INLINE_MAX

LARGE = bytes(range(256)) * 1024


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    (path / "a" / "b").mkdir(parents=True)
    (path / "a" / "b" / "small").write_bytes(b"small")
    (path / "a" / "b" / "exact").write_bytes(LARGE[:INLINE_MAX])
    (path / "a" / "empty").mkdir()
    (path / "a" / "large").write_bytes(LARGE)
    (path / "a" / "large").chmod(0o755)
    (path / "again").write_bytes(LARGE)
    (path / "link").symlink_to("a/b")
    (path / "none").touch()
    os.mknod(path / os.fsdecode(b"\xff name"))
    return path


class Taking:
    """Takes trees; keeps what is spilled."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.staging = Staging(directory)
        self.dialect = SizeDialect.DOUBLED
        self.spilled: list[Batch] = []
        self.progress = CopyProgress()

    def new_batch(self) -> Batch:
        return Batch()

    def commit(self, batch: Batch) -> None:
        self.spilled.append(batch)

    def ingest(self, nar_limit: int | None = None) -> TreeIngest:
        return TreeIngest(self, self.progress, nar_limit=nar_limit)

    def take(
        self, events: Iterable[TreeEvent], nar_limit: int | None = None
    ) -> tuple[Content, TreeIngest]:
        ingest = self.ingest(nar_limit)
        try:
            return ingest.take_all(events), ingest
        except BaseException:
            ingest.discard()
            assert [*self.directory.iterdir()] == []
            raise


@pytest.fixture
def taking(tmp_path: Path) -> Taking:
    return Taking(tmp_path / "staging")


def nar_of(write: Callable[[NarWriter], None]) -> bytes:
    pieces: list[bytes] = []
    writer = NarWriter(lambda piece: pieces.append(bytes(piece)))
    write(writer)
    writer.finish()
    return b"".join(pieces)


def test_a_tree_and_its_nar_are_the_same(tree: Path, taking: Taking) -> None:
    content, ingest = taking.take(tree_events(os.fsencode(tree)))
    nar = nar_of(write_tree)
    assert content.nar_sha256 == hashlib.sha256(nar).digest()
    assert content.nar_size == len(nar)
    assert content.num_files == 6
    again, other = taking.take(read_nar(io.BytesIO(nar).read))
    assert again == content
    assert other.batch.directories == ingest.batch.directories
    assert other.batch.blobs == ingest.batch.blobs
    assert [*ingest.batch.files] == [*other.batch.files] == [Digest.of(LARGE)]
    for staged in ingest.batch.files.values():
        assert Path(staged.path).read_bytes() == LARGE
    ingest.discard()
    other.discard()
    assert [*taking.directory.iterdir()] == []


def write_tree(writer: NarWriter) -> None:
    writer.directory()
    writer.entry(b"a")
    writer.directory()
    writer.entry(b"b")
    writer.directory()
    writer.entry(b"exact")
    writer.file(LARGE[:INLINE_MAX], executable=False)
    writer.entry(b"small")
    writer.file(b"small", executable=False)
    writer.end_directory()
    writer.entry(b"empty")
    writer.directory()
    writer.end_directory()
    writer.entry(b"large")
    writer.file(LARGE, executable=True)
    writer.end_directory()
    writer.entry(b"again")
    writer.file(LARGE, executable=False)
    writer.entry(b"link")
    writer.symlink(b"a/b")
    writer.entry(b"none")
    writer.file(b"", executable=False)
    writer.entry(b"\xff name")
    writer.file(b"", executable=False)
    writer.end_directory()


@pytest.mark.parametrize("content", [b"", b"x", LARGE])
def test_a_file_alone(tmp_path: Path, taking: Taking, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    found, ingest = taking.take(tree_events(os.fsencode(path)))
    nar = nar_of(lambda writer: writer.file(content, executable=False))
    assert found.node == FileNode(b"", Digest.of(content), len(content), executable=False)
    assert found.nar_sha256 == hashlib.sha256(nar).digest()
    ingest.discard()


def test_a_symlink_alone(tmp_path: Path, taking: Taking) -> None:
    (tmp_path / "link").symlink_to("target")
    found, _ingest = taking.take(tree_events(os.fsencode(tmp_path / "link")))
    assert found.node == SymlinkNode(b"", b"target")
    nar = nar_of(lambda writer: writer.symlink(b"target"))
    assert found.nar_sha256 == hashlib.sha256(nar).digest()


def test_something_else_than_files_is_refused(tree: Path, taking: Taking) -> None:
    os.mkfifo(tree / "z")
    with pytest.raises(ImportTreeError, match=r"tree/z: is a FIFO"):
        taking.take(tree_events(os.fsencode(tree)))


def test_a_nar_that_is_longer_than_stated(taking: Taking) -> None:
    nar = nar_of(write_tree)
    with pytest.raises(NarError, match=rf"more than the stated {len(nar) - 8} bytes"):
        taking.take(read_nar(io.BytesIO(nar).read), len(nar) - 8)
    with pytest.raises(NarError, match="more than the stated 1000 bytes"):
        taking.take(read_nar(io.BytesIO(nar).read), 1000)
    _content, ingest = taking.take(read_nar(io.BytesIO(nar).read), len(nar))
    ingest.discard()


@pytest.mark.slow
def test_a_nar_cut_anywhere_is_an_error(taking: Taking) -> None:
    nar = nar_of(write_tree)
    ends = {*range(0, 2000, 8), *range(len(nar) - 2000, len(nar), 8)}
    for end in ends:
        with pytest.raises(ApplianceError):
            taking.take(read_nar(io.BytesIO(nar[:end]).read))


@pytest.mark.slow
def test_a_nar_with_any_byte_changed_is_an_error_or_another_nar(taking: Taking) -> None:
    nar = nar_of(write_tree)
    generator = random.Random(1)
    heads = [offset for offset in range(len(nar)) if nar[offset : offset + 1] not in LARGE[65:90]]
    for _ in range(300):
        changed = bytearray(nar)
        changed[generator.choice(heads[:4000])] ^= 1 << generator.randrange(8)
        try:
            content, ingest = taking.take(read_nar(io.BytesIO(bytes(changed)).read), len(nar))
        except ApplianceError:
            continue
        assert content.nar_sha256 == hashlib.sha256(changed).digest()
        ingest.discard()


def test_a_copy_that_is_stopped_stops_within_a_tree(tree: Path, taking: Taking) -> None:
    taking.progress.is_stopped = True
    with pytest.raises(CopyStoppedError):
        taking.take(tree_events(os.fsencode(tree)))


@pytest.mark.slow
def test_the_small_blobs_of_a_large_tree_are_put_before_its_end(taking: Taking) -> None:
    num_files = 600

    def write(writer: NarWriter) -> None:
        writer.directory()
        for index in range(num_files):
            writer.entry(b"%04d" % index)
            writer.file(index.to_bytes(4) * (INLINE_MAX // 4), executable=False)
        writer.end_directory()

    nar = nar_of(write)
    content, ingest = taking.take(read_nar(io.BytesIO(nar).read))
    assert content.nar_sha256 == hashlib.sha256(nar).digest()
    assert len(taking.spilled) == 2
    assert not any(spilled.directories for spilled in taking.spilled)
    num_spilled = sum(len(spilled.blobs) for spilled in taking.spilled)
    assert num_spilled + len(ingest.batch.blobs) == num_files
    assert len(ingest.batch.directories) == 1
