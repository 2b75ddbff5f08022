import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from appliance.importer.file_reader import FRAME_EXTRA_MAX, FileReader, Reading
from appliance.importer.records import HASH_RECORD, HashKind, HashRecord
from appliance.nix.nar import NarWriter
from appliance.store.schema import INLINE_MAX

RING_SIZE = 4 << 20
FILE_MAX = 1 << 20
SIZES = (0, 1, 7, 8, 9, 4095, INLINE_MAX, INLINE_MAX + 1, FILE_MAX)


class Rig:
    """A ring filled with 0xFF, and a reader of files below `root` that writes to it."""

    def __init__(self, root: Path) -> None:
        self.root = os.open(root, os.O_PATH)
        self.ring = mmap.mmap(-1, RING_SIZE)
        self.ring[:] = b"\xff" * RING_SIZE
        self.reader = FileReader(self.ring, FILE_MAX, records_max=8)
        self.reader.begin_root(self.root)
        self.request("/")

    def request(self, *requests: str, records_max: int = 8) -> Reading:
        data = b"".join(os.fsencode(request) + b"\0" for request in requests)
        return self.reader.read(memoryview(data), 0, RING_SIZE, 0, records_max)

    def read(
        self, *names: str, position: int = 0, room: int = RING_SIZE, skipped: int = 0
    ) -> tuple[list[HashRecord], Reading]:
        data = memoryview(b"".join(os.fsencode(name) + b"\0" for name in names))
        reading = self.reader.read(data, position, room, skipped, 8)
        records = [*map(HashRecord._make, HASH_RECORD.iter_unpack(reading.records))]
        return records, reading

    def frame(self, record: HashRecord) -> bytes:
        start = record.offset - record.lead
        return self.ring[start : start + record.frame_size]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.reader.begin_root(None)
    os.close(rig.root)


def nar_entry(name: bytes, content: bytes, *, executable: bool) -> bytes:
    pieces: list[bytes] = []
    nar = NarWriter(lambda data: pieces.append(bytes(data)))
    nar.directory()
    nar.entries(b"<")
    nar.entry(name)
    nar.file(content, executable=executable)
    nar.entries(b">")
    nar.end_directory()
    nar.finish()
    return b"".join(pieces).partition(b"<")[2].rpartition(b">")[0]


@pytest.mark.parametrize("mode", [0o644, 0o755])
@pytest.mark.parametrize("name", ["a", "8letters", "n" * 255, "\udcff\n"])
@pytest.mark.parametrize("size", SIZES)
def test_a_frame_is_the_entry_of_a_nar(
    size: int, name: str, mode: int, rig: Rig, tmp_path: Path
) -> None:
    executable = mode == 0o755
    content = os.urandom(size)
    (tmp_path / name).write_bytes(content)
    (tmp_path / name).chmod(mode)
    (record,), reading = rig.read(name)
    assert rig.frame(record) == nar_entry(os.fsencode(name), content, executable=executable)
    assert record == HashRecord(
        kind=HashKind.LAST,
        executable=executable,
        lead=record.lead,
        offset=record.lead,
        size=size,
        used=record.frame_size,
        file_size=size,
        staged=0,
        frame_size=record.frame_size,
        digest=blake3(content).digest(),
    )
    assert rig.ring[record.frame_size] == 0xFF
    assert record.frame_size <= size + FRAME_EXTRA_MAX
    assert reading.large == ([0] if size > INLINE_MAX else [])
    assert not reading.is_refused


def test_files_follow_each_other_without_a_gap(rig: Rig, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(os.urandom(1000))
    records, reading = rig.read(*"abc", position=64, skipped=64)
    assert reading.num_done == len("a b c ")
    starts = [record.offset - record.lead for record in records]
    assert starts == [64, *(start + records[0].frame_size for start in starts[:2])]
    assert [record.used - record.frame_size for record in records] == [64, 0, 0]


def test_directories_are_entered_by_their_paths_from_the_root(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    for number, directory in enumerate(["", "one", "one/two"]):
        (tmp_path / directory / "file").write_bytes(b"%d" % number)
    names = ["/one", "file", "/", "file", "/one/two", "file", "file"]
    records, _ = rig.read(*names)
    contents = [rig.ring[record.offset : record.offset + record.size] for record in records]
    assert contents == [b"1", b"0", b"2", b"2"]


def test_it_stops_before_a_file_for_which_there_is_no_room(rig: Rig, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(os.urandom(1000))
    (first,), _ = rig.read("a")
    (again,), reading = rig.read("a", "b", room=2 * first.frame_size - 1)
    assert again == first
    assert reading.num_done == len("a ")
    assert not reading.is_refused
    none, reading = rig.read("a", room=first.frame_size - 1)
    assert (none, reading.num_done, reading.is_refused) == ([], 0, False)


def test_it_stops_when_the_records_are_used_up(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    records, reading = rig.read(*["a"] * 9)
    assert len(records) == 8
    assert not reading.is_refused


@pytest.mark.parametrize(
    "request_text",
    ["missing", "directory", "symlink", "fifo", "large", "n" * 256, "", "..", "good/", "//1:2:x"],
)
def test_what_is_not_for_it_is_left_alone(request_text: str, rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "good").write_bytes(b"")
    (tmp_path / "symlink").symlink_to("good")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(FILE_MAX + 1)
    reading = rig.request("good", request_text, "good")
    assert len(reading.records) == HASH_RECORD.size
    assert reading.num_done == len("good ")
    assert reading.is_refused


@pytest.mark.parametrize("directory", ["missing", "link", "link/below", "../other", "file"])
def test_a_directory_that_is_not_below_the_root_has_no_files(
    directory: str, rig: Rig, tmp_path: Path
) -> None:
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    (outside / "below").mkdir(parents=True)
    for path in (outside, outside / "below", tmp_path):
        (path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(outside)
    reading = rig.request(f"/{directory}", "file")
    assert (bytes(reading.records), reading.is_refused) == (b"", True)


@pytest.mark.parametrize("path", ["version", "self/mem"])  # has no size; cannot be read
def test_what_cannot_be_read_as_it_should_be_is_left_alone(path: str) -> None:
    rig = Rig(Path("/proc"))
    directory, _, name = path.rpartition("/")
    assert rig.request(f"/{directory}", name).is_refused
