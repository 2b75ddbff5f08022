import mmap
import os
from pathlib import Path

import pytest
from blake3 import blake3

from appliance.importer.file_reader import FRAME_EXTRA_MAX, FileReader, Reading
from appliance.importer.records import HASH_RECORD, HashKind, HashRecord
from appliance.nar.writer import NarWriter
from appliance.store.schema import INLINE, INLINE_MAX

RING_SIZE = 4 << 20
FILE_MAX = 1 << 20
SIZES = (0, 1, 7, 8, 9, 4095, INLINE_MAX, INLINE_MAX + 1, FILE_MAX)


class Rig:
    """A ring full of ones, and a reader of files into it."""

    def __init__(self) -> None:
        self.ring = mmap.mmap(-1, RING_SIZE)
        self.ring[:] = b"\xff" * RING_SIZE
        self.reader = FileReader(self.ring, FILE_MAX, records_max=8)

    def read(
        self, *paths: Path, position: int = 0, room: int = RING_SIZE, skipped: int = 0
    ) -> tuple[list[HashRecord], Reading]:
        data = memoryview(b"".join(os.fsencode(path) + b"\0" for path in paths))
        reading = self.reader.read(data, position, room, skipped, 8)
        records = [*map(HashRecord._make, HASH_RECORD.iter_unpack(reading.records))]
        return records, reading

    def frame(self, record: HashRecord) -> bytes:
        start = record.offset - record.lead
        return self.ring[start : start + record.frame_size]


@pytest.fixture
def rig() -> Rig:
    return Rig()


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
    (record,), reading = rig.read(tmp_path / name)
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
    assert rig.ring[record.offset - 1] == INLINE
    assert rig.ring[record.frame_size] == 0xFF
    assert record.frame_size <= size + FRAME_EXTRA_MAX
    assert reading.large == ([0] if size > INLINE_MAX else [])
    assert not reading.is_refused


def test_files_follow_each_other_without_a_gap(rig: Rig, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(os.urandom(1000))
    records, reading = rig.read(*paths, position=64, skipped=64)
    assert reading.num_done == sum(len(os.fsencode(path)) + 1 for path in paths)
    starts = [record.offset - record.lead for record in records]
    assert starts == [64, *(start + records[0].frame_size for start in starts[:2])]
    assert [record.used - record.frame_size for record in records] == [64, 0, 0]


def test_a_relative_path_without_a_slash_is_a_name(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").write_bytes(b"content")
    (record,), _ = rig.read(Path("here"))
    assert rig.frame(record) == nar_entry(b"here", b"content", executable=False)


def test_it_stops_before_a_file_for_which_there_is_no_room(rig: Rig, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(os.urandom(1000))
    (first,), _ = rig.read(tmp_path / "a")
    (again,), reading = rig.read(tmp_path / "a", tmp_path / "b", room=2 * first.frame_size - 1)
    assert again == first
    assert reading.num_done == len(os.fsencode(tmp_path / "a")) + 1
    assert not reading.is_refused
    none, reading = rig.read(tmp_path / "a", room=first.frame_size - 1)
    assert (none, reading.num_done, reading.is_refused) == ([], 0, False)


def test_it_stops_when_the_records_are_used_up(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    records, reading = rig.read(*[tmp_path / "a"] * 9)
    assert len(records) == 8
    assert not reading.is_refused


@pytest.mark.parametrize(
    "name",
    [
        "missing",
        "directory",
        "symlink",
        "fifo",
        "large",
        "n" * 256,
        "name/",
        "deep/" * 1000 + "file",
        "/proc/version",  # tells no size
        "/proc/self/mem",  # cannot be read
    ],
)
def test_what_is_not_for_it_is_left_alone(name: str, rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "good").write_bytes(b"")
    (tmp_path / "symlink").symlink_to("good")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(FILE_MAX + 1)
    good = os.fsencode(tmp_path / "good") + b"\0"
    bad = os.path.join(tmp_path, name).encode() + b"\0"  # noqa: PTH118 -- keeps the last slash
    reading = rig.reader.read(memoryview(good + bad + good), 0, RING_SIZE, 0, 8)
    assert len(reading.records) == HASH_RECORD.size
    assert reading.num_done == len(good)
    assert reading.is_refused
