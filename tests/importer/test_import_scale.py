"""Trees that are wide, deep or large."""

import hashlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from appliance.castore.directory import DirectoryNode
from appliance.errors import ImportTreeError
from appliance.importer.importer import import_paths
from appliance.nix.nar import NarWriter
from appliance.store.store import Store
from tests.fakes.peak_memory import measure_memory
from tests.importer.trees import Silent, import_command, make_sparse, nix_path, small_disk
from tests.store.audit import audit

pytestmark = pytest.mark.slow

DEPTH = 300
LONG_NAME = "directory-with-a-long-name"
BOTTOM = b"at the bottom"
MEMORY_LIMIT_BYTES = 200 << 20


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A tree with paths longer than the kernel and Nix accept."""
    top = tmp_path / "deep"
    top.mkdir()
    dir_fd = os.open(top, os.O_RDONLY)
    for _ in range(DEPTH):
        os.symlink("target", "link", dir_fd=dir_fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=dir_fd))
        os.mkdir(LONG_NAME, dir_fd=dir_fd)
        below = os.open(LONG_NAME, os.O_RDONLY, dir_fd=dir_fd)
        os.close(dir_fd)
        dir_fd = below
    fd = os.open("bottom", os.O_CREAT | os.O_WRONLY, 0o755, dir_fd=dir_fd)
    os.write(fd, BOTTOM)
    os.close(fd)
    os.close(dir_fd)
    yield top
    subprocess.run(["rm", "-r", top], check=True)


def deep_nar_sha256() -> bytes:
    sha256 = hashlib.sha256()
    nar = NarWriter(sha256.update)
    for _ in range(DEPTH):
        nar.directory()
        nar.entry(LONG_NAME.encode())
    nar.directory()
    nar.entry(b"bottom")
    nar.file(BOTTOM, executable=True)
    nar.end_directory()
    for _ in range(DEPTH):
        nar.entry(b"file")
        nar.file(b"", executable=False)
        nar.entry(b"link")
        nar.symlink(b"target")
        nar.end_directory()
    nar.finish()
    return sha256.digest()


def test_deep_tree_with_long_paths_is_imported(tmp_path: Path, deep: Path) -> None:
    (path,) = import_paths(tmp_path / "store", [deep], progress=Silent())
    found = audit(tmp_path / "store")
    assert found.num_directories == DEPTH + 1
    (info,) = found.path_infos
    assert info.path.absolute() == path
    assert info.nar_sha256 == deep_nar_sha256()


def test_directory_of_50000_entries_is_imported(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(50_000):
        (wide / f"{number:x}").write_bytes(b"%d" % (number % 1000))
    (path,) = import_paths(tmp_path / "store", [wide], progress=Silent())
    assert path == nix_path(wide, tmp_path / "nix")
    found = audit(tmp_path / "store")
    assert found.num_blobs == 1000


def test_directory_of_a_million_entries_takes_little_memory(tmp_path: Path) -> None:
    # In memory, where making and removing them takes little time.
    with small_disk(tmp_path / "disk", "2g,nr_inodes=2m") as disk:
        make_symlinks(disk / "wide", 1_000_000, b"t")
        measured = measure_memory(import_command(disk / "store", disk / "wide"))
    assert measured.output.endswith("-wide\n")
    assert measured.memory_bytes < MEMORY_LIMIT_BYTES


def make_symlinks(directory: Path, num: int, target: bytes) -> None:
    directory.mkdir(parents=True)
    dir_fd = os.open(directory, os.O_RDONLY)
    for number in range(num):
        os.symlink(target, b"%07x" % number, dir_fd=dir_fd)
    os.close(dir_fd)


# 4,000 such entries make about 15.4 MiB.
LONG_TARGET = b"t" * 4030


def test_directory_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_symlinks(tree / "large", 4200, LONG_TARGET)
    (tree / "file").write_bytes(b"content")
    with pytest.raises(ImportTreeError) as caught:
        list(import_paths(tmp_path / "store", [tree], progress=Silent()))
    assert str(caught.value) == (
        f"{tree}/large: its 4200 entries make a Directory of more than 16 MiB, "
        "the most that can be served"
    )
    assert audit(tmp_path / "store").path_infos == []


def make_entries(directory: Path, kind: str) -> Iterator[Path]:
    for number in itertools.count():
        path = directory / f"{number:05}"
        match kind:
            case "files":
                path.touch()
            case "directories":
                path.mkdir()
            case "symlinks":
                path.symlink_to("t")
        yield path


@pytest.mark.parametrize("kind", ["files", "directories", "symlinks"])
def test_the_limit_is_that_of_the_encoding_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    num_entries = len([*itertools.islice(make_entries(tree, kind), 100)])
    run = partial(import_paths, tmp_path / "store", [tree], progress=Silent())
    (path,) = run()
    (info,) = audit(tmp_path / "store").path_infos
    assert isinstance(info.node, DirectoryNode)
    store = Store.open(tmp_path / "store", is_readonly=True)
    with store.snapshot() as snapshot:
        size = len(snapshot.directory(info.node.digest) or b"")
    store.close()
    for limit in (size, size - 1):
        monkeypatch.setattr("appliance.importer.walk.ENCODED_MAX", limit)
        monkeypatch.setattr("appliance.importer.tree.ENCODED_MAX", limit)
        monkeypatch.setattr("appliance.importer.tree.PEER_ENCODED_MAX", 0)
        if limit == size:
            assert list(run()) == [path]
        else:
            with pytest.raises(ImportTreeError, match=f"{tree}: its {num_entries} entries make"):
                list(run())


def test_directory_that_peers_may_not_receive_is_told_once(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("one", "two"):
        make_symlinks(tree / name, 1100, LONG_TARGET)
    warnings: list[str] = []
    list(import_paths(tmp_path / "store", [tree], progress=Silent(), warn=warnings.append))
    assert warnings == [
        f"{tree}/one: its 1100 entries make a Directory of more than 4 MiB, which only peers "
        "with a raised limit for gRPC messages receive"
    ]


def test_file_larger_than_memory_allows_is_streamed(tmp_path: Path) -> None:
    make_sparse(tmp_path / "large", 512 << 20)
    command = import_command(tmp_path / "store", tmp_path / "large")
    measured = measure_memory(command)
    assert measured.output.endswith("-large\n")
    assert measured.memory_bytes < MEMORY_LIMIT_BYTES
