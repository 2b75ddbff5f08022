"""Measures a mount beside squashfuse and the original directory: python -m tests.mount.bench [TREE]

All are measured on one tree, in turns, and each figure is the best of ROUNDS. Without TREE, a tree
is made. Only root can run this, because it empties the page cache before each cold run. CPU is that
of the server's processes, user and system. The rows of the README are recorded. Status 1 names what
is short of its target.
"""

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted, is_mounted
from tests.fakes.running_command import every_event
from tools import bench_table

ROUNDS: Final = 5
RANDOM_READS: Final = 20_000
LARGE: Final = "large"
_LARGE_BYTES: Final = 512 << 20
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


class Figure(NamedTuple):
    seconds: float
    cpu_s: float


class Subject(NamedTuple):
    """A mounted tree and the processes that serve it."""

    name: str
    tree: Path
    pids: Callable[[], list[int]]


def make_tree(tree: Path, chance: random.Random) -> None:
    """Make 10,000 small files in 1,000 directories, and one of 512 MiB."""
    words = [chance.randbytes(5).hex() for _ in range(2000)]
    directories = [tree]
    tree.mkdir()
    for number in range(1000):
        directories.append(chance.choice(directories) / f"directory-{number}")
        directories[-1].mkdir()
    for number in range(10_000):
        count = int(chance.lognormvariate(6, 1.5)) % 20_000
        text = " ".join(chance.choices(words, k=count))
        (chance.choice(directories) / f"file-{number}.txt").write_text(text)
    with (tree / LARGE).open("wb") as file:
        for _ in range(_LARGE_BYTES >> 20):
            file.write(os.urandom(1 << 20))


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def shell(command: str) -> Callable[[Path], None]:
    def run(tree: Path) -> None:
        subprocess.run(["bash", "-c", f"{command} >/dev/null"], cwd=tree, check=True)

    return run


def read_randomly(tree: Path) -> None:
    """Read 4 KiB pieces all over the large file; no readahead, no piece twice."""
    fd = os.open(tree / LARGE, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    pages = os.fstat(fd).st_size >> 12
    for page in random.Random(1).sample(range(pages), min(RANDOM_READS, pages)):
        assert os.pread(fd, 4096, page << 12)
    os.close(fd)


_TAR: Final = shell(f"tar -c --exclude=./{LARGE} . | cat")
_CAT: Final = shell(f"cat {LARGE}")
FIND: Final = "cold find -ls"
TAR: Final = "cold tar"
WARM_TAR: Final = "warm tar"
RANDOM: Final = "random 4 KiB"
READ: Final = "cold sequential"
# name, whether the caches are emptied first, what is done
WORKLOADS: Final = (
    (FIND, True, shell("find . -ls")),
    (TAR, True, _TAR),
    (WARM_TAR, False, _TAR),
    (RANDOM, True, read_randomly),
    (READ, True, _CAT),
    ("warm sequential", False, _CAT),
)
# workload, subject, to what its time is compared, the largest ratio
TARGETS: Final = (
    (FIND, "mount", "squashfuse", 0.12),
    (TAR, "mount", "squashfuse", 0.12),
    (WARM_TAR, "mount", "squashfuse", 1.0),
    (WARM_TAR, "mount", "squashfuse-stored", 1.0),
    (RANDOM, "mount", "squashfuse", 1 / 0.9),
    (READ, "passthrough", "original", 1 / 0.9),
)
RANDOM_CPU: Final = 0.5


def cpu_s(pids: list[int]) -> float:
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def measure(subject: Subject, *, is_cold: bool, work: Callable[[Path], None]) -> Figure:
    if is_cold:
        drop_caches()
    pids = subject.pids()
    cpu_before_s, start_s = cpu_s(pids), time.perf_counter()
    work(subject.tree)
    return Figure(time.perf_counter() - start_s, cpu_s(pids) - cpu_before_s)


@contextlib.contextmanager
def squashfuse(name: str, tree: Path, directory: Path, *options: str) -> Iterator[Subject]:
    image, path = directory / f"{name}.image", directory / name
    path.mkdir()
    command = ["mksquashfs", str(tree), str(image), "-quiet", "-no-progress", *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(["squashfuse", "-f", str(image), str(path)])
    try:
        for _ in every_event(30):
            if is_mounted(path):
                break
        yield Subject(name, path, lambda: [process.pid])
    finally:
        subprocess.run(["umount", path], check=True)
        process.wait(30)


@contextlib.contextmanager
def ours(name: str, store: Path, base: str, directory: Path, *options: str) -> Iterator[Subject]:
    path = directory / name
    path.mkdir()
    with Mounted(store, path, *options) as mounted:
        pids = [mounted.process.pid, *mounted.worker_pids()]
        yield Subject(name, path / base, lambda: pids)


def report(name: str, best: dict[str, Figure]) -> None:
    original = best["original"]
    print(f"\n{name:<24}{'seconds':>9}{'server CPU':>12}{'of original':>13}")
    for subject, figure in best.items():
        share = original.seconds / figure.seconds
        print(f"  {subject:<22}{figure.seconds:>9.3f}{figure.cpu_s:>12.2f}{share:>13.2f}")


def short_of(results: dict[str, dict[str, Figure]]) -> Iterator[str]:
    """Yield each target that is not reached, by the seconds of `results[workload][subject]`."""
    for workload, subject, to, most in TARGETS:
        if workload in results:
            found = results[workload][subject].seconds / results[workload][to].seconds
            print(f"{workload}: {subject} / {to}: {found:.2f}")
            if found > most:
                yield f"short: {workload}: {subject} / {to}: {found:.2f}, target {most:.2f}"
    if RANDOM in results:
        cpu = results[RANDOM]["mount"].cpu_s / results[RANDOM]["squashfuse"].cpu_s
        if cpu > RANDOM_CPU:
            yield f"short: {RANDOM}: CPU of mount / squashfuse: {cpu:.2f}, target {RANDOM_CPU:.2f}"


def rows(results: dict[str, dict[str, Figure]]) -> bench_table.Rows:
    """Return the rows of the README for the workloads that were measured."""

    def ratio(workload: str, subject: str, to: str) -> float:
        return results[workload][subject].seconds / results[workload][to].seconds

    def cpu_ratio(workload: str, subject: str, to: str) -> float:
        return results[workload][subject].cpu_s / results[workload][to].cpu_s

    found: bench_table.Rows = {}
    if FIND in results and TAR in results:
        to_squashfuse, to_original = (
            " and ".join(f"{ratio(work, 'mount', to):.2f}" for work in (FIND, TAR))
            for to in ("squashfuse", "original")
        )
        found[bench_table.MOUNT_WALKS] = (
            f"{to_squashfuse} of its time; {to_original} of that of the directory itself",
        )
    if RANDOM in results:
        ours, through = (
            f"{ratio(RANDOM, name, 'squashfuse'):.2f} of its time and "
            f"{cpu_ratio(RANDOM, name, 'squashfuse'):.2f} of its CPU"
            for name in ("mount", "passthrough")
        )
        found[bench_table.MOUNT_RANDOM] = (f"{ours}; with `--passthrough` {through}",)
    if READ in results:
        found[bench_table.MOUNT_SEQUENTIAL] = (
            f"{ratio(READ, 'passthrough', 'original'):.2f} of its time",
        )
    return found


def bench(tree: Path, directory: Path, names: list[str]) -> list[str]:
    results: dict[str, dict[str, Figure]] = {}
    (base,) = import_tree(directory / "store", tree)
    with contextlib.ExitStack() as stack:
        plain = ("-noI", "-noD", "-noF", "-noX")
        subjects = [
            Subject("original", tree, list),
            *map(
                stack.enter_context,
                [
                    squashfuse("squashfuse", tree, directory),
                    squashfuse("squashfuse-stored", tree, directory, *plain),
                    ours("mount", directory / "store", base, directory),
                    ours("passthrough", directory / "store", base, directory, "--passthrough"),
                ],
            ),
        ]
        for name, is_cold, work in WORKLOADS:
            if name not in names:
                continue
            best = results[name] = {}
            for _ in range(ROUNDS):
                for subject in subjects:
                    figure = measure(subject, is_cold=is_cold, work=work)
                    best[subject.name] = min(figure, best.get(subject.name, figure))
            report(name, best)
    bench_table.record("mount", rows(results))
    return list(short_of(results))


def main() -> None:
    all_names = [name for name, _is_cold, _work in WORKLOADS]
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", nargs="?", type=Path)
    parser.add_argument("--only", action="append", choices=all_names, help="may be repeated")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="mount-bench-"))
    try:
        tree = options.tree.absolute() if options.tree else directory / "tree"
        if not options.tree:
            make_tree(tree, random.Random(1))
        if not (tree / LARGE).is_file():
            sys.exit(f"{tree} has no file {LARGE!r} to be read sequentially")
        short = bench(tree, directory, options.only or all_names)
    finally:
        shutil.rmtree(directory)
    sys.exit("\n".join(short) or 0)


if __name__ == "__main__":
    main()
