"""A queue that its guest has never used has no worker, and whatever comes first starts one."""

import asyncio
import os
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final

import pytest

from appliance.engine import INFLIGHT_HEADER, inflight_size
from appliance.errors import VhostError
from appliance.session.device import Device
from appliance.session.session_memory import InflightMemory
from appliance.vhost._vhost_wire import Region
from appliance.vhost.backend import RingLog, VringConfig
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.driver import DriverRing, GuestMemory, drain_eventfd
from tests.fakes.hostile_guest import LARGE, ROOT
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.served_device import NUM, a_device, ask, ring_config, until

pytestmark = pytest.mark.slow

HIPRIO: Final = 0
SECOND_REQUEST_QUEUE: Final = 2
QUEUES: Final = 3


def run(
    tmp_path: Path, test: Callable[[Device, list[DriverRing]], Coroutine[None, None, None]]
) -> None:
    """Run `test` with a device and a ring for each of its queues."""

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S), a_device(tmp_path, memory) as device:
            await test(device, rings)

    with GuestMemory() as memory:
        rings = [DriverRing(memory, NUM) for _ in range(QUEUES)]
        asyncio.run(bounded())
        for ring in rings:
            ring.close()


async def answered(ring: DriverRing, count: int = 1) -> None:
    await until(lambda: ring.used_idx == count)


def queues(device: Device) -> list[int]:
    """Return which queues have a worker."""
    return [worker.queue for worker in device.workers()]


def test_only_the_first_request_queue_has_a_worker_before_its_first_kick(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        for queue, ring in enumerate(rings):
            await device.start_ring(queue, ring_config(ring))
        assert queues(device) == [1]
        for queue in (SECOND_REQUEST_QUEUE, HIPRIO):
            ask(rings[queue])
            await answered(rings[queue])
        assert queues(device) == [0, 1, 2]
        assert [worker.restarts for worker in device.workers()] == [0, 0, 0]

    run(tmp_path, test)


def test_a_request_that_came_before_the_ring_was_started_is_not_lost(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        for queue in (HIPRIO, SECOND_REQUEST_QUEUE):
            ask(rings[queue])
        drain_eventfd(rings[HIPRIO].kick_fd)  # nor is one without a kick
        for queue in (HIPRIO, SECOND_REQUEST_QUEUE):
            await device.start_ring(queue, ring_config(rings[queue]))
            await answered(rings[queue])

    run(tmp_path, test)


def test_kicks_for_an_empty_ring_start_no_worker(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        for queue in (HIPRIO, SECOND_REQUEST_QUEUE):
            rings[queue].kick()  # as QEMU does
            await device.start_ring(queue, ring_config(rings[queue]))
            for _ in range(3):
                rings[queue].kick()
                await asyncio.sleep(0)
        ask(rings[SECOND_REQUEST_QUEUE])  # after all of the kicks before
        await answered(rings[SECOND_REQUEST_QUEUE])
        assert queues(device) == [SECOND_REQUEST_QUEUE]

    run(tmp_path, test)


def test_a_ring_that_stops_before_its_first_kick_is_where_it_began(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        ring = rings[HIPRIO]
        for _ in range(3):
            await device.start_ring(HIPRIO, ring_config(ring))
            assert await device.stop_ring(HIPRIO) == 0
        assert queues(device) == []
        await device.start_ring(HIPRIO, ring_config(ring))
        ask(ring)
        await answered(ring)
        assert await device.stop_ring(HIPRIO) == 1

    run(tmp_path, test)


def test_a_request_at_the_instant_of_a_stop_counts_for_the_next_start(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        ring = rings[HIPRIO]
        await device.start_ring(HIPRIO, ring_config(ring))
        ask(ring)
        assert await device.stop_ring(HIPRIO) == 0  # before the event loop sees the kick
        drain_eventfd(ring.kick_fd)  # as if the front-end brought another descriptor
        await device.start_ring(HIPRIO, ring_config(ring))
        await answered(ring)

    run(tmp_path, test)


def test_what_a_back_end_before_may_have_left_is_served_without_a_kick(tmp_path: Path) -> None:
    def record(is_blank: bool) -> int:  # noqa: FBT001 - one argument
        fd = os.memfd_create("inflight")
        os.ftruncate(fd, QUEUES * inflight_size(NUM))
        for queue in range(0 if is_blank else QUEUES):
            header = INFLIGHT_HEADER.pack(0, 1, NUM, 0, 0)
            os.pwrite(fd, header, queue * inflight_size(NUM))
        return fd

    async def begun(device: Device, config: VringConfig) -> None:
        await device.start_ring(HIPRIO, config)
        assert queues(device) == [HIPRIO]

    async def initialised(device: Device, rings: list[DriverRing]) -> None:
        device._services.memory.start(31, 0, 0)
        await begun(device, ring_config(rings[HIPRIO]))

    async def recorded(device: Device, rings: list[DriverRing]) -> None:
        size = QUEUES * inflight_size(NUM)
        await device.set_inflight(record(is_blank=False), size, 0, QUEUES, NUM)
        device._services.memory.end()  # the record alone is a reason
        await begun(device, ring_config(rings[HIPRIO])._replace(fresh=False))

    async def based(device: Device, rings: list[DriverRing]) -> None:
        ring = rings[HIPRIO]
        ask(ring)  # which another back-end has answered
        ring.used_idx = 1
        ask(ring)
        drain_eventfd(ring.kick_fd)
        await device.start_ring(HIPRIO, ring_config(ring)._replace(base=1))
        await answered(ring, 2)

    async def blank(device: Device, rings: list[DriverRing]) -> None:
        size = QUEUES * inflight_size(NUM)
        await device.set_inflight(record(is_blank=True), size, 0, QUEUES, NUM)
        await device.start_ring(HIPRIO, ring_config(rings[HIPRIO])._replace(fresh=False))
        assert queues(device) == []

    for number, case in enumerate((initialised, recorded, based, blank)):
        directory = tmp_path / str(number)
        directory.mkdir()
        run(directory, case)


def test_what_cannot_be_waited_for_is_refused_at_once(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        with tempfile.NamedTemporaryFile() as file:
            config = ring_config(rings[HIPRIO])._replace(kick_fd=file.fileno())
            with pytest.raises(VhostError, match="kick descriptor"):
                await device.start_ring(HIPRIO, config)

    run(tmp_path, test)


def test_what_changes_before_the_first_kick_is_known_to_the_worker(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        ring = rings[HIPRIO]
        await device.start_ring(HIPRIO, ring_config(ring)._replace(call_fd=None))
        await device.set_call(HIPRIO, ring.call_fd)
        region = Region._make(ring.memory.regions[0])
        await device.add_region(region, os.dup(ring.memory.fd), region)
        assert queues(device) == []
        ask(ring)
        await answered(ring)
        await until(lambda: drain_eventfd(ring.call_fd) > 0)

    run(tmp_path, test)


def test_a_log_that_cannot_be_mapped_is_refused_before_the_first_kick(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        ring = rings[HIPRIO]
        await device.start_ring(HIPRIO, ring_config(ring))
        await device.set_log(HIPRIO, None)
        assert queues(device) == []
        reader, writer = os.pipe()
        with pytest.raises(VhostError, match="log"):
            await device.set_log(HIPRIO, RingLog(reader, 4096, 0, None))
        ask(ring)
        await answered(ring)
        os.close(reader)
        os.close(writer)

    run(tmp_path, test)


def test_memory_whose_index_cannot_be_read_is_left_to_a_worker(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        config = ring_config(rings[HIPRIO])
        with pytest.raises(VhostError, match="available ring"):
            await device.start_ring(HIPRIO, config._replace(avail=config.avail + (1 << 50)))

    run(tmp_path, test)


def test_memory_that_is_gone_at_the_first_kick_stops_the_ring_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        for queue in (0, 1):
            await device.start_ring(queue, ring_config(rings[queue]))
        config = ring_config(rings[2])
        await device.start_ring(2, config._replace(desc=config.desc + (1 << 50)))
        ask(rings[2])
        await until(lambda: "the ring stops" in caplog.text)
        assert await device.stop_ring(2) == 0
        ask(rings[1])
        await answered(rings[1])

    run(tmp_path, test)


def test_a_device_that_ends_before_the_first_kick_waits_for_nothing(tmp_path: Path) -> None:
    async def test(device: Device, rings: list[DriverRing]) -> None:
        await device.start_ring(HIPRIO, ring_config(rings[HIPRIO]))

    run(tmp_path, test)


def test_requests_in_flight_survive_on_a_queue_that_was_used_late(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    with (
        ApplianceProcess(store[0], tmp_path, "--num-request-queues=4") as appliance,
        FakeGuest(appliance.connect(), num_request_queues=4) as guest,
    ):
        guest.mount(queue=3)  # as Linux 6.12 on the third CPU
        for queue in (3, 2, 4):
            answer = guest.ask(fuse_client.lookup(ROOT, store[1]), queue=queue)
            top = fuse_client.parse_entry(answer.body).nodeid
            entry = fuse_client.parse_entry(
                guest.ask(fuse_client.lookup(top, b"large"), queue=queue).body
            )
            os.kill(worker_of(appliance, queue), 9)
            read = guest.ask(fuse_client.read(entry.nodeid, 0, 4096), queue=queue)
            assert read.body == LARGE[:4096]
        (session,) = appliance.status()
        assert [worker["queues"] for worker in session["workers"]] == [[1], [2], [3], [4]]


def worker_of(appliance: ApplianceProcess, queue: int) -> int:
    """Return the pid of the worker of `queue`."""
    for _ in every_event(DEADLINE_S):
        (session,) = appliance.status()
        for worker in session["workers"]:
            if worker["queues"] == [queue]:
                pid: int = worker["pid"]
                return pid
    raise AssertionError(f"queue {queue} has no worker")


def test_the_inflight_memory_of_each_queue_is_blank_for_itself() -> None:
    memory = InflightMemory.create(QUEUES, NUM)
    header = INFLIGHT_HEADER.pack(0, 1, NUM, 0, 0)
    os.pwrite(memory.fd, header, memory.area_bytes)
    assert [memory.is_blank_of(queue) for queue in range(QUEUES)] == [True, False, True]
    assert not memory.is_blank
    memory.close()
