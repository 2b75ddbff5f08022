"""Large files are cloned where the file system can, by `import` and by `copy`."""

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import Nix
from tests.fakes.appliance_process import import_tree

pytestmark = pytest.mark.slow

# linux/fs.h: FS_IOC_FIEMAP, and struct fiemap with room for some extents (linux/fiemap.h).
FS_IOC_FIEMAP = 0xC020660B
FIEMAP = struct.Struct("=QQIIII")
EXTENT = struct.Struct("=QQQQQIIII")
NUM_EXTENTS = 64
SYNC, SHARED = 1, 0x2000
SIZE = 8 << 20


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount a new XFS, which can share blocks between files."""
    directory = tmp_path_factory.mktemp("xfs")
    image, mounted = directory / "image", directory / "mounted"
    mounted.mkdir()
    with image.open("xb") as file:
        file.truncate(400 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mounted], check=True)
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def shared_bytes(path: Path) -> int:
    """Return how many bytes of a file are in blocks that it shares with another one."""
    with path.open("rb") as file:
        request = bytearray(
            FIEMAP.pack(0, (1 << 64) - 1, SYNC, 0, NUM_EXTENTS, 0)
            + bytes(EXTENT.size * NUM_EXTENTS)
        )
        fcntl.ioctl(file, FS_IOC_FIEMAP, request)
    num_extents = FIEMAP.unpack_from(request)[3]
    extents = (
        EXTENT.unpack_from(request, FIEMAP.size + EXTENT.size * index)
        for index in range(num_extents)
    )
    return sum(length for _at, _on_disk, length, _, _, flags, *_ in extents if flags & SHARED)


def make_tree(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "large").write_bytes(os.urandom(SIZE))
    os.link(directory / "large", directory / "linked")
    (directory / "small").write_bytes(b"small")
    with (directory / "sparse").open("xb") as file:
        file.truncate(SIZE)
        file.seek(4 << 20)
        file.write(b"content")
    return directory


def check_cloned(store: CopiedStore, tree: Path, *, is_cloned: bool) -> None:
    assert store.run("verify").lines[0].endswith("failures: 0")
    directory = Path(store.uri.removeprefix("lmdb://"))
    files = [path for path in (directory / "blobs").rglob("*") if path.is_file()]
    # The file with two names is there once.
    assert len(files) == 2
    (large,) = (path for path in files if path.read_bytes() == (tree / "large").read_bytes())
    assert shared_bytes(large) == (SIZE if is_cloned else 0)
    assert [path for path in (directory / "tmp").rglob("*") if path.is_file()] == []


def test_an_import_clones(xfs: Path) -> None:
    tree = make_tree(xfs / "import" / "tree")
    import_tree(xfs / "import" / "store", tree)
    check_cloned(CopiedStore(f"lmdb://{xfs}/import/store"), tree, is_cloned=True)


def test_a_copy_clones(xfs: Path) -> None:
    tree = make_tree(xfs / "copy" / "tree")
    nix = Nix(xfs / "copy" / "root")
    nix.root.mkdir()
    path = nix.text("nix-store", "--add", tree)
    store = CopiedStore(f"lmdb://{xfs}/copy/store")
    store.run("copy", "--from", nix.uri, path)
    check_cloned(store, tree, is_cloned=True)


def test_other_file_systems_get_copies(xfs: Path, tmp_path: Path) -> None:
    # The store is on another file system than the tree.
    tree = make_tree(xfs / "other" / "tree")
    nix = Nix(xfs / "other" / "root")
    nix.root.mkdir()
    path = nix.text("nix-store", "--add", tree)
    copied = CopiedStore(f"lmdb://{tmp_path}/copied")
    copied.run("copy", "--from", nix.uri, path)
    check_cloned(copied, tree, is_cloned=False)
    import_tree(tmp_path / "imported", tree)
    check_cloned(CopiedStore(f"lmdb://{tmp_path}/imported"), tree, is_cloned=False)
