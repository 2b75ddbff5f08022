"""The store that other implementations test their mount with, mounted and looked at as they do."""

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from appliance.castore.directory import Node
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import StorePath
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.fakes.mounted import Mounted
from tests.fs.guest import File, Link, Model, node_of

pytestmark = pytest.mark.slow

BLOB_A = b"\0\1"
BLOB_B = bytes(range(255)) * 4096
HELLO = b"Hello World!"
SOMEWHERE = "/nix/store/somewhereelse"


def name(digit: int) -> str:
    return f"{digit}" * 32 + "-test"


FILE, LINK, KEEP, COMPLICATED, LINK_ELSEWHERE, LARGE, EXECUTABLE = map(name, range(7))
MISSING_DIRECTORY, MISSING_BLOB = name(7), name(8)
MODELS: dict[str, Model] = {
    FILE: File(BLOB_A),
    LINK: Link(FILE.encode()),
    KEEP: {b".keep": File(b"")},
    COMPLICATED: {
        b".keep": File(b""),
        b"aa": Link(SOMEWHERE.encode()),
        b"keep": {b".keep": File(b"")},
    },
    LINK_ELSEWHERE: Link(SOMEWHERE.encode()),
    LARGE: File(BLOB_B),
    EXECUTABLE: File(HELLO, is_executable=True),
}


def add(batch: Batch, basename: str, node: Node) -> None:
    path = StorePath.parse(basename)
    encoded = encode_nar_addressed(path, node, nar_size=0, nar_sha256=bytes(32))
    batch.add_path_info(path.digest, encoded)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    store = Store.open(path, create=True)
    batch = Batch()
    for basename, model in MODELS.items():
        add(batch, basename, node_of(batch, path / "spare", b"", model))
    spare = Batch()
    for basename, lost in ((MISSING_DIRECTORY, {b"x": File(b"y")}), (MISSING_BLOB, File(b"lost"))):
        add(batch, basename, node_of(spare, path / "spare", b"", lost))
    store.commit(batch)
    store.close()
    return path


@pytest.fixture
def root(mounted: Mounted) -> Path:
    return mounted.path


def error_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 -- its number is looked at
        call()
    return caught.value.errno


def test_the_root_is_listed_only_where_that_is_allowed(
    root: Path, store: Path, mountpoint: Path
) -> None:
    listed = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(root)}
    assert listed.keys() == MODELS.keys() | {MISSING_DIRECTORY, MISSING_BLOB}
    assert stat.S_ISREG(listed[FILE].st_mode)
    assert listed[FILE].st_size == len(BLOB_A)
    with Mounted(store, mountpoint):
        assert list(os.scandir(mountpoint)) == []
        assert (mountpoint / FILE).read_bytes() == BLOB_A


@pytest.mark.parametrize(
    ("path", "content"),
    [
        (FILE, BLOB_A),
        (LARGE, BLOB_B),
        (EXECUTABLE, HELLO),
        (LINK, BLOB_A),
        (f"{KEEP}/.keep", b""),
        (f"{COMPLICATED}/.keep", b""),
        (f"{COMPLICATED}/keep/.keep", b""),
    ],
)
def test_a_file_has_its_size_and_content_and_may_not_be_written(
    root: Path, path: str, content: bytes
) -> None:
    status = (root / path).stat()

    assert stat.S_ISREG(status.st_mode)
    assert not status.st_mode & 0o222
    assert status.st_size == len(content)
    assert (root / path).read_bytes() == content


def test_a_symlink_has_its_target_even_where_that_is_absent(root: Path) -> None:
    assert (root / LINK).readlink() == Path(FILE)
    assert (root / LINK).stat() == (root / FILE).stat()
    for path in (LINK_ELSEWHERE, f"{COMPLICATED}/aa"):
        assert (root / path).readlink() == Path(SOMEWHERE)
        assert stat.S_ISLNK((root / path).lstat().st_mode)
        assert error_of((root / path).stat) == errno.ENOENT
        assert error_of((root / path).read_bytes) == errno.ENOENT


def test_a_directory_lists_its_entries_in_order(root: Path, store: Path, mountpoint: Path) -> None:
    entries = list(os.scandir(root / COMPLICATED))

    assert [entry.name for entry in entries] == [".keep", "aa", "keep"]
    assert entries[0].is_file()
    assert entries[0].stat().st_size == 0
    assert entries[1].is_symlink()
    assert entries[2].is_dir(follow_symlinks=False)
    with Mounted(store, mountpoint):  # nothing above it was looked at before
        assert [entry.name for entry in os.scandir(mountpoint / COMPLICATED / "keep")] == [".keep"]


@pytest.mark.parametrize(
    ("path", "mode"),
    [(FILE, 0o100444), (EXECUTABLE, 0o100555), (KEEP, 0o040555), (LINK, 0o120444)],
)
def test_modes_owners_and_times_are_those_of_a_store(root: Path, path: str, mode: int) -> None:
    status = (root / path).lstat()

    assert (status.st_mode, status.st_uid, status.st_gid) == (mode, 0, 0)
    assert len({status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (KEEP, f"{COMPLICATED}/keep"),
        (f"{COMPLICATED}/.keep", f"{COMPLICATED}/keep/.keep"),
        (f"{COMPLICATED}/aa", LINK_ELSEWHERE),
    ],
)
def test_equal_contents_have_one_inode_number_where_it_is_by_content(
    root: Path, inodes: str, one: str, other: str
) -> None:
    inos = {(root / one).lstat().st_ino, (root / other).lstat().st_ino}
    assert len(inos) == (1 if inodes == "content" else 2)


def test_different_contents_have_different_inode_numbers(root: Path) -> None:
    paths = [
        *MODELS.keys() - {LINK_ELSEWHERE},
        *(f"{COMPLICATED}/{sub}" for sub in (".keep", "aa")),
    ]

    assert len({(root / path).lstat().st_ino for path in paths}) == len(paths)


def test_a_path_is_found_by_its_exact_name_only(root: Path) -> None:
    wrong = [FILE[:-1], FILE[1:], FILE + "s"]
    for _before_and_after_it_was_found in range(2):
        assert [error_of((root / path).lstat) for path in wrong] == [errno.ENOENT] * 3
        assert (root / FILE).lstat().st_size == len(BLOB_A)


def test_no_file_is_created_not_even_one_that_could_be_a_path(root: Path) -> None:
    for path in (name(9), FILE, f"{KEEP}/new"):
        assert error_of(partial((root / path).write_bytes, b"")) == errno.EROFS


def test_what_is_missing_can_be_looked_at_and_not_into(root: Path) -> None:
    directory, file = root / MISSING_DIRECTORY, root / MISSING_BLOB

    assert stat.S_ISDIR(directory.lstat().st_mode)
    assert error_of(lambda: list(os.scandir(directory))) == errno.EIO
    assert error_of((directory / "x").lstat) == errno.EIO
    assert file.lstat().st_size == 4
    assert error_of(file.read_bytes) == errno.EIO
