"""Trees that are wide, deep or large."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.importer.importer import import_paths
from appliance.nar.writer import NarWriter
from tests.fakes.peak_memory import measure_memory
from tests.importer.trees import Silent, import_command, make_sparse, nix_path
from tests.store.audit import audit

DEPTH = 300
LONG_NAME = "directory-with-a-long-name"
BOTTOM = b"at the bottom"
MEMORY_LIMIT_BYTES = 200 << 20


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A tree with paths longer than the kernel, and Nix, take at once."""
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


@pytest.mark.slow
def test_directory_of_50000_entries_is_imported(tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(50_000):
        (wide / f"{number:x}").write_bytes(b"%d" % (number % 1000))
    (path,) = import_paths(tmp_path / "store", [wide], progress=Silent())
    assert path == nix_path(wide, tmp_path / "nix")
    found = audit(tmp_path / "store")
    assert found.num_blobs == 1000


@pytest.mark.slow
def test_file_larger_than_memory_allows_is_streamed(tmp_path: Path) -> None:
    make_sparse(tmp_path / "large", 512 << 20)
    command = import_command(tmp_path / "store", tmp_path / "large")
    measured = measure_memory(command)
    assert measured.output.endswith("-large\n")
    assert measured.memory_bytes < MEMORY_LIMIT_BYTES
