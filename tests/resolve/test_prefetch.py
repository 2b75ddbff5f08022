"""Which files are named to be fetched ahead when a file is missed."""

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.resolve.prefetch import SmallFiles
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


def remembering(*directories: Directory, bytes_max: int = MUCH) -> SmallFiles:
    small_files = SmallFiles(bytes_max)
    for one in directories:
        small_files.add(one.digest(), one)
    return small_files


def missed(small_files: SmallFiles, label: str, *, is_under_way: bool = True) -> list[Digest]:
    return [digest for digest, _ in small_files.after(digest_of(label), is_under_way=is_under_way)]


def test_a_file_of_no_known_directory_has_none_after_it() -> None:
    assert missed(remembering(directory("a", 5)), "elsewhere") == []


def test_the_first_miss_names_few_and_each_later_one_more() -> None:
    small_files = remembering(directory("a", 1000))
    named = missed(small_files, "a0", is_under_way=False)
    assert named == [digest_of(f"a{number}") for number in range(1, 9)]
    counts = []
    for number in range(1, 6):
        more = missed(small_files, f"a{number}")
        counts.append(len(more))
        named += more
    assert named == [digest_of(f"a{number}") for number in range(1, 1 + len(named))]
    assert len(named) == 5 + 64
    assert counts == [*sorted(counts[:3]), 1, 1]


def test_what_did_not_come_is_named_again() -> None:
    small_files = remembering(directory("a", 100))
    first = missed(small_files, "a0", is_under_way=False)
    again = missed(small_files, "a1", is_under_way=False)
    assert again[: len(first) - 1] == first[1:]


def test_large_and_empty_files_are_not_named() -> None:
    small, empty = directory("a", 3), directory("b", 3, size=0)
    large = directory("c", 3, size=INLINE_MAX + 1)
    files = [*small.files[:1], *empty.files[1:2], *large.files[2:]]
    small_files = remembering(Directory(files=files))
    assert missed(small_files, "a0", is_under_way=False) == []


def test_no_more_bytes_are_named_than_is_said() -> None:
    small_files = remembering(directory("a", 100, size=1000), bytes_max=3500)
    assert len(missed(small_files, "a0", is_under_way=False)) == 3


def test_a_reader_that_comes_to_the_end_goes_on_in_the_next_directory() -> None:
    one, other = directory("a", 4), directory("b", 50)
    small_files = remembering(directory("top", 0, one, other), one, other)
    for number in range(2):
        assert digest_of("b0") not in missed(small_files, f"a{number}")
    named = missed(small_files, "a2")
    assert named == [digest_of(f"b{number}") for number in range(len(named))]
    assert named


def test_a_reader_goes_on_down_then_beside_then_up() -> None:
    deepest = directory("deepest", 2)
    deep, beside = directory("deep", 2, deepest), directory("beside", 2)
    one, other = directory("one", 3, deep, beside), directory("other", 2)
    top = directory("top", 0, one, other)
    small_files = remembering(top, one, deep, deepest, beside, other)
    named = [digest for number in range(3) for digest in missed(small_files, f"one{number}")]
    order = ["deep0", "deep1", "deepest0", "deepest1", "beside0", "beside1", "other0", "other1"]
    assert named == [digest_of(label) for label in ("one1", "one2", *order)]


def test_equal_directories_in_many_places_lead_to_an_end() -> None:
    one, other = directory("one", 1), directory("other", 1)
    first = directory("first", 0, one, one, other)
    second = directory("second", 0, other, one, other, first)
    small_files = remembering(first, second, directory("top", 0, second, first), one, other)
    for _ in range(10):
        for label in ("one0", "other0"):
            assert len(missed(small_files, label)) <= 2


def test_one_file_read_in_each_directory_names_no_files_of_the_next() -> None:
    leaves = [directory(f"leaf{number}-", 30) for number in range(20)]
    small_files = remembering(directory("top", 0, *leaves), *leaves)
    for number in range(20):
        assert len(missed(small_files, f"leaf{number}-3", is_under_way=False)) == 8


@pytest.mark.slow
def test_the_oldest_directories_are_forgotten() -> None:
    small_files = SmallFiles(MUCH)
    for number in range(100):
        one = directory(f"{number}-", 2000)
        small_files.add(one.digest(), one)
    assert missed(small_files, "0-0", is_under_way=False) == []
    assert missed(small_files, "99-0", is_under_way=False)
    assert len(small_files._places) <= 1 << 16
    assert len(small_files._directories) < 40
