"""A `Device` of a session process with real workers, which serve the rings of fake drivers."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Final

from appliance.engine import FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC
from appliance.protos import control_pb2 as pb
from appliance.protos.device_state_pb2 import DeviceState
from appliance.resolve.exports import WholeStore
from appliance.resolve.local import LocalResolver
from appliance.session.device import Device
from appliance.session.kick_watch import KickWatch
from appliance.session.ring_worker import DeviceServices
from appliance.store.store import Store
from appliance.supervisor.forker import Forker
from appliance.supervisor.open_files import OpenFiles
from appliance.supervisor.served_session import ServedSession
from appliance.vhost._vhost_wire import Region
from appliance.vhost.backend import VringConfig
from tests.fakes import fuse_client
from tests.fakes.driver import DriverRing, GuestMemory
from tests.fakes.running_command import DEADLINE_S

QUEUE: Final = 1
NUM: Final = 16


@contextlib.asynccontextmanager
async def a_device(directory: Path, memory: GuestMemory) -> AsyncIterator[Device]:
    store = Store.open(directory / "store", create=True)
    configure = pb.Configure(store_path=os.fspath(directory / "store"), log_level="INFO")
    forker = Forker()
    resolver = LocalResolver(store)
    export = WholeStore(resolver)
    session = ServedSession.create(
        3, export, resolver, OpenFiles(), is_by_content=False, lease=None
    )

    kicks = KickWatch()

    async def start_apart() -> None:
        session.grants.start_apart()

    async def restore(state: DeviceState) -> None:
        restoration = session.restoration("a device", goes_on=False)
        assert not await restoration.take(pb.Restore(is_first=True, part=state))
        assert not await restoration.take(pb.Restore(is_last=True))

    services = DeviceServices(
        spawner=forker,
        keeper=session,
        start_apart=start_apart,
        restore=restore,
        changed=lambda: None,
        memory=session.memory,
        fds=session.fds,
        kicks=kicks,
        configure=configure,
    )
    device = Device("a device", 3, NUM, services)
    try:
        for region in memory.regions:
            await device.add_region(Region._make(region), os.dup(memory.fd))
        yield device
    finally:
        await device.close()
        kicks.close()
        session.close()
        await forker.close()
        await resolver.close()
        store.close()


def ring_config(ring: DriverRing) -> VringConfig:
    layout = ring.layout()
    return VringConfig(
        num=layout.num,
        desc=layout.desc,
        used=layout.used,
        avail=layout.avail,
        base=0,
        features=FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC,
        kick_fd=ring.kick_fd,
        call_fd=ring.call_fd,
        err_fd=None,
        fresh=True,
    )


def worker_restarts(device: Device) -> int:
    """Return how often the only worker has died, or 0 while no worker lives."""
    return sum(worker.restarts for worker in device.workers())


async def until(condition: Callable[[], bool]) -> None:
    # Polls, because a write of another process to shared memory is no event. `run` has a deadline.
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


def ask(ring: DriverRing) -> None:
    ring.add_chain([fuse_client.init()], [4096])
    ring.publish()


def run(tmp_path: Path, test: Callable[[Device, DriverRing], Coroutine[None, None, None]]) -> None:
    """Run `test` with a device and its ring."""

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S), a_device(tmp_path, memory) as device:
            await test(device, ring)

    with GuestMemory() as memory:
        ring = DriverRing(memory, NUM)
        asyncio.run(bounded())
        ring.close()
