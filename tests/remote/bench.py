"""Measures a cold walk over small files at a daemon beside one over a local store.

`python -m tests.remote.bench`: 2,000 files of a few KiB, read whole through a mount, in the order
of the directories; each figure the best of ROUNDS, each round with a new index and a new cache.
Root only. Status 1 names a broken bound.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.mounted import Mounted

ROUNDS: Final = 3
NUM_FILES: Final = 2000
# Files in a directory -> how many times as long as with a local store it may take.
SHAPES: Final = {20: 15.0, 500: 15.0}


def make_tree(tree: Path, files_in_directory: int) -> None:
    chance = random.Random(1)
    for number in range(NUM_FILES):
        directory = tree / f"{number // files_in_directory:03}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number:05}").write_bytes(chance.randbytes(chance.randrange(500, 8000)))


def read_all(tree: Path) -> float:
    """Return the seconds it takes to read every file once."""
    start_s = time.perf_counter()
    num_files = 0
    for directory, _, names in os.walk(tree):
        for name in sorted(names):
            num_files += bool((Path(directory) / name).read_bytes())
    assert num_files == NUM_FILES
    return time.perf_counter() - start_s


def cold_s(store: str, base: str, directory: Path) -> float:
    best_s = float("inf")
    for _ in range(ROUNDS):
        path = directory / "mnt"
        path.mkdir()
        with Mounted(store, path, f"--state-dir={directory}/state"):
            best_s = min(best_s, read_all(path / base))
        path.rmdir()
        shutil.rmtree(directory / "state")
    return best_s


def bench(directory: Path, files_in_directory: int) -> float:
    """Print the figures for one shape of tree; return the ratio of remote to local."""
    directory.mkdir()
    make_tree(directory / "tree", files_in_directory)
    local = f"lmdb://{directory}/store"
    (base,) = import_tree(local, directory / "tree")
    local_s = cold_s(local, base, directory)
    with DaemonProcess(local, directory / "daemon") as daemon:
        remote_s = cold_s(daemon.unix_uri, base, directory)
    per_file = [f"{seconds / NUM_FILES * 1e3:.2f} ms" for seconds in (local_s, remote_s)]
    print(
        f"{NUM_FILES} small files, {files_in_directory} in a directory, cold: "
        f"local {per_file[0]} each, over grpc+unix {per_file[1]}, ratio {remote_s / local_s:.1f}"
    )
    return remote_s / local_s


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="remote-bench-"))
    broken = []
    try:
        for files_in_directory, most in SHAPES.items():
            ratio = bench(directory / str(files_in_directory), files_in_directory)
            if ratio > most:
                broken.append(f"{files_in_directory} in a directory: {ratio:.1f}, not {most:.1f}")
    finally:
        shutil.rmtree(directory)
    sys.exit("\n".join(broken) or 0)


if __name__ == "__main__":
    main()
