"""Measures reads of a daemon's content: a cold walk over small files, and one large file.

`python -m tests.remote.bench`: 2,000 files of a few KiB, read whole through a mount, in the order
of the directories, beside the same over a local store, and the same over a link of 50 Mbit/s and
20 ms, beside what such a link takes at least: the bytes at its bandwidth, and a round trip for each
level. Then a file of 1 GiB: the first 4 KiB, and all of it in order, with the most memory that any
process had. At last, an import of more small files into the daemon beside one into a local store.
Each figure is the best of ROUNDS, each round with a new index and a new cache. Root only. Status 1
names a broken bound.
"""

import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.mounted import Mounted
from tests.fakes.peak_memory import peak_bytes, with_children
from tests.fakes.slow_link import SlowLink

ROUNDS: Final = 3
NUM_FILES: Final = 2000
# Files in a directory -> how many times as long as with a local store it may take.
SHAPES: Final = {20: 15.0, 500: 15.0}
MIB: Final = 1 << 20
LARGE_BYTES: Final = 1 << 30
FIRST_MOST_S: Final = 0.3
IN_ORDER_LEAST_MIB_S: Final = 200.0
MEMORY_MOST_MIB: Final = 200.0
DELAY_S: Final = 0.01
BYTES_PER_S: Final = 50e6 / 8
# Parts of the segments that are lost -> how many times as long as the link takes at least.
LOSSES: Final = {0.0: 3.0, 0.01: 3.0}
# How many times as long an import into the daemon may take as a local one.
IMPORT_MOST: Final = 3.0
IMPORTED: Final = 3
# The path, its root, a directory in it, a file in that.
DEPTH: Final = 4


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


# --- A large file ---


class Large(NamedTuple):
    """Time to the first 4 KiB, rate of all of it, and memory of the largest process."""

    first_s: float
    in_order_mib_s: float
    memory_mib: float


def read_large(daemon: DaemonProcess, base: str, directory: Path) -> Large:
    path = directory / "mnt"
    path.mkdir(exist_ok=True)
    with Mounted(daemon.unix_uri, path, f"--state-dir={directory}/state") as mounted:
        began_s = time.perf_counter()
        fd = os.open(path / base / "large", os.O_RDONLY)
        os.pread(fd, 4096, 0)
        first_s = time.perf_counter() - began_s
        began_s = time.perf_counter()
        num_bytes = 0
        while piece := os.read(fd, MIB):
            num_bytes += len(piece)
        in_order_s = time.perf_counter() - began_s
        os.close(fd)
        assert num_bytes == LARGE_BYTES
        pids = [*with_children(mounted.process.pid), daemon.process.pid]
        memory_mib = max(map(peak_bytes, pids)) / MIB
    shutil.rmtree(directory / "state")
    return Large(first_s, LARGE_BYTES / MIB / in_order_s, memory_mib)


def bench_large(directory: Path) -> list[str]:
    """Print the figures for a file of 1 GiB; return a line for each bound that is broken."""
    directory.mkdir()
    (directory / "tree").mkdir()
    with (directory / "tree" / "large").open("wb") as file:
        for _ in range(LARGE_BYTES // MIB):
            file.write(os.urandom(MIB))
    store = f"lmdb://{directory}/store"
    (base,) = import_tree(store, directory / "tree")
    with DaemonProcess(store, directory / "daemon") as daemon:
        found = [read_large(daemon, base, directory) for _ in range(ROUNDS)]
    best = Large(*map(min, zip(*found, strict=True)))._replace(
        in_order_mib_s=max(large.in_order_mib_s for large in found)
    )
    print(
        f"1 GiB over grpc+unix, cold: first 4 KiB after {best.first_s:.3f} s, "
        f"in order {best.in_order_mib_s:.0f} MiB/s, largest process {best.memory_mib:.0f} MiB"
    )
    broken = []
    if best.first_s > FIRST_MOST_S:
        broken.append(f"first 4 KiB: {best.first_s:.3f} s, not {FIRST_MOST_S} s")
    if best.in_order_mib_s < IN_ORDER_LEAST_MIB_S:
        broken.append(f"in order: {best.in_order_mib_s:.0f} MiB/s, not {IN_ORDER_LEAST_MIB_S:.0f}")
    if best.memory_mib > MEMORY_MOST_MIB:
        broken.append(f"memory: {best.memory_mib:.0f} MiB, not {MEMORY_MOST_MIB:.0f}")
    return broken


def bench_link(directory: Path, loss: float) -> float:
    """Print the figures for a link; return the ratio to what the link takes at least."""
    directory.mkdir()
    make_tree(directory / "tree", 20)
    local = f"lmdb://{directory}/store"
    (base,) = import_tree(local, directory / "tree")
    num_bytes = sum(path.stat().st_size for path in (directory / "tree").rglob("*/*"))
    least_s = num_bytes / BYTES_PER_S + 2 * DELAY_S * DEPTH
    listen = "127.0.0.1:7001"
    with (
        DaemonProcess(local, directory / "daemon") as daemon,
        SlowLink(listen, daemon.tcp, delay_s=DELAY_S, bytes_per_s=BYTES_PER_S, loss=loss),
    ):
        cold = cold_s(f"grpc+http://{listen}", base, directory)
    print(
        f"{NUM_FILES} small files, {num_bytes / 1e6:.1f} MB, over 50 Mbit/s, 20 ms, {loss:.0%} "
        f"lost, cold: {cold:.2f} s, the link takes {least_s:.2f} s, ratio {cold / least_s:.1f}"
    )
    return cold / least_s


def bench_import(directory: Path) -> float:
    """Print the figures of imports; return the best ratio of one into the daemon to a local one."""
    directory.mkdir()
    for number in range(IMPORTED):
        make_tree(directory / "tree" / str(number), 20)
    pairs = []
    for number in range(ROUNDS):
        place = directory / str(number)
        place.mkdir()
        local_s = import_s(f"lmdb://{place}/local", directory / "tree")
        with DaemonProcess(f"lmdb://{place}/store", place / "daemon") as daemon:
            pairs.append((local_s, import_s(daemon.unix_uri, directory / "tree")))
    local_s, daemon_s = min(pairs, key=lambda pair: pair[1] / pair[0])
    print(
        f"import of {IMPORTED * NUM_FILES} small files: local {local_s:.2f} s, into a daemon over "
        f"grpc+unix {daemon_s:.2f} s, ratio {daemon_s / local_s:.1f}"
    )
    return daemon_s / local_s


def import_s(store: str, tree: Path) -> float:
    start_s = time.perf_counter()
    import_tree(store, tree)
    return time.perf_counter() - start_s


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="remote-bench-"))
    broken = []
    try:
        ratio = bench_import(directory / "import")
        if ratio > IMPORT_MOST:
            broken.append(f"import into a daemon: {ratio:.1f}, not {IMPORT_MOST:.1f}")
        for loss, most in LOSSES.items():
            ratio = bench_link(directory / f"link-{loss}", loss)
            if ratio > most:
                broken.append(f"walk over a link with {loss:.0%} lost: {ratio:.1f}, not {most:.1f}")
        for files_in_directory, most in SHAPES.items():
            ratio = bench(directory / str(files_in_directory), files_in_directory)
            if ratio > most:
                broken.append(f"{files_in_directory} in a directory: {ratio:.1f}, not {most:.1f}")
        broken += bench_large(directory / "large")
    finally:
        shutil.rmtree(directory)
    sys.exit("\n".join(broken) or 0)


if __name__ == "__main__":
    main()
