"""How long a collection takes, and what it costs readers.

Run `python -m tests.collector.bench_collection [BLOBS [PATHS]]`, by default with 1,000,000 blobs in
5,000 paths. The store is written directly, in a temporary directory below BENCH_DIR.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.castore.size_dialect import DEFAULT_DIALECT
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import StorePath, nar_path
from appliance.store.batch import Batch
from appliance.store.root_lists import RootLists
from appliance.store.store import Store
from tests.fakes.running_command import APPLIANCE

_FILES_PER_DIRECTORY = 10
_PATHS_PER_COMMIT = 50
_BLOB_SIZE = 120


class Run(NamedTuple):
    """One run of a command.

    Args:
        took_s: seconds, with the start of the program.
        anonymous_bytes: the peak of what the process itself holds (RssAnon in proc(5)), sampled
            fifty times a second.
        peak_bytes: the peak of all that was resident (VmHWM): also pages of the store, of which the
            page cache has one copy for all processes, and of the program.
    """

    took_s: float
    anonymous_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.took_s:.1f} s, {self.anonymous_bytes >> 20} MiB of its own memory, "
            f"{self.peak_bytes >> 20} MiB with pages of files"
        )


def fill(path: Path, num_blobs: int, num_paths: int) -> list[StorePath]:
    """Write a store with `num_blobs` different blobs, spread evenly over `num_paths` paths."""
    store = Store.open(path, create=True, is_durable=False)
    made = []
    for first in range(0, num_paths, _PATHS_PER_COMMIT):
        batch = Batch()
        numbers = range(first, min(first + _PATHS_PER_COMMIT, num_paths))
        made += [_add_path(batch, number, num_blobs // num_paths) for number in numbers]
        store.commit(batch)
    store.close()
    return made


def _add_path(batch: Batch, number: int, num_blobs: int) -> StorePath:
    directories = []
    for start in range(0, num_blobs, _FILES_PER_DIRECTORY):
        files = []
        for at in range(start, min(start + _FILES_PER_DIRECTORY, num_blobs)):
            data = (b"%d %d " % (number, at)).ljust(_BLOB_SIZE, b".")
            digest = Digest.of(data)
            batch.add_blob(digest, data)
            files.append(FileNode(b"%06d" % at, digest, len(data), executable=False))
        below = Directory(files=files)
        batch.add_directory(below.digest(), below.to_bytes())
        size = below.size(DEFAULT_DIALECT)
        directories.append(DirectoryNode(b"%06d" % start, below.digest(), size))
    top = Directory(directories=directories)
    batch.add_directory(top.digest(), top.to_bytes())
    path = nar_path(Digest.of(b"%d" % number), f"path{number}")
    root = DirectoryNode(b"", top.digest(), top.size(DEFAULT_DIALECT))
    info = encode_nar_addressed(path, root, nar_size=1, nar_sha256=bytes(32))
    batch.add_path_info(path.digest, info)
    return path


_RUN = """
import re, sys, threading
from pathlib import Path
sys.argv = sys.argv[1:]
from appliance.cli.main import main

def figure(name):
    return int(re.search(rf"{name}:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

def sample():
    global most
    while not is_done.wait(0.02):
        most = max(most, figure("RssAnon"))

is_done = threading.Event()
most = 0
sampling = threading.Thread(target=sample)
sampling.start()
try:
    main(sys.argv)
finally:
    is_done.set()
    sampling.join()
    print("RssAnon", max(most, figure("RssAnon")), file=sys.stderr)
    print("VmHWM", figure("VmHWM"), file=sys.stderr)
"""


def run_gc(store: Path, *options: str) -> Run:
    """Run `appliance gc`, and measure it."""
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "gc", "--store", f"lmdb://{store}", *options],
        check=True,
        capture_output=True,
        text=True,
    )
    took_s = time.monotonic() - started_s
    print(done.stdout, end="")
    figures = dict(re.findall(r"(RssAnon|VmHWM) (\d+)", done.stderr))
    return Run(took_s, int(figures["RssAnon"]) * 1024, int(figures["VmHWM"]) * 1024)


class Reads(NamedTuple):
    """How long single reads took, in seconds."""

    median_s: float
    p99_s: float


def reads_until(store: Store, paths: list[StorePath], stopping: threading.Event) -> Reads:
    """Look paths and their Directories up, one after the other, until `stopping` is set."""
    from appliance.nix.path_info import read_path_info  # noqa: PLC0415 - as each read does

    took = []
    while not stopping.is_set():
        for path in paths:
            started_s = time.monotonic()
            with store.snapshot() as snapshot:
                encoded = snapshot.path_info(path.digest)
                assert encoded is not None
                node = read_path_info(encoded).node
                assert isinstance(node, DirectoryNode)
                assert snapshot.image(node.digest) is not None
            took.append(time.monotonic() - started_s)
            if stopping.is_set():
                break
    return Reads(statistics.median(took), statistics.quantiles(took, n=100)[98])


def reads_beside(store_path: Path, paths: list[StorePath], command: list[str]) -> Reads:
    """Read while `command` runs."""
    stopping = threading.Event()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def wait() -> None:
        child.wait()
        stopping.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    store = Store.open(store_path, is_readonly=True)
    try:
        return reads_until(store, paths, stopping)
    finally:
        store.close()
        waiting.join()
        assert child.returncode == 0


def readers_cost(store: Path, paths: list[StorePath]) -> tuple[Reads, Reads]:
    """Return reads beside a process that only computes, and beside a sweep of half of the paths."""
    kept = paths[::2]
    RootLists(store).add("kept", kept)
    gc = [*APPLIANCE, "gc", "--store", f"lmdb://{store}", "--grace", "0"]
    return reads_beside(store, kept, [*gc, "--dry-run"]), reads_beside(store, kept, gc)


def main() -> None:
    num_blobs, num_paths = (int(word) for word in [*sys.argv[1:], "1000000", "5000"][:2])
    directory = Path(tempfile.mkdtemp(prefix="bench-gc-", dir=os.environ.get("BENCH_DIR")))
    try:
        started_s = time.monotonic()
        paths = fill(directory / "store", num_blobs, num_paths)
        print(
            f"{num_blobs} blobs in {num_paths} paths written: {time.monotonic() - started_s:.0f} s"
        )
        store = directory / "store"
        limited = run_gc(store, "--dry-run", "--grace", "0", "--max-freed", "1T")
        print(f"gc --dry-run --max-freed, all of it dead: {limited}")
        for words, roots in (
            ("all of it dead", []),
            ("half of it live", paths[::2]),
            ("all of it live", paths),
        ):
            if roots:
                RootLists(store).add("some", roots)
            print(f"gc --dry-run, {words}: {run_gc(store, '--dry-run', '--grace', '0')}")
        RootLists(store).remove("some")
        alone, swept = readers_cost(directory / "store", paths)
        print(
            f"reads beside --dry-run: median {alone.median_s * 1e6:.0f} us, p99 "
            f"{alone.p99_s * 1e6:.0f} us; beside a sweep of half: median "
            f"{swept.median_s * 1e6:.0f} us, p99 {swept.p99_s * 1e6:.0f} us "
            f"({swept.p99_s / alone.p99_s:.2f} times)"
        )
    finally:
        subprocess.run(["rm", "-rf", directory], check=True)


if __name__ == "__main__":
    main()
