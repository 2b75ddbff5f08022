"""A store of a million files next to one of ten thousand."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.fakes.mounted import Mounted
from tests.fs.guest import add_path, basename

pytestmark = pytest.mark.slow

FILES_PER_DIRECTORY: Final = 1000
SMALL: Final = 10_000
BIG: Final = 1_000_000
DIRECTORIES_PER_COMMIT: Final = 50
LOOKUPS: Final = 10_000
ROUNDS_MAX: Final = 12


def fill(path: Path, num_files: int) -> None:
    """Put a tree of so many different files into a new store."""
    store = Store.open(path, create=True)
    children = []
    batch = Batch()
    for number in range(num_files // FILES_PER_DIRECTORY):
        files = []
        for index in range(FILES_PER_DIRECTORY):
            content = b"%d/%d" % (number, index)
            digest = Digest.of(content)
            batch.add_blob(digest, content)
            files.append(FileNode(b"f%03d" % index, digest, len(content), executable=False))
        directory = Directory([], files, [])
        batch.add_directory(directory.digest(), directory.to_bytes())
        children.append(DirectoryNode(b"d%04d" % number, directory.digest(), directory.size()))
        if number % DIRECTORIES_PER_COMMIT == 0:
            store.commit(batch)
            batch = Batch()
    tree = Directory(children, [], [])
    batch.add_directory(tree.digest(), tree.to_bytes())
    add_path(batch, "tree", DirectoryNode(b"", tree.digest(), tree.size()))
    store.commit(batch)
    store.close()


class Measured:
    """One mounted store, each directory of which was listed once."""

    def __init__(self, store: Path, path: Path, num_files: int) -> None:
        path.mkdir()
        start_s = time.perf_counter()
        self.mounted = Mounted(store, path, "--threads=1")
        self.mount_s = time.perf_counter() - start_s
        self.root = path / os.fsdecode(basename("tree"))
        names = [f"d{d:04}" for d in range(num_files // FILES_PER_DIRECTORY)]
        self.directories = [self.root / name for name in names]
        for directory in self.directories:
            assert len(list(directory.iterdir())) == FILES_PER_DIRECTORY

    def lookup_s(self, chance: random.Random) -> float:
        """Return the mean time of lookups that the kernel does not remember."""
        # None twice: the second time the kernel would know.
        numbers = chance.sample(range(len(self.directories) * FILES_PER_DIRECTORY), LOOKUPS)
        paths = [
            f"{self.directories[n // FILES_PER_DIRECTORY]}/f{n % FILES_PER_DIRECTORY:03}"
            for n in numbers
        ]
        Path("/proc/sys/vm/drop_caches").write_text("2")
        for directory in self.directories:
            directory.lstat()
        start_s = time.perf_counter()
        for path in paths:
            os.lstat(path)
        return (time.perf_counter() - start_s) / LOOKUPS

    def anonymous_kib(self) -> int:
        """Return the memory of the worker that is not a file's: the maps are the page cache's."""
        (pid,) = self.mounted.worker_pids()
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1])
        raise AssertionError(pid)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Measured, Measured]]:
    directory = tmp_path_factory.mktemp("stores")
    fill(directory / "small", SMALL)
    fill(directory / "big", BIG)
    small = Measured(directory / "small", directory / "small-mnt", SMALL)
    with small.mounted:
        big = Measured(directory / "big", directory / "big-mnt", BIG)
        with big.mounted:
            yield small, big


def test_a_million_files_are_mounted_in_a_second(measured: tuple[Measured, Measured]) -> None:
    _small, big = measured
    print(f"mount {big.mount_s:.2f} s")
    assert big.mount_s < 1


def test_a_lookup_costs_no_more_in_a_big_store(measured: tuple[Measured, Measured]) -> None:
    small, big = measured
    chance = random.Random(1)
    small_s = big_s = float("inf")
    # Turn by turn, the best of each: the machine has other things to do.
    for _ in range(ROUNDS_MAX):
        small_s = min(small_s, small.lookup_s(chance))
        big_s = min(big_s, big.lookup_s(chance))
        print(f"lookup {small_s * 1e6:.1f} us of {SMALL} files, {big_s * 1e6:.1f} us of {BIG}")
        if big_s < 1.5 * small_s:
            return
    pytest.fail("a lookup takes 1.5 times as long in the big store")


def test_a_worker_needs_no_more_memory_for_a_big_store(
    measured: tuple[Measured, Measured],
) -> None:
    small, big = measured
    print(f"anonymous memory {small.anonymous_kib()} KiB, {big.anonymous_kib()} KiB")
    assert big.anonymous_kib() < small.anonymous_kib() + (4 << 10)
