"""Inode numbers: one for each name, or with --inodes=content one for each content."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.store.store import Store
from tests.fakes.mounted import Mounted
from tests.fs.guest import File, Link, Tree, put

pytestmark = pytest.mark.slow

FILES = 30_000
MANY_FILES = 300_000
DIRECTORIES = 2_000
BELOW_EACH = ("sub", "file", "sub/file", "sub/link")
# CRC-32 does not tell these apart, so they were one inode where numbers were made by it.
COLLIDING = ("dc171b70cc0", "d786671d609")


class _Dirent(ctypes.Structure):
    # x86-64 and arm64, glibc.
    _fields_ = (
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_uint16),
        ("d_type", ctypes.c_uint8),
        ("d_name", ctypes.c_char * 256),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.readdir.restype = ctypes.POINTER(_Dirent)
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]


def listed(path: Path) -> dict[str, int]:
    """Return the inode numbers in a listing; os.scandir() leaves out "." and ".."."""
    stream = _libc.opendir(os.fsencode(path))
    assert stream, os.strerror(ctypes.get_errno())
    found = {}
    while record := _libc.readdir(stream):
        found[os.fsdecode(record.contents.d_name)] = record.contents.d_ino
    _libc.closedir(stream)
    return found


def drop_inodes() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


def tree_of(num_files: int) -> Tree:
    each: Tree = {
        b"file": File(b"text"),
        b"sub": {b"file": File(b"text"), b"link": Link(b"file")},
    }
    names = [*COLLIDING, *(f"{number}" for number in range(DIRECTORIES))]
    return {
        b"directories": {name.encode(): each for name in names},
        b"files": {b"%d" % number: File(b"") for number in range(num_files)},
    }


def fill(path: Path, num_files: int, *names: str) -> list[str]:
    """Put the tree into a new store, under each of the names; return their base names."""
    store = Store.open(path, create=True)
    found = [os.fsdecode(put(store, name, tree_of(num_files))) for name in names]
    store.close()
    return found


class Stored(NamedTuple):
    """A store with one tree under two names."""

    store: Path
    names: list[str]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    store = tmp_path_factory.mktemp("stored") / "store"
    return Stored(store, fill(store, FILES, "one", "other"))


def mounted_trees(
    stored: Stored, directory: Path, options: Sequence[str] = ()
) -> Iterator[list[Path]]:
    (directory / "mnt").mkdir()
    with Mounted(stored.store, directory / "mnt", *options) as mounted:
        yield [mounted.path / name for name in stored.names]


@pytest.fixture(scope="module")
def by_place(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    yield from mounted_trees(stored, tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def by_content(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    yield from mounted_trees(stored, tmp_path_factory.mktemp("content"), ["--inodes=content"])


@pytest.fixture(scope="module", params=["by_place", "by_content"])
def trees(request: pytest.FixtureRequest) -> list[Path]:
    found: list[Path] = request.getfixturevalue(request.param)
    return found


def inodes(tree: Path) -> dict[str, int]:
    """Return st_ino of every name, and see that the listings say the same."""
    found = {".": tree.lstat().st_ino}
    above = {".": tree.parent.lstat().st_ino}
    pending = ["."]
    while pending:
        directory = pending.pop()
        names = listed(tree / directory)
        assert names.pop(".") == found[directory], directory
        assert names.pop("..") == above[directory], directory
        for name, number in names.items():
            status = os.lstat(f"{tree}/{directory}/{name}")
            assert number == status.st_ino, (directory, name)
            path = os.path.normpath(f"{directory}/{name}")
            found[path] = number
            if status.st_mode & 0o170000 == 0o040000:
                above[path] = found[directory]
                pending.append(path)
    return found


def test_every_name_has_an_inode_of_its_own(by_place: list[Path]) -> None:
    numbers = [number for tree in by_place for number in inodes(tree).values()]
    expected = 3 + FILES + (DIRECTORIES + len(COLLIDING)) * (1 + len(BELOW_EACH))
    assert len(numbers) == len(by_place) * expected
    assert len(set(numbers)) == len(numbers)


def test_equal_contents_have_one_inode_number_where_that_was_asked_for(
    by_content: list[Path],
) -> None:
    one, other = (inodes(tree) for tree in by_content)
    assert one == other
    # The tree, its two directories; a directory of each kind, "sub", two files, the link.
    assert len(set(one.values())) == 3 + 5
    files = {number for path, number in one.items() if path.startswith("files/")}
    assert len(files) == 1
    assert one["directories/0/file"] == one["directories/1/sub/file"]
    assert one["directories/0"] == one[f"directories/{COLLIDING[0]}"]


def test_inode_numbers_outlast_what_the_kernel_remembers(trees: list[Path]) -> None:
    tree = trees[1]
    before = inodes(tree)
    drop_inodes()
    # Not by a listing, this time, and not in its order.
    for path in list(before)[:: -(len(before) // 2000)]:
        assert os.lstat(f"{tree}/{path}").st_ino == before[path]
    drop_inodes()
    for directory in ("files", "directories", "directories/0"):
        for name, number in listed(tree / directory).items():
            if name not in {".", ".."}:
                assert number == before[f"{directory}/{name}"]


def test_the_root_has_the_number_that_listings_give(stored: Stored, mountpoint: Path) -> None:
    with Mounted(stored.store, mountpoint, "--list-root"):
        found = listed(mountpoint)
        root = mountpoint.lstat().st_ino
        assert (found.pop("."), found.pop("..")) == (root, root)
        assert found == {name: (mountpoint / name).lstat().st_ino for name in stored.names}


@pytest.mark.parametrize("options", [[], ["--inodes=content"]], ids=["place", "content"])
def test_equal_directories_are_told_apart_by_their_names(
    stored: Stored, mountpoint: Path, options: list[str]
) -> None:
    # Whoever works in one is not moved to another, whatever st_ino says.
    with Mounted(stored.store, mountpoint, *options):
        places = [
            mountpoint / tree / "directories" / name / "sub"
            for tree in stored.names
            for name in (*COLLIDING, "0", "1")
        ]
        fds = [os.open(place, os.O_RDONLY | os.O_DIRECTORY) for place in places]
        try:
            for _again in range(2):
                for fd, place in zip(fds, places, strict=True):
                    assert Path(f"/proc/self/fd/{fd}").readlink() == place
                    assert (place / "file").read_text() == "text"
                drop_inodes()
        finally:
            for fd in fds:
                os.close(fd)


def test_hundreds_of_thousands_of_equal_files_have_inodes_of_their_own(tmp_path: Path) -> None:
    names = fill(tmp_path / "store", MANY_FILES, "many")
    for (tree,) in mounted_trees(Stored(tmp_path / "store", names), tmp_path):
        numbers = inodes(tree)
        assert len(numbers) > MANY_FILES
        assert len(set(numbers.values())) == len(numbers)
