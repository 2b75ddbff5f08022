"""Successors of killed workers, when descriptors were replaced or are scarce as they start."""

import contextlib
import os
import resource
import signal
from collections.abc import Iterator
from errno import ESTALE
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.hostile_guest import (
    LARGE,
    ROOT,
    parent_of,
    wait_readable,
)
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.vmms import CloudHypervisor

pytestmark = pytest.mark.slow

QUEUE_SIZE = 128


@pytest.fixture(scope="module")
def appliance(
    store: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApplianceProcess]:
    directory = tmp_path_factory.mktemp("run")
    with ApplianceProcess(store[0], directory, "--num-request-queues=1") as process:
        yield process


@pytest.fixture
def guest(appliance: ApplianceProcess) -> Iterator[FakeGuest]:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        guest.vmm.front_end.get_features()  # answered when all workers serve
        yield guest


def kill_worker(appliance: ApplianceProcess) -> None:
    (session,) = appliance.status()
    (pid,) = [worker["pid"] for worker in session["workers"] if worker["queues"] == [1]]
    os.kill(pid, signal.SIGKILL)


def await_log(appliance: ApplianceProcess, text: str, *, start: int) -> None:
    for _ in every_event(DEADLINE_S):
        if text in appliance.log()[start:]:
            return
    raise AssertionError(f"no {text!r} in the log:\n{appliance.log()}")


@contextlib.contextmanager
def without_descriptors(pid: int) -> Iterator[None]:
    """Let process `pid` open no other descriptor within the block."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_a_worker_comes_back_with_the_err_descriptor_that_replaced_another(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    ring = guest.rings[1]
    guest.vmm.front_end.set_vring_err(1, ring.err_fd)
    assert guest.lookup(ROOT, store[1])
    kill_worker(appliance)
    assert guest.lookup(ROOT, store[1])
    ring.avail_idx = (ring.avail_idx + 5000) & 0xFFFF
    ring.kick()
    wait_readable(ring.err_fd)


def test_a_worker_comes_back_with_the_inflight_record_that_its_ring_started_with(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    large = guest.lookup(guest.lookup(ROOT, store[1]), b"large")
    for _ in range(2):
        _inflight, fd = guest.vmm.front_end.get_inflight_fd(2, QUEUE_SIZE)
        os.close(fd)
        kill_worker(appliance)
        assert guest.ask(fuse_client.read(large, 0, 4000)).body == LARGE[:4000]


def test_a_worker_comes_back_when_there_are_descriptors_again(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    start = len(appliance.log())
    (session,) = appliance.status()
    (pid,) = [worker["pid"] for worker in session["workers"] if worker["queues"] == [1]]
    with without_descriptors(parent_of(pid)):  # the fork server, which makes the channel
        os.kill(pid, signal.SIGKILL)
        guest.send(fuse_client.lookup(ROOT, store[1]))
        await_log(appliance, "Too many open files", start=start)
    (used,) = guest.rings[1].collect(timeout_s=DEADLINE_S)
    assert fuse_client.parse_reply(used.data).error == 0
    assert "Traceback" not in appliance.log()[start:]


def test_a_socket_is_served_when_there_are_descriptors_again(
    appliance: ApplianceProcess, store: tuple[Path, bytes]
) -> None:
    start = len(appliance.log())
    with without_descriptors(appliance.process.pid):
        front_end = appliance.connect()
        await_log(appliance, "Too many open files", start=start)
    with FakeGuest(front_end) as guest:
        guest.mount()
        assert guest.lookup(ROOT, store[1])
    assert "Traceback" not in appliance.log()[start:]


def test_a_ring_that_no_successor_can_go_on_with_signals_its_err_descriptor(
    appliance: ApplianceProcess, guest: FakeGuest
) -> None:
    ring = guest.rings[1]
    guest.vmm.front_end.set_vring_err(1, ring.err_fd)
    guest.vmm.front_end.get_features()
    ring.used_idx = (ring.used_idx + 5000) & 0xFFFF  # as a guest might
    kill_worker(appliance)
    wait_readable(ring.err_fd)
    assert guest.vmm.front_end.get_vring_base(1) >= 0


def test_a_front_end_that_comes_back_with_its_inflight_buffer_misses_no_answer(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    first = ApplianceProcess(store[0], tmp_path, "--num-request-queues=1")
    vmm = CloudHypervisor(first.connect())
    with FakeGuest(vmm.front_end, vmm=vmm) as guest:
        guest.mount()
        large = guest.lookup(guest.lookup(ROOT, store[1]), b"large")
        for number in range(32):
            guest.send(fuse_client.read(large, number * 4096, 4096, unique=number + 1))
        first.process.kill()
        first.process.wait(DEADLINE_S)
        vmm.front_end.close()
        with ApplianceProcess(store[0], tmp_path, "--num-request-queues=1") as second:
            guest.vmm = CloudHypervisor(second.connect(), inflight=vmm.inflight)
            guest.vmm.realize()
            # The bases are ignored, because the inflight buffer decides where the rings start.
            guest.vmm.start(guest.memory, guest.rings, [ring.avail_idx for ring in guest.rings])
            answers = [
                fuse_client.parse_reply(used.data)
                for used in guest.rings[1].collect(32, timeout_s=DEADLINE_S)
            ]
    # The grants of the first supervisor are gone, so requests that it did not answer are stale for
    # the second one. They must never get the content of another file.
    assert sorted(answer.unique for answer in answers) == list(range(1, 33))
    for answer in answers:
        expected = LARGE[(answer.unique - 1) * 4096 :][:4096]
        assert (answer.error, answer.body) in {(0, expected), (ESTALE, b"")}
