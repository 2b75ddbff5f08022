"""What a guest feels of front-ends beside it that send hostile descriptors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.hostile_guest import ROOT
from tests.fakes.visiting_front_ends import NUM_SOCKETS, p99_us, visitors

pytestmark = pytest.mark.slow

ROUNDS: Final = 12
TIMES: Final = 2.0
# Several places in which a front-end may send a descriptor, with a descriptor of each kind.
NUM_VISITS: Final = 28


@pytest.fixture
def appliance(store: tuple[Path, bytes], tmp_path: Path) -> Iterator[ApplianceProcess]:
    sockets = [f"{number}" for number in range(1 + NUM_SOCKETS)]
    options = ("--num-request-queues=1", "--tag=t")
    with ApplianceProcess(store[0], tmp_path, *options, sockets=sockets) as process:
        yield process


def test_a_neighbours_p99_is_at_most_twice_what_it_is_beside_polite_front_ends(
    appliance: ApplianceProcess, store: tuple[Path, bytes]
) -> None:
    """Compares the best of several rounds, in turns: the machine may be busy with something else.

    A supervisor or a worker that waited for a descriptor would be late in each of them.
    """
    best = {False: float("inf"), True: float("inf")}
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        top = guest.lookup(ROOT, store[1])
        for _ in range(ROUNDS):
            for is_hostile in (False, True):
                with visitors(appliance, is_hostile=is_hostile) as visits:
                    found_us = p99_us(guest, top, b"small", visits, NUM_VISITS)
                best[is_hostile] = min(best[is_hostile], found_us)
            if best[True] <= TIMES * best[False]:
                break
    print(f"p99: {best[True]:.0f} us beside hostile front-ends, {best[False]:.0f} us beside others")
    assert best[True] <= TIMES * best[False]
    assert "Traceback" not in appliance.log()
