"""A mounted store, seen by file system calls."""

import base64
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, SymlinkNode
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.fakes.mounted import Mounted
from tests.fs.guest import File, Link, Tree, add_path, basename, put

pytestmark = pytest.mark.slow

SMALL = b"small content"
LARGE = os.urandom(1 << 20) + b"end"
SUB: Tree = {b"keep": File(b""), b"run": File(SMALL, is_executable=True)}
TREE: Tree = {
    b"b": File(SMALL),
    b"a": File(b"a"),
    b"sub": SUB,
    b"twin": SUB,
    b"c": {b"deep": {b"deeper": {b"file": File(b"deep down")}}},
    b"link": Link(b"sub/run"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    store = Store.open(path, create=True)
    put(store, "file", File(SMALL))
    put(store, "large", File(LARGE))
    put(store, "tree", TREE)
    put(store, "hollow", {})
    put(store, "link", Link(basename("file")))
    put(store, "dangling", Link(b"nothing"))
    batch = Batch()
    missing = Digest.of(b"what the store does not have")
    add_path(batch, "lost-directory", DirectoryNode(b"", missing, 3))
    add_path(batch, "lost-file", FileNode(b"", missing, 7, executable=False))
    add_path(batch, "far", SymlinkNode(b"", b"/etc/hostname"))
    store.commit(batch)
    store.close()
    return path


@pytest.fixture
def root(mounted: Mounted) -> Path:
    return mounted.path


def path_in(root: Path, name: str) -> Path:
    return root / os.fsdecode(basename(name))


def names_of(path: Path) -> list[str]:
    return [child.name for child in path.iterdir()]


def test_the_root_lists_every_path(root: Path) -> None:
    names = ["file", "large", "tree", "hollow", "link", "dangling"]
    names += ["lost-directory", "lost-file", "far"]
    assert set(names_of(root)) == {os.fsdecode(basename(name)) for name in names}


def test_a_file_in_the_root(root: Path) -> None:
    path = path_in(root, "file")
    status = path.stat()
    assert stat.S_ISREG(status.st_mode)
    assert status.st_size == len(SMALL)
    assert path.read_bytes() == SMALL


def test_a_large_file_in_the_root(root: Path) -> None:
    path = path_in(root, "large")
    assert path.stat().st_size == len(LARGE)
    assert path.read_bytes() == LARGE


def test_a_symlink_and_what_it_points_to(root: Path) -> None:
    path = path_in(root, "link")
    assert path.readlink() == Path(os.fsdecode(basename("file")))
    assert stat.S_ISLNK(path.lstat().st_mode)
    assert path.stat() == path_in(root, "file").stat()
    assert path.read_bytes() == SMALL
    assert path_in(root, "far").read_bytes() == Path("/etc/hostname").read_bytes()
    assert not path_in(root, "dangling").exists()


def test_a_directory_in_the_root(root: Path) -> None:
    assert stat.S_ISDIR(path_in(root, "hollow").stat().st_mode)
    assert names_of(path_in(root, "hollow")) == []


def test_files_in_directories_and_deeper(root: Path) -> None:
    tree = path_in(root, "tree")
    assert (tree / "b").read_bytes() == SMALL
    assert (tree / "sub" / "run").read_bytes() == SMALL
    assert (tree / "link").read_bytes() == SMALL
    assert (tree / "c" / "deep" / "deeper" / "file").read_bytes() == b"deep down"


def test_listings_are_sorted_whatever_the_kinds(root: Path) -> None:
    assert names_of(path_in(root, "tree")) == ["a", "b", "c", "link", "sub", "twin"]


def test_a_deep_directory_is_listed_though_its_parents_never_were(
    store: Path, mountpoint: Path
) -> None:
    with Mounted(store, mountpoint):
        assert names_of(path_in(mountpoint, "tree") / "c" / "deep" / "deeper") == ["file"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a", 0o100444), ("sub/run", 0o100555), ("sub", 0o40555), ("link", 0o120444)],
)
def test_attributes_are_canonical(root: Path, name: str, mode: int) -> None:
    status = (path_in(root, "tree") / name).lstat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (mode, 0, 0)
    assert (status.st_atime, status.st_mtime, status.st_ctime) == (1, 1, 1)
    assert status.st_nlink == 1
    assert status.st_blocks == -(-status.st_size // 512)


def test_equal_nodes_have_inodes_of_their_own_unless_they_are_by_content(
    root: Path, inodes: str
) -> None:
    tree = path_in(root, "tree")
    pairs = [(tree / "sub" / name, tree / "twin" / name) for name in (".", "run", "keep")] + [
        (tree / "b", path_in(root, "file"))
    ]
    for one, other in pairs:
        is_one = one.lstat().st_ino == other.lstat().st_ino
        assert is_one == (inodes == "content"), one


def test_the_executable_bit_of_equal_contents_is_kept(root: Path) -> None:
    tree = path_in(root, "tree")
    plain, executable = (tree / "b").stat(), (tree / "sub" / "run").stat()
    assert plain.st_ino != executable.st_ino
    assert (plain.st_mode & 0o111, executable.st_mode & 0o111) == (0, 0o111)


@pytest.mark.parametrize(
    "name", ["absent", "00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p20170221182432", "."]
)
def test_wrong_paths_in_the_root_are_absent(root: Path, name: str) -> None:
    if name == ".":
        assert (root / name).is_dir()
        return
    for _again in range(2):
        with pytest.raises(FileNotFoundError):
            (root / name).lstat()


def test_writes_are_refused(root: Path) -> None:
    tree = path_in(root, "tree")
    for refused in (
        lambda: (tree / "new").write_bytes(b""),
        lambda: (tree / "a").write_bytes(b""),
        (tree / "new").mkdir,
        (root / "new").mkdir,
        (tree / "a").unlink,
        lambda: (tree / "a").rename(tree / "z"),
        lambda: (tree / "a").chmod(0o777),
    ):
        with pytest.raises(OSError, match="Read-only") as caught:
            refused()
        assert caught.value.errno == errno.EROFS


def test_a_missing_directory_has_a_status_and_no_content(root: Path) -> None:
    path = path_in(root, "lost-directory")
    assert stat.S_ISDIR(path.lstat().st_mode)
    for refused in (lambda: names_of(path), (path / "below").lstat):
        with pytest.raises(OSError, match="Input/output"):
            refused()


def test_a_missing_blob_has_a_status_and_no_content(root: Path) -> None:
    path = path_in(root, "lost-file")
    assert path.lstat().st_size == 7
    with pytest.raises(OSError, match="Input/output"):
        path.read_bytes()


def test_digests_are_attributes(root: Path) -> None:
    path = path_in(root, "file")
    text = base64.b64encode(Digest.of(SMALL))
    assert os.getxattr(path, "user.snix.castore.blob.digest") == b"blake3-" + text
    assert os.getxattr(path, "user.tvix.castore.blob.digest") == b"b3:" + text
    hollow = path_in(root, "hollow")
    assert os.getxattr(hollow, "user.tvix.castore.directory.digest").startswith(b"b3:")
    # What is listed would be copied along with the file.
    assert os.listxattr(path) == os.listxattr(hollow) == []


def test_statfs_tells_of_the_disk_that_has_the_store(root: Path, store: Path) -> None:
    here, there = os.statvfs(root), os.statvfs(store)
    assert (here.f_blocks, here.f_bsize, here.f_files) == (
        there.f_blocks,
        there.f_bsize,
        there.f_files,
    )
    assert here.f_flag & os.ST_RDONLY


@pytest.fixture
def working_directory() -> Iterator[Path]:
    before = Path.cwd()
    yield before
    os.chdir(before)


@pytest.mark.usefixtures("working_directory")
def test_no_process_is_moved_to_an_equal_directory(root: Path) -> None:
    tree = path_in(root, "tree")
    os.chdir(tree / "sub")
    for _again in range(3):
        (tree / "twin" / "run").stat()
        names_of(tree / "twin")
        assert Path.cwd() == tree / "sub"
        assert Path("run").read_bytes() == SMALL
