"""A device with real worker processes, which serve the ring of a fake driver."""

import asyncio
import contextlib
import mmap
import os
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from appliance.errors import VhostError
from appliance.session import ring_worker
from appliance.session.device import Device
from appliance.session.worker_process import WorkerProcess
from appliance.supervisor.forker import Forker
from appliance.vhost._vhost_wire import Region
from tests.fakes.driver import DriverRing, GuestMemory
from tests.fakes.served_device import (
    NUM,
    QUEUE,
    a_device,
    ask,
    ring_config,
    run,
    until,
    worker_restarts,
)

pytestmark = pytest.mark.slow


def stop_workers(device: Device) -> None:
    """Stop every worker, as a blocking descriptor of the front-end could."""
    for worker in device.workers():
        os.kill(worker.pid, signal.SIGSTOP)


async def the_next_worker(device: Device, restarts: int) -> None:
    await until(lambda: worker_restarts(device) == restarts)
    await device.set_call(QUEUE, None)  # returns after the worker has been brought up


def test_a_ring_whose_stop_failed_is_not_served_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        monkeypatch.setattr(ring_worker, "_ANSWER_DEADLINE_S", 0.5)
        monkeypatch.setattr(ring_worker, "_STUCK_MAX", 1)
        ask(ring)
        await until(lambda: ring.used_idx == 1)
        stop_workers(device)
        with pytest.raises(VhostError, match="stuck"):
            await device.stop_ring(QUEUE)
        ask(ring)
        await the_next_worker(device, restarts=1)
        assert ring.used_idx == 1

    run(tmp_path, test)


def test_a_stopped_worker_is_replaced_and_its_successor_does_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ring_worker._ANSWER_DEADLINE_S <= 5
    monkeypatch.setattr(ring_worker, "_ANSWER_DEADLINE_S", 1.0)

    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        ask(ring)
        await until(lambda: ring.used_idx == 1)
        for restarts in range(1, 4):
            device.look()  # notes what was served
            stop_workers(device)
            ask(ring)
            ring.kick()
            if restarts % 2:
                assert await device.stop_ring(QUEUE) in {restarts, restarts + 1}
                config = ring_config(ring)._replace(base=ring.used_idx)
                await device.start_ring(QUEUE, config)
            else:
                device.look()  # sees that it was kicked
            await until(lambda: ring.used_idx == ring.avail_idx)
            assert worker_restarts(device) == restarts

    run(tmp_path, test)


def test_a_worker_that_stops_while_it_serves_is_replaced_within_five_seconds(
    tmp_path: Path,
) -> None:
    # It stops right after a sign of life: that is seen at the first look, and its absence at the
    # second, when it is asked.
    assert 2 * ring_worker.LOOK_S + ring_worker._PONG_DEADLINE_S < 5

    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        looking = asyncio.create_task(device.keep_looking())
        ask(ring)
        ring.kick()
        await until(lambda: ring.used_idx == 1)
        stop_workers(device)
        stopped_s = time.monotonic()
        ask(ring)
        ring.kick()
        await until(lambda: ring.used_idx == 2)
        print(f"answered by a successor after {time.monotonic() - stopped_s:.1f} s")
        assert worker_restarts(device) == 1
        looking.cancel()

    run(tmp_path, test)


def test_a_worker_whose_guest_waits_is_asked_and_one_of_an_idle_guest_is_not(
    tmp_path: Path,
) -> None:
    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        (kept,) = processes(device)
        device.look()  # the descriptor may have been kicked before
        await until(lambda: not kept._tasks)
        for number in range(1, 4):
            ask(ring)
            ring.kick()
            await until(lambda: ring.used_idx == ring.avail_idx)
            device.look()  # it has served
            assert not kept._tasks
            device.look()
            assert kept._tasks, f"{number}: it is asked whether it lives"
            await until(lambda: not kept._tasks)
            for _ in range(3):
                device.look()
                assert not kept._tasks
        assert worker_restarts(device) == 0

    run(tmp_path, test)


# --- Guest memory ---

NUM_REGIONS: Final = 40


def test_a_region_that_comes_or_goes_is_all_that_is_mapped_or_unmapped(tmp_path: Path) -> None:
    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        (worker,) = device.workers()
        regions = [
            Region((1 << 40) + at, mmap.PAGESIZE, (1 << 41) + at, at)
            for at in range(0, NUM_REGIONS * mmap.PAGESIZE, mmap.PAGESIZE)
        ]
        fd = os.memfd_create("more")
        os.ftruncate(fd, NUM_REGIONS * mmap.PAGESIZE)
        async with traced(worker.pid, tmp_path / "calls") as calls:
            for region in regions:
                await device.add_region(region, os.dup(fd))
            await device.add_region(regions[0], os.dup(fd), regions[0])
            for region in regions:
                await device.remove_region(region)
        os.close(fd)
        text = calls.read_text()
        assert text.count("MAP_SHARED|MAP_NORESERVE") == NUM_REGIONS + 1
        ended = [line for line in text.splitlines() if re.match(r"munmap\(.*, 4096\)", line)]
        assert len(ended) == NUM_REGIONS + 1
        ask(ring)
        await until(lambda: ring.used_idx == 1)
        assert worker_restarts(device) == 0

    run(tmp_path, test)


@contextlib.asynccontextmanager
async def traced(pid: int, path: Path) -> AsyncIterator[Path]:
    """Write the mappings that a process makes and ends within the block to a file."""
    tracer = await asyncio.create_subprocess_exec(
        *("strace", "-p", str(pid), "-e", "trace=mmap,munmap", "-o", os.fspath(path)),
        stderr=asyncio.subprocess.PIPE,
    )
    assert tracer.stderr is not None
    assert b"attached" in await tracer.stderr.readline()
    yield path
    tracer.send_signal(signal.SIGINT)
    await tracer.communicate()


def test_workers_that_are_stuck_are_ended_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WorkerProcess.close, "__defaults__", (4.0,))

    async def main() -> None:
        start_s = 0.0
        async with a_device(tmp_path, memory) as device:
            for queue, ring in enumerate(rings):
                await device.start_ring(queue, ring_config(ring))
            stop_workers(device)
            start_s = time.monotonic()
        assert time.monotonic() - start_s < 8.0

    with GuestMemory() as memory:
        rings = [DriverRing(memory, NUM) for _ in range(3)]
        asyncio.run(main())
        for ring in rings:
            ring.close()


def test_a_successor_that_was_slow_to_start_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        before = ring_worker._ANSWER_DEADLINE_S
        monkeypatch.setattr(ring_worker, "_ANSWER_DEADLINE_S", 0.0)
        (worker,) = device.workers()
        os.kill(worker.pid, signal.SIGKILL)  # before a successor can start
        # None of them lives long enough to be seen among the device's workers.
        await until(lambda: caplog.text.count("starting another") >= 2)
        monkeypatch.setattr(ring_worker, "_ANSWER_DEADLINE_S", before)
        ask(ring)
        await until(lambda: ring.used_idx == 1)

    run(tmp_path, test)


def test_memory_that_cannot_be_mapped_is_refused_and_forgotten(tmp_path: Path) -> None:
    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        known = Region._make(ring.memory.regions[0])
        other = Region(1 << 40, mmap.PAGESIZE, 1 << 40, 0)
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(mmap.PAGESIZE)
            with pytest.raises(VhostError, match="cannot map it"):
                await device.add_region(other, os.open(file.name, os.O_RDONLY))
            ask(ring)
            ring.kick()
            await until(lambda: ring.used_idx == 1)
            with pytest.raises(VhostError, match="cannot map it"):
                await device.set_regions([(other, os.open(file.name, os.O_RDONLY))])
        await device.remove_region(known)
        with pytest.raises(KeyError):
            await device.remove_region(other)

    run(tmp_path, test)


def processes(device: Device) -> list[WorkerProcess]:
    return [ring_worker._process for ring_worker in device._ring_workers.values()]


async def all_restarted(device: Device, restarts: int) -> None:
    """Return when each worker has died as often as given and its successor serves."""
    await until(lambda: all(kept.restarts == restarts and kept.link for kept in processes(device)))
    for queue in device._ring_workers:
        await device.set_call(queue, None)  # returns after the worker has been brought up


def test_fork_servers_killed_in_a_row_make_no_worker_wait(tmp_path: Path) -> None:
    async def test(device: Device, ring: DriverRing) -> None:
        device._services.memory.start(31, 0, 0)  # so all workers start at once
        for queue in range(3):
            await device.start_ring(queue, ring_config(ring))
        forker = processes(device)[0]._spawner
        assert isinstance(forker, Forker)
        for kill in range(1, 5):
            assert forker._process is not None
            forker._process.kill()
            await all_restarted(device, kill)
            assert [kept._back_off_s for kept in processes(device)] == [0, 0, 0]
        assert forker._back_off_s == 0

    run(tmp_path, test)


def test_a_worker_that_dies_at_its_start_waits_from_the_second_time_on(tmp_path: Path) -> None:
    async def test(device: Device, ring: DriverRing) -> None:
        await device.start_ring(QUEUE, ring_config(ring))
        (kept,) = processes(device)
        waits = []
        for kill in range(1, 5):
            kept.kill()
            await all_restarted(device, kill)
            waits.append(kept._back_off_s)
        assert waits == [0, 0.05, 0.1, 0.2]
        kept._started_s -= 60  # as if it had lived for a minute
        kept.kill()
        await all_restarted(device, 5)
        assert kept._back_off_s == 0

    run(tmp_path, test)
