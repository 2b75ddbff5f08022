"""A guest beside one that lists a huge directory, and beside hostile front-ends.

`python -m tests.bench_neighbour` measures.

On two CPUs the neighbour shares them with the guest that lists, whatever that one lists. So its p99
is given alone, beside a guest that lists a small directory again and again, and beside one that
lists 1,000,000 entries: the last two should be alike. So should the figures beside front-ends that
come, send a descriptor and leave, whether that is an eventfd or one that blocks whoever closes it.
"""

import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.bench_walk import REPLY_BYTES, serving
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.huge_directory import fill_with_huge_directory
from tests.fakes.visiting_front_ends import NUM_SOCKETS, visitors
from tests.fakes.visiting_front_ends import p99_us as visited_p99_us
from tests.fs.guest import basename

if TYPE_CHECKING:
    from collections.abc import Callable

NUM: Final = 1_000_000
LOOKUPS: Final = 4_000
ROUNDS: Final = 5
NUM_VISITS: Final = 100


def list_until(appliance: ApplianceProcess, name: str, has_begun: Event, is_over: Event) -> None:
    """List a path from its start to its end, over and over, as the guest on the first socket."""
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        top = guest.lookup(fuse_client.ROOT, basename(name))
        cookie = 0
        while not is_over.is_set():
            request = fuse_client.readdirplus(top, cookie, REPLY_BYTES)
            reply = guest.ask(request, room=REPLY_BYTES).body
            entries = fuse_client.parse_direntplus(reply)
            cookie = entries[-1][1].off if entries else 0
            has_begun.set()


def p99_us(appliance: ApplianceProcess) -> float:
    """Return the p99 of a lookup at a time, as the guest on the second socket."""
    with FakeGuest(appliance.connect(1)) as guest:
        guest.mount()
        top = guest.lookup(fuse_client.ROOT, basename("small"))
        took = []
        for number in range(LOOKUPS):
            request = fuse_client.lookup(top, b"file-%02d" % (number % 50))
            began_s = time.perf_counter()
            guest.ask(request)
            took.append(time.perf_counter() - began_s)
    return statistics.quantiles(took, n=100)[98] * 1e6


def beside(appliance: ApplianceProcess, name: str) -> float:
    """Return the neighbour's p99 while another guest lists the path called `name`."""
    has_begun, is_over = multiprocessing.Event(), multiprocessing.Event()
    process = multiprocessing.get_context("fork").Process(
        target=list_until, args=(appliance, name, has_begun, is_over)
    )
    process.start()
    has_begun.wait()
    try:
        return p99_us(appliance)
    finally:
        is_over.set()
        process.join()


def beside_visitors(appliance: ApplianceProcess, *, is_hostile: bool) -> float:
    """Return the neighbour's p99 while others come, send a descriptor and leave."""
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        top = guest.lookup(fuse_client.ROOT, basename("small"))
        with visitors(appliance, is_hostile=is_hostile) as visits:
            return visited_p99_us(guest, top, b"file-00", visits, NUM_VISITS)


def main() -> None:
    """Measure in turns, and print the medians."""
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        fill_with_huge_directory(store, NUM)
        with serving(store, 1 + NUM_SOCKETS) as appliance:
            cases: dict[str, Callable[[], float]] = {
                "alone": lambda: p99_us(appliance),
                "beside a small directory": lambda: beside(appliance, "small"),
                "beside 1,000,000 entries": lambda: beside(appliance, "huge"),
                "beside polite front-ends": lambda: beside_visitors(appliance, is_hostile=False),
                "beside hostile front-ends": lambda: beside_visitors(appliance, is_hostile=True),
            }
            rounds = [{label: case() for label, case in cases.items()} for _ in range(ROUNDS)]
    for label in cases:
        figures = [figures[label] for figures in rounds]
        print(
            f"p99 of a lookup {label:27} {statistics.median(figures):8.0f} us"
            f" [{min(figures):.0f} .. {max(figures):.0f}]"
        )


if __name__ == "__main__":
    main()
