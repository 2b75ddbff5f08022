"""Which files are named to be fetched ahead when a file is missed."""

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.resolve.prefetch import ReadAhead
from appliance.store.schema import INLINE_MAX

MUCH = 1 << 30


def digest_of(label: str) -> Digest:
    return Digest.of(label.encode())


def directory(label: str, num: int, *below: Directory, size: int = 100) -> Directory:
    files = [
        FileNode(b"%05d" % number, digest_of(f"{label}{number}"), size, executable=False)
        for number in range(num)
    ]
    nodes = [
        DirectoryNode(b"sub%05d" % number, child.digest(), child.size())
        for number, child in enumerate(below)
    ]
    return Directory(nodes, files)


def remembering(*directories: Directory, bytes_max: int = MUCH) -> ReadAhead:
    """Return what is told of a path: the first directory is its root."""
    read_ahead = ReadAhead(bytes_max)
    known = {one.digest(): one for one in directories}
    read_ahead.add(directories[0].digest(), b"path", known)
    return read_ahead


def missed(read_ahead: ReadAhead, label: str, *, is_under_way: bool = True) -> list[Digest]:
    return [digest for digest, _ in read_ahead.after(digest_of(label), is_under_way=is_under_way)]


def test_a_file_of_no_known_directory_has_none_after_it() -> None:
    assert missed(remembering(directory("a", 5)), "elsewhere") == []


def test_the_first_miss_names_few_and_each_later_one_twice_as_many() -> None:
    read_ahead = remembering(directory("a", 4000))
    named = missed(read_ahead, "a0", is_under_way=False)
    assert named == [digest_of(f"a{number}") for number in range(1, 9)]
    for ahead in (16, 32, 64, 128, 256, 512, 512):
        at = len(named)
        # The reader has read all that was named, and misses what is behind it.
        more = missed(read_ahead, f"a{at + 1}", is_under_way=False)
        assert more == [digest_of(f"a{number}") for number in range(at + 2, at + 2 + ahead)]
        named += [digest_of(f"a{at + 1}"), *more]


def test_a_miss_of_what_is_on_its_way_moves_on_and_names_nothing_twice() -> None:
    read_ahead = remembering(directory("a", 1000))
    named = missed(read_ahead, "a0", is_under_way=False)
    for number in range(1, 100):
        named += missed(read_ahead, f"a{number}")
    assert named == [digest_of(f"a{number}") for number in range(1, 1 + len(named))]
    assert len(named) == 99 + 512


def test_readers_in_two_places_go_on_apart() -> None:
    read_ahead = remembering(directory("a", 1000))
    for at in (0, 500):
        assert len(missed(read_ahead, f"a{at}", is_under_way=False)) == 8
    for at in (9, 509):
        named = missed(read_ahead, f"a{at}", is_under_way=False)
        assert named == [digest_of(f"a{at + 1 + number}") for number in range(16)]


def test_what_did_not_come_is_named_again() -> None:
    read_ahead = remembering(directory("a", 100))
    first = missed(read_ahead, "a0", is_under_way=False)
    again = missed(read_ahead, "a1", is_under_way=False)
    assert again[: len(first) - 1] == first[1:]


def test_large_and_empty_files_are_not_named() -> None:
    small, empty = directory("a", 3), directory("b", 3, size=0)
    large = directory("c", 3, size=INLINE_MAX + 1)
    files = [*small.files[:1], *empty.files[1:2], *large.files[2:]]
    read_ahead = remembering(Directory(files=files))
    assert missed(read_ahead, "a0", is_under_way=False) == []


def test_no_more_bytes_are_named_than_is_said() -> None:
    read_ahead = remembering(directory("a", 100, size=1000), bytes_max=3500)
    assert len(missed(read_ahead, "a0", is_under_way=False)) == 3


def test_a_reader_goes_on_down_then_beside_then_up() -> None:
    deepest = directory("deepest", 2)
    deep, beside = directory("deep", 2, deepest), directory("beside", 2)
    one, other = directory("one", 3, deep, beside), directory("other", 2)
    top = directory("top", 0, one, other)
    read_ahead = remembering(top, one, deep, deepest, beside, other)
    named = missed(read_ahead, "one0") + missed(read_ahead, "one1")
    order = ["deep0", "deep1", "deepest0", "deepest1", "beside0", "beside1", "other0", "other1"]
    assert named == [digest_of(label) for label in ("one1", "one2", *order)]


def test_the_place_of_a_file_is_known() -> None:
    deep = directory("deep", 2)
    read_ahead = remembering(directory("top", 1, directory("one", 0, deep)), deep)
    assert read_ahead.place_of(digest_of("top0")) == "path/00000"
    assert read_ahead.place_of(digest_of("elsewhere")) == ""
    one = directory("one", 0, deep)
    read_ahead.add(one.digest(), b"", {one.digest(): one, deep.digest(): deep})
    assert read_ahead.place_of(digest_of("deep1")) == ".../sub00000/00001"


def test_equal_directories_in_many_places_lead_to_an_end() -> None:
    one, other = directory("one", 1), directory("other", 1)
    first = directory("first", 0, one, one, other)
    second = directory("second", 0, other, one, other, first)
    read_ahead = remembering(directory("top", 0, second, first), first, second, one, other)
    for _ in range(10):
        for label in ("one0", "other0"):
            assert len(missed(read_ahead, label)) <= 2


def test_one_file_read_in_each_directory_names_no_files_of_the_next() -> None:
    leaves = [directory(f"leaf{number}-", 30) for number in range(20)]
    read_ahead = remembering(directory("top", 0, *leaves), *leaves)
    for number in range(20):
        assert len(missed(read_ahead, f"leaf{number}-3", is_under_way=False)) == 8


@pytest.mark.slow
def test_the_oldest_paths_are_forgotten() -> None:
    read_ahead = ReadAhead(MUCH)
    for number in range(80):
        one = directory(f"{number}-", 2000)
        read_ahead.add(one.digest(), b"path", {one.digest(): one})
    assert missed(read_ahead, "0-0", is_under_way=False) == []
    assert missed(read_ahead, "79-0", is_under_way=False)
    assert 1 << 16 < len(read_ahead._places) <= 1 << 17
