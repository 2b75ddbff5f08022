"""Several processes that share a cache: each blob crosses the link to the service once."""

import os
import random
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.scripted_services import ScriptedServices
from tests.fs.guest import File

pytestmark = pytest.mark.slow

ROOT = 1
NUM_PROCESSES = 3
NUM_FILES = 60
LARGE_SIZE = 12 << 20
STEP = 128 << 10


@pytest.fixture
def services(tmp_path: Path) -> Iterator[ScriptedServices]:
    with ScriptedServices(tmp_path) as services:
        yield services


class Hosts:
    """Processes that serve a guest each, and share a state directory."""

    def __init__(self, services: ScriptedServices, directory: Path, stack: ExitStack) -> None:
        self.processes = []
        self.guests = []
        for number in range(NUM_PROCESSES):
            place = directory / str(number)
            place.mkdir()
            state = f"--state-dir={directory}/state"
            process = stack.enter_context(ApplianceProcess(services.uri, place, state))
            guest = stack.enter_context(FakeGuest(process.connect()))
            guest.mount()
            self.processes.append(process)
            self.guests.append(guest)


def read_all(guest: FakeGuest, path: bytes, contents: dict[bytes, bytes]) -> None:
    top = guest.lookup(ROOT, path)
    for name, content in contents.items():
        nodeid = guest.lookup(top, name)
        answer = guest.ask(fuse_client.read(nodeid, 0, 1 << 20), room=1 << 20)
        assert answer.body == content


def test_each_blob_is_fetched_once_whoever_wants_it(
    services: ScriptedServices, tmp_path: Path
) -> None:
    sizes = (3000, 200_000)
    contents = {b"%02d" % number: os.urandom(sizes[number % 2]) for number in range(NUM_FILES)}
    path = services.put({name: File(content) for name, content in contents.items()})
    with ExitStack() as stack:
        hosts = Hosts(services, tmp_path, stack)
        threads = stack.enter_context(ThreadPoolExecutor(NUM_PROCESSES))
        for done in [threads.submit(read_all, guest, path, contents) for guest in hosts.guests]:
            done.result()
    assert {services.num_reads(content) for content in contents.values()} == {1}


def chunks_read(services: ScriptedServices, content: bytes) -> list[int]:
    """Return how often each chunk of a blob was asked for."""
    return [services.reads[chunk.digest] for chunk in services.chunks[Digest.of(content)]]


def test_each_chunk_is_fetched_once_whoever_wants_it(
    services: ScriptedServices, tmp_path: Path
) -> None:
    content = os.urandom(LARGE_SIZE)
    services.cut(content)
    path = services.put({b"large": File(content)})
    with ExitStack() as stack:
        hosts = Hosts(services, tmp_path, stack)
        threads = stack.enter_context(ThreadPoolExecutor(NUM_PROCESSES))
        steps = range(0, LARGE_SIZE, STEP)
        orders = [list(steps), list(reversed(steps)), random.Random(1).sample(steps, len(steps))]
        work = zip(hosts.guests, orders, strict=True)
        done = [threads.submit(read_in_order, *one, path, content) for one in work]
        for one in done:
            one.result()
    assert set(chunks_read(services, content)) == {1}
    assert services.num_reads(content) == 0


@pytest.mark.parametrize("sends_ranges", [True, False], ids=["ranges", "chunks"])
def test_readers_in_order_do_not_fetch_what_another_process_receives(
    services: ScriptedServices, tmp_path: Path, *, sends_ranges: bool
) -> None:
    services.sends_ranges = sends_ranges
    content = os.urandom(LARGE_SIZE)
    services.cut(content)
    path = services.put({b"large": File(content)})
    with ExitStack() as stack:
        hosts = Hosts(services, tmp_path, stack)
        threads = stack.enter_context(ThreadPoolExecutor(NUM_PROCESSES))
        steps = list(range(0, LARGE_SIZE, STEP))
        done = [
            threads.submit(read_in_order, guest, steps, path, content) for guest in hosts.guests
        ]
        for one in done:
            one.result()
    assert services.num_reads(content) == 0
    assert max(chunks_read(services, content)) <= 1
    assert (services.ranges[Digest.of(content)] > 0) == sends_ranges
    assert services.num_sent < 1.1 * LARGE_SIZE


def read_in_order(guest: FakeGuest, order: Sequence[int], path: bytes, content: bytes) -> None:
    nodeid = guest.lookup(guest.lookup(ROOT, path), b"large")
    for at in order:
        answer = guest.ask(fuse_client.read(nodeid, at, STEP), room=STEP)
        assert answer.body == content[at : at + STEP]


@pytest.mark.parametrize("size", [3000, 200_000])
def test_a_claim_dies_with_its_process(
    services: ScriptedServices, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    path = services.put({b"file": File(content)})
    with ExitStack() as stack:
        hosts = Hosts(services, tmp_path, stack)
        release = services.hold(Digest.of(content))
        wanted = [guest.lookup(guest.lookup(ROOT, path), b"file") for guest in hosts.guests]
        for guest, nodeid in zip(hosts.guests, wanted, strict=True):
            guest.send(fuse_client.read(nodeid, 0, size), room=size)
            wait_for_reads(services, content, 1)
        # The first one holds the claim, and the others wait for it.
        hosts.processes[0].process.send_signal(signal.SIGKILL)
        wait_for_reads(services, content, 2)
        release()
        for guest in hosts.guests[1:]:
            (used,) = guest.rings[1].collect(timeout_s=DEADLINE_S)
            assert fuse_client.parse_reply(used.data).body == content
    assert services.num_reads(content) == 2


def wait_for_reads(services: ScriptedServices, content: bytes, number: int) -> None:
    for _ in every_event(DEADLINE_S):
        if services.num_reads(content) == number:
            return
    raise AssertionError(f"it was read {services.num_reads(content)} times, not {number}")
