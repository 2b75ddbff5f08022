"""The log stays small even if guests and front-ends cause the same lines again and again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.bounds import LOG_LINES_MAX
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.frontend import RefusedError
from tests.fakes.hostile_guest import HostileGuest, descendants, parent_of, wait_readable
from tests.fakes.vmms import Qemu

pytestmark = pytest.mark.slow


@pytest.fixture
def appliance(store: tuple[Path, bytes], tmp_path: Path) -> Iterator[ApplianceProcess]:
    option = "--num-request-queues=2"
    with ApplianceProcess(store[0], tmp_path, option, sockets=("a", "b")) as process:
        yield process


def lines_of(appliance: ApplianceProcess, text: str, *, index: int = 0) -> list[str]:
    socket = str(appliance.sockets[index])
    return [
        line
        for line in appliance.log().splitlines()
        if text in line and socket in line and "more like this within" not in line
    ]


def break_ring(guest: FakeGuest) -> None:
    ring = guest.rings[1]
    ring.avail_idx = (ring.avail_idx + 5000) & 0xFFFF
    ring.kick()
    wait_readable(ring.err_fd)


def test_a_guest_that_breaks_its_ring_again_and_again_is_logged_a_few_times(
    appliance: ApplianceProcess,
) -> None:
    with HostileGuest(appliance.connect(0)) as guest, HostileGuest(appliance.connect(1)) as other:
        for _ in range(3 * LOG_LINES_MAX):
            break_ring(guest)
            guest.renew_rings()
        break_ring(other)
        assert len(lines_of(appliance, "the ring stops")) == LOG_LINES_MAX
        assert len(lines_of(appliance, "the ring stops", index=1)) == 1, "another guest's"
        assert "queue 1: avail.idx runs ahead" in lines_of(appliance, "the ring stops")[0]


def test_new_workers_bring_no_new_lines(appliance: ApplianceProcess) -> None:
    # Each connection of a front-end has new worker processes.
    for _ in range(LOG_LINES_MAX + 5):
        with HostileGuest(appliance.connect(0)) as guest:
            break_ring(guest)
    assert len(lines_of(appliance, "the ring stops")) == LOG_LINES_MAX
    assert len(lines_of(appliance, "front-end connected")) == LOG_LINES_MAX


def test_a_front_end_whose_requests_are_refused_is_logged_a_few_times(
    appliance: ApplianceProcess,
) -> None:
    with contextlib.closing(Qemu(appliance.connect(0))) as vmm:
        vmm.realize()
        vmm.front_end.acks = True
        for _ in range(5 * LOG_LINES_MAX):
            with pytest.raises(RefusedError):
                vmm.front_end.set_vring_num(1, 3)
    assert len(lines_of(appliance, "refused: SET_VRING_NUM")) == LOG_LINES_MAX


def test_what_was_dropped_is_told_at_the_end(appliance: ApplianceProcess) -> None:
    for _ in range(LOG_LINES_MAX + 7):
        appliance.connect(0).close()
        with FakeGuest(appliance.connect(1)):
            pass
    assert appliance.stop() == 0
    expected = f" 7 more like this within a minute: {appliance.sockets[1]}: front-end connected"
    assert expected in appliance.log()


def test_the_fork_server_is_told_how_to_log(store: tuple[Path, bytes], tmp_path: Path) -> None:
    options = ("--num-request-queues=1", "--log-format=json", "--log-level=warning")
    with (
        ApplianceProcess(store[0], tmp_path, *options) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.vmm.front_end.get_features()  # answered when all workers serve
        pid = appliance.process.pid
        (server,) = (child for child in descendants(pid) if parent_of(child) == pid)
        assert b"\0WARNING\0json\0" in Path(f"/proc/{server}/cmdline").read_bytes()
        assert [line for line in appliance.log().splitlines() if "READY" not in line] == []
