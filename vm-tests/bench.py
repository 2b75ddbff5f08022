"""`make bench [TREE=dir] [ARGS=...]`: what an import and walks in guests cost, with their bounds.

Status 1 names a broken bound or what is short of a target, status 2 what could not be measured.
TREE is the running Python's standard library without site-packages unless given; for that, the rows
of the README are recorded.
"""

import argparse
import compileall
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmharness import guest_report, measure, tree
from vmharness.cache import PROJECT, HarnessError
from vmharness.guest import DeadlineExceeded, GuestLost
from vmharness.guest_bench import GuestBench
from vmharness.import_bench import LEAST_RUNS, bench_import
from vmharness.measure import Size
from vmharness.served import MACHINES

from tests.fakes.appliance_process import import_tree
from tools import bench_table


def main() -> int:
    """Measure, print; return the exit status."""
    parser = argparse.ArgumentParser(prog="make bench", allow_abbrev=False)
    parser.add_argument(
        "--guest", choices=MACHINES, action="append", help="default all; may be repeated"
    )
    parser.add_argument("--runs", type=int, default=LEAST_RUNS, metavar="N", help="default 5")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)  # with its `finally` clauses
    # as an installed program is; and nothing is compiled into a tree that is measured
    compileall.compile_dir(PROJECT / "appliance", quiet=2)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        with tempfile.TemporaryDirectory(prefix="appliance-bench-") as name:
            broken = _run(Path(name), options.guest or list(MACHINES), max(1, options.runs))
    except (HarnessError, GuestLost, DeadlineExceeded, AssertionError, OSError) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as exc:
        print(f"bench: {exc}\n{(exc.stderr or b'').decode()}", file=sys.stderr)
        return 2
    for each in broken:
        print(f"bench: {each}", file=sys.stderr)
    return 1 if broken else 0


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _run(directory: Path, machines: list[str], runs: int) -> list[str]:
    source = _source(directory)
    size = measure.size_of(source)
    print(
        f"Tree    {os.environ.get('TREE') or 'standard library'}: {size.files:,} files, "
        f"{size.directories:,} directories, {size.size_bytes / 1e6:,.1f} MB\n"
        f"Host    {len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, Linux {platform.release()}\n"
        f"Figures are medians of {runs} runs, [lowest .. highest]; MB = 10^6 bytes",
        flush=True,
    )
    return [
        *bench_import(source, size, directory, max(runs, LEAST_RUNS)),
        *_bench_guests(source, size, directory, machines, runs),
    ]


def _source(directory: Path) -> Path:
    given = os.environ.get("TREE")
    if given:
        source = Path(given).expanduser().resolve()
        if not source.is_dir():
            raise HarnessError(f"TREE={given} is not a directory")
        return source
    # a copy, because what was installed with pip lies inside and is no standard library
    library = Path(sysconfig.get_path("stdlib"))
    copy = directory / library.name
    ignore = shutil.ignore_patterns("site-packages", "dist-packages")
    shutil.copytree(library, copy, symlinks=True, ignore=ignore)
    os.sync()
    return copy


def _bench_guests(
    source: Path, size: Size, directory: Path, machines: list[str], runs: int
) -> list[str]:
    store = directory / "store"
    (name,) = import_tree(store, source)
    wanted = tree.tree_digest(tree.records(source, is_normalised=True))
    found = []
    for machine in machines:
        own = directory / machine
        own.mkdir()
        bench = GuestBench(source, size, store, name, own, machine)
        done = [bench.run(None if n else wanted) for n in range(runs)]
        found += guest_report.report(bench, done, size)
        if not os.environ.get("TREE"):
            bench_table.record(machine, guest_report.rows(bench, done, size))
    return found


if __name__ == "__main__":
    sys.exit(main())
