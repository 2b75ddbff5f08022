"""A device that is removed and added again on its connection, as QEMU does with a kept chardev."""

import errno
from pathlib import Path

import pytest

from appliance.vhost._vhost_wire import Region
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.driver import DriverRing
from tests.fakes.hostile_guest import LARGE, ROOT, num_fds
from tests.fakes.vmms import Qemu

pytestmark = pytest.mark.slow


def test_a_device_that_comes_back_is_served_as_a_new_one(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    with (
        ApplianceProcess(store[0], tmp_path, "--num-request-queues=1") as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        fds = 0
        for round_ in range(4):
            lookup = fuse_client.lookup(ROOT, store[1])
            assert guest.ask(lookup).error == errno.EIO, "no INIT of this session"
            guest.mount()
            large = guest.lookup(guest.lookup(ROOT, store[1]), b"large")
            assert guest.ask(fuse_client.read(large, 0, 4096)).body == LARGE[:4096]
            (session,) = appliance.status()
            assert session["requests"]["INIT"] == round_ + 1
            if round_ == 1:
                fds = num_fds(session["pid"])
            assert round_ < 2 or num_fds(session["pid"]) == fds
            assert [worker["restarts"] for worker in session["workers"]] == [0]
            plug_again(guest)
        assert "refused" not in appliance.log()


def plug_again(guest: FakeGuest) -> None:
    assert isinstance(guest.vmm, Qemu)
    guest.vmm.stop()
    guest.vmm.unplug()
    # The new device knows of no memory, and adds the same regions again.
    guest.vmm = Qemu(guest.vmm.front_end, len(guest.rings))
    for ring in guest.rings:
        ring.close()
    guest.rings = [DriverRing(guest.memory, ring.num) for ring in guest.rings]
    guest.vmm.realize()
    guest.vmm.start(guest.memory, guest.rings)


def test_a_ring_goes_on_in_a_region_that_is_replaced(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    with (
        ApplianceProcess(store[0], tmp_path, "--num-request-queues=1") as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        front_end = guest.vmm.front_end
        front_end.acks = True
        for _ in range(3):
            for region in guest.memory.regions:
                front_end.add_mem_reg(Region._make(region), guest.memory.fd)
            assert guest.lookup(ROOT, store[1])
        (session,) = appliance.status()
        links = Path(f"/proc/{session['pid']}/fd").iterdir()
        memory = Path(f"/proc/self/fd/{guest.memory.fd}").readlink()
        assert [fd.readlink() for fd in links].count(memory) == len(guest.memory.regions)
