"""Several front-ends on one socket, each with a session of its own (--max-front-ends)."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.hostile_guest import ROOT
from tests.fakes.running_command import DEADLINE_S, every_event

pytestmark = pytest.mark.slow

OPTIONS = ("--num-request-queues=1", "--max-front-ends=2")


@pytest.fixture
def appliance(store: tuple[Path, bytes], tmp_path: Path) -> Iterator[ApplianceProcess]:
    with ApplianceProcess(store[0], tmp_path, *OPTIONS) as process:
        yield process


def test_a_second_front_end_has_a_session_of_its_own(
    appliance: ApplianceProcess, store: tuple[Path, bytes]
) -> None:
    with FakeGuest(appliance.connect()) as first, FakeGuest(appliance.connect()) as second:
        first.mount()
        assert second.ask(fuse_client.lookup(ROOT, store[1])).error == errno.EIO
        second.mount()
        assert first.lookup(ROOT, store[1]) == second.lookup(ROOT, store[1])
        sessions = appliance.status()
        assert [session["socket"] for session in sessions] == [str(appliance.sockets[0])] * 2
        assert len({session["pid"] for session in sessions}) == 2
        assert appliance.waiting() == []
        second.vmm.front_end.close()
        for _ in every_event(DEADLINE_S):
            if len(appliance.status()) == 1:
                break
        assert first.lookup(ROOT, store[1])


def test_more_front_ends_than_may_be_served_wait(
    appliance: ApplianceProcess, store: tuple[Path, bytes]
) -> None:
    with contextlib.ExitStack() as stack:
        served = [stack.enter_context(FakeGuest(appliance.connect())) for _ in range(2)]
        for guest in served:
            guest.mount()
        waiting = appliance.connect()
        (row,) = next(found for _ in every_event(DEADLINE_S) if (found := appliance.waiting()))
        assert row["socket"] == str(appliance.sockets[0])
        served[0].vmm.front_end.close()
        third = stack.enter_context(FakeGuest(waiting))
        third.mount()
        for guest in (served[1], third):
            assert guest.lookup(ROOT, store[1])
        assert appliance.waiting() == []
        assert len(appliance.status()) == 2


def test_all_front_ends_of_a_socket_are_taken_over(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    first = ApplianceProcess(store[0], tmp_path, *OPTIONS)
    with FakeGuest(first.connect()) as one, FakeGuest(first.connect()) as other:
        guests = (one, other)
        for guest in guests:
            guest.mount()
        pids = {session["pid"] for session in first.status()}
        first.process.kill()
        first.process.wait(DEADLINE_S)
        with ApplianceProcess(store[0], tmp_path, *OPTIONS) as second:
            assert {session["pid"] for session in second.status()} == pids
            for guest in guests:
                assert guest.lookup(ROOT, store[1])
            with contextlib.closing(second.connect()):
                assert any(second.waiting() for _ in every_event(DEADLINE_S))
