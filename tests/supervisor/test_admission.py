"""Front-ends for which there are too few descriptors wait until another one leaves."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.hostile_guest import LARGE, ROOT
from tests.fakes.running_command import DEADLINE_S, every_event

pytestmark = pytest.mark.slow

NUM_SOCKETS = 12


@pytest.fixture(params=[64, 100])
def appliance(
    request: pytest.FixtureRequest, store: tuple[Path, bytes], tmp_path: Path
) -> Iterator[ApplianceProcess]:
    limit: int = request.param
    sockets = [f"{number}.sock" for number in range(NUM_SOCKETS)]
    with ApplianceProcess(store[0], tmp_path, "--num-request-queues=1", sockets=sockets) as process:
        resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        yield process
        assert "Traceback" not in process.log()
        assert "is closed" not in process.log()


def test_a_front_end_without_room_waits_and_is_served_in_turn(
    appliance: ApplianceProcess, store: tuple[Path, bytes]
) -> None:
    with contextlib.ExitStack() as stack:
        served = [stack.enter_context(FakeGuest(appliance.connect(0)))]
        front_end = appliance.connect(1)
        while not has_to_wait(appliance, served):
            served.append(stack.enter_context(FakeGuest(front_end)))
            front_end = appliance.connect(len(served))
        for guest in served:
            guest.mount()
            large = guest.lookup(guest.lookup(ROOT, store[1]), b"large")
            assert guest.ask(fuse_client.read(large, 0, 4096)).body == LARGE[:4096]
    with FakeGuest(front_end) as guest:
        guest.mount()
        assert guest.lookup(ROOT, store[1])


def has_to_wait(appliance: ApplianceProcess, served: list[FakeGuest]) -> bool:
    """Return whether the front-end that connected after those served has to wait."""
    start = f": {appliance.sockets[len(served)]}: "
    for _ in every_event(DEADLINE_S):
        if f"{start}front-end connected" in appliance.log():
            break
    served[0].vmm.front_end.get_features()  # the event loop has decided before it answers
    return any(
        start in line and "it waits for one to leave" in line
        for line in appliance.log().splitlines()
    )


def test_large_files_are_read_with_few_descriptors(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    contents = {b"file%d" % number: os.urandom(100_000) for number in range(100)}
    for name, content in contents.items():
        (tree / name.decode()).write_bytes(content)
    (base_name,) = import_tree(tmp_path / "store", tree)
    with ApplianceProcess(tmp_path / "store", tmp_path, "--num-request-queues=1") as appliance:
        resource.prlimit(appliance.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        with FakeGuest(appliance.connect()) as guest:
            guest.mount()
            top = guest.lookup(ROOT, base_name.encode())
            for name, content in contents.items():
                answer = guest.ask(fuse_client.read(guest.lookup(top, name), 0, 4096))
                assert answer.body == content[:4096]
