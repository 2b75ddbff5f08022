"""Cold walks by fake guests, and an import: `python -m tests.bench_walk [--before CHECKOUT]`.

With another checkout, in which `make venv` was run, both are measured in turns and the ratios are
printed: only those say something, as the machine is not quiet.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree

ROUNDS: Final = 5
NUM_DIRECTORIES: Final = 2_000
NUM_FILES: Final = 100  # in each
GUESTS: Final = (1, 8)
REPLY_BYTES: Final = 32 << 10
DIRECTORY_TYPE: Final = 4
LOOKUPS: Final = 20_000
BATCH: Final = 32


def make_wide_tree(path: Path) -> Path:
    """Make 200,000 small files in 2,040 directories."""
    for i in range(NUM_DIRECTORIES):
        below = path / f"{i // 50:03}" / f"{i:05}"
        below.mkdir(parents=True)
        for j in range(NUM_FILES):
            (below / f"file-{i}-{j}").write_bytes(b"%d" % (j % 7))
    return path


def walk(guest: FakeGuest, name: str) -> list[tuple[int, bytes]]:
    """List everything below a path; return the parent and name of each entry."""
    found = []
    pending = [guest.lookup(fuse_client.ROOT, name.encode())]
    while pending:
        nodeid, cookie = pending.pop(), 0
        while True:
            request = fuse_client.readdirplus(nodeid, cookie, REPLY_BYTES)
            entries = fuse_client.parse_direntplus(guest.ask(request, room=REPLY_BYTES).body)
            if not entries:
                break
            for entry, record in entries:
                cookie = record.off
                if entry.nodeid:
                    found.append((nodeid, record.name))
                    if record.kind == DIRECTORY_TYPE:
                        pending.append(entry.nodeid)
    return found


def look_up(guest: FakeGuest, found: list[tuple[int, bytes]]) -> float:
    """Return the lookups per second, many at a time, of entries found before."""
    chosen = [found[i * 7919 % len(found)] for i in range(LOOKUPS)]
    began_s = time.perf_counter()
    for start in range(0, len(chosen), BATCH):
        part = chosen[start : start + BATCH]
        for nodeid, name in part:
            guest.send(fuse_client.lookup(nodeid, name))
        num = 0
        while num < len(part):
            num += len(guest.rings[1].collect(timeout_s=30))
    return len(chosen) / (time.perf_counter() - began_s)


@contextmanager
def serving(store: Path, num_sockets: int) -> Iterator[ApplianceProcess]:
    with tempfile.TemporaryDirectory() as directory:
        sockets = [f"s{number}" for number in range(num_sockets)]
        state = f"--state-dir={directory}/state"
        with ApplianceProcess(store, Path(directory), state, sockets=sockets) as appliance:
            yield appliance


def walks_s(store: Path, name: str, num_guests: int) -> float:
    """Return the seconds that `num_guests` guests need for a first walk each, all at once."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(num_guests + 1)
    with serving(store, num_guests) as appliance:

        def be_guest(index: int) -> None:
            with FakeGuest(appliance.connect(index)) as guest:
                guest.mount()
                barrier.wait()
                walk(guest, name)
                barrier.wait()

        guests = [context.Process(target=be_guest, args=(i,)) for i in range(num_guests)]
        for guest in guests:
            guest.start()
        barrier.wait()
        began_s = time.perf_counter()
        barrier.wait()
        took_s = time.perf_counter() - began_s
        for guest in guests:
            guest.join()
    return took_s


def measure(trees: dict[str, Path]) -> dict[str, float]:
    """Return what one round gives: seconds, lookups/s (as their inverse), and MiB of store."""
    figures: dict[str, float] = {}
    for label, tree in trees.items():
        with tempfile.TemporaryDirectory() as directory:
            store = Path(directory) / "store"
            began_s = time.perf_counter()
            (name,) = import_tree(store, tree)
            figures[f"{label}: import, s"] = time.perf_counter() - began_s
            figures[f"{label}: data.mdb, MiB"] = (store / "data.mdb").stat().st_size / (1 << 20)
            for num_guests in GUESTS:
                took_s = walks_s(store, name, num_guests)
                figures[f"{label}: cold walk by {num_guests}, s"] = took_s
            with serving(store, 1) as appliance, FakeGuest(appliance.connect()) as guest:
                guest.mount()
                found = walk(guest, name)
                figures[f"{label}: lookup, us"] = 1e6 / look_up(guest, found)
    return figures


def measure_in(checkout: Path, trees: dict[str, Path]) -> dict[str, float]:
    """Run one round with the program, and the fake guests, of a checkout."""
    arguments = [f"{label}={path}" for label, path in trees.items()]
    done = subprocess.run(
        [checkout / ".venv/bin/python", __file__, "--once", *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        check=True,
        stdout=subprocess.PIPE,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Measure, and print the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--once", nargs="+", metavar="LABEL=TREE")
    options = parser.parse_args()
    if options.once:
        words = [word.partition("=") for word in options.once]
        print(json.dumps(measure({label: Path(path) for label, _, path in words})))
        return
    here = Path(__file__).resolve().parents[1]
    checkouts = [here] if options.before is None else [here, options.before.resolve()]
    with tempfile.TemporaryDirectory() as directory:
        trees = {
            "standard library": Path(sysconfig.get_path("stdlib")),
            "200,000 files": make_wide_tree(Path(directory) / "wide"),
        }
        for tree in trees.values():  # so that no first round has to read from the disk
            import_tree(Path(directory) / "warm-up", tree)
        rounds: list[list[dict[str, float]]] = [[] for _ in checkouts]
        for number in range(options.rounds):
            turns = list(zip(rounds, checkouts, strict=True))
            for figures, checkout in turns if number % 2 == 0 else reversed(turns):
                figures.append(measure_in(checkout, trees))
    for key in rounds[0][0]:
        line = f"{key:42} {statistics.median(each[key] for each in rounds[0]):9.2f}"
        if options.before is not None:
            ratios = [now[key] / then[key] for now, then in zip(*rounds, strict=True)]
            line += f"   {statistics.median(ratios):5.2f} of before"
            line += f" [{min(ratios):.2f} .. {max(ratios):.2f}]"
        print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
