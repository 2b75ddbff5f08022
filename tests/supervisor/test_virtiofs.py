"""A real supervisor and real workers serve a fake guest through real rings."""

import errno
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.vhost._vhost_wire import Region
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.driver import DriverRing
from tests.fakes.frontend import FrontEnd
from tests.fakes.hostile_guest import descendants
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.fakes.vmms import CloudHypervisor, Crosvm, Uml, Vmm

pytestmark = pytest.mark.slow

ROOT = 1
LARGE = os.urandom(3 << 20)
# The tests with real guests kill ten.
NUM_KILLS = 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "store"


@pytest.fixture(scope="module")
def name(store: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tree = tmp_path_factory.mktemp("tree") / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "small").write_bytes(b"small content")
    (tree / "large").write_bytes(LARGE)
    (tree / "sub" / "script").write_bytes(b"#!/bin/sh\n")
    (tree / "sub" / "script").chmod(0o755)
    (tree / "link").symlink_to("small")
    (base_name,) = import_tree(store, tree)
    return base_name.encode()


@pytest.fixture
def appliance(store: Path, name: bytes, tmp_path: Path) -> Iterator[ApplianceProcess]:
    del name  # the tree is in the store
    with ApplianceProcess(store, tmp_path, "--num-request-queues=4") as process:
        yield process


def read_large(guest: FakeGuest, nodeid: int, *, queue: int = 1) -> bytes:
    parts: list[bytes] = []
    while part := guest.ask(
        fuse_client.read(nodeid, sum(map(len, parts)), 1 << 20), room=1 << 20, queue=queue
    ).body:
        parts.append(part)
    return b"".join(parts)


def test_a_guest_finds_and_reads_what_was_imported(
    appliance: ApplianceProcess, name: bytes
) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        top = guest.lookup(ROOT, name)
        small = guest.lookup(top, b"small")
        assert guest.ask(fuse_client.read(small, 0, 100)).body == b"small content"
        assert guest.ask(fuse_client.readlink(guest.lookup(top, b"link"))).body == b"small"
        assert read_large(guest, guest.lookup(top, b"large")) == LARGE
        script = guest.ask(fuse_client.lookup(guest.lookup(top, b"sub"), b"script"))
        assert fuse_client.parse_entry(script.body).attr.mode == 0o100555


def test_a_name_that_is_no_store_path_is_absent_and_not_remembered(
    appliance: ApplianceProcess,
) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        assert guest.ask(fuse_client.lookup(ROOT, b"nothing")).error == errno.ENOENT


def test_init_on_one_queue_opens_the_others(appliance: ApplianceProcess, name: bytes) -> None:
    with FakeGuest(appliance.connect(), num_request_queues=3) as guest:
        assert guest.ask(fuse_client.lookup(ROOT, name), queue=1).error == errno.EIO
        guest.mount(queue=2)
        for queue in (1, 2, 3):
            assert guest.ask(fuse_client.lookup(ROOT, name), queue=queue).error == 0


def test_forget_on_the_hiprio_queue_comes_back_empty(appliance: ApplianceProcess) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        guest.send(fuse_client.forget(5), room=0, queue=0)
        (used,) = guest.rings[0].collect(timeout_s=DEADLINE_S)
        assert used.length == 0


def test_status_counts_requests_by_opcode_and_names_each_worker(
    appliance: ApplianceProcess, name: bytes
) -> None:
    with FakeGuest(appliance.connect(), num_request_queues=2) as guest:
        guest.mount()
        guest.lookup(ROOT, name)
        guest.ask(fuse_client.lookup(ROOT, name), queue=2)
        (session,) = appliance.status()
        assert session["socket"] == str(appliance.sockets[0])
        assert session["requests"] == {"INIT": 1, "LOOKUP": 2}
        assert [worker["queues"] for worker in session["workers"]] == [[1], [2]]
        assert len({worker["pid"] for worker in session["workers"]}) == 2


def test_killing_a_worker_loses_no_request_and_no_count(
    appliance: ApplianceProcess, name: bytes
) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        large = guest.lookup(guest.lookup(ROOT, name), b"large")
        for kill in range(NUM_KILLS):
            pid = living_worker(appliance, restarts=kill)
            for offset in range(0, 32 << 12, 1 << 12):
                guest.send(fuse_client.read(large, offset, 4096, unique=offset + kill))
            os.kill(pid, signal.SIGKILL)
            used = guest.rings[1].collect(32, timeout_s=DEADLINE_S)
            for answer in (fuse_client.parse_reply(u.data) for u in used):
                offset = answer.unique - kill
                assert answer.error == 0
                assert answer.body == LARGE[offset : offset + 4096]
        (session,) = appliance.status()
        living_worker(appliance, restarts=NUM_KILLS)
        # If a worker is killed between counting a request and returning its chain, the request is
        # counted twice.
        assert 0 <= session["requests"]["READ"] - 32 * NUM_KILLS <= NUM_KILLS


def test_killing_the_fork_server_is_survived(appliance: ApplianceProcess, name: bytes) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        (pid,) = {w["pid"] for w in appliance.status()[0]["workers"] if w["queues"] == [1]}
        os.kill(parent_of(pid), signal.SIGKILL)
        assert guest.lookup(ROOT, name)


def test_a_fork_server_waits_for_the_first_front_end(appliance: ApplianceProcess) -> None:
    assert any(descendants(appliance.process.pid) for _ in every_event(DEADLINE_S))


def test_killing_the_supervisor_leaves_processes_only_until_the_front_end_leaves(
    appliance: ApplianceProcess, name: bytes
) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        top = guest.lookup(ROOT, name)
        (session,) = appliance.status()
        pids = [session["pid"], *(worker["pid"] for worker in session["workers"])]
        pids += [parent_of(session["pid"])]
        appliance.process.kill()
        appliance.process.wait(DEADLINE_S)
        assert guest.lookup(top, b"large")
    for _ in every_event(DEADLINE_S):
        if not any(map(is_alive, pids)):
            break
    assert not [pid for pid in pids if is_alive(pid)]


def test_a_front_end_may_leave_and_come_back(appliance: ApplianceProcess, name: bytes) -> None:
    nodeids = set()
    for _ in range(3):
        with FakeGuest(appliance.connect()) as guest:
            guest.mount()
            nodeids.add(guest.lookup(ROOT, name))
    assert len(nodeids) == 1


def test_leaving_front_ends_cost_no_descriptor_and_no_process(
    appliance: ApplianceProcess, name: bytes
) -> None:
    def visit() -> None:
        with FakeGuest(appliance.connect(), num_request_queues=2) as guest:
            guest.mount()
            guest.lookup(ROOT, name)

    visit()
    before = num_fds(appliance.process.pid)
    for _ in range(10):
        visit()
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        assert len(appliance.status()) == 1
    for _ in every_event(DEADLINE_S):
        if num_fds(appliance.process.pid) <= before:
            break
    assert num_fds(appliance.process.pid) <= before


def test_several_front_ends_are_served_at_once(store: Path, name: bytes, tmp_path: Path) -> None:
    sockets = ("a.sock", "b.sock")
    with (
        ApplianceProcess(store, tmp_path, sockets=sockets) as appliance,
        FakeGuest(appliance.connect(0)) as first,
        FakeGuest(appliance.connect(1)) as second,
    ):
        first.mount()
        # The second front-end has a session of its own, without INIT.
        assert second.ask(fuse_client.lookup(ROOT, name)).error == errno.EIO
        second.mount()
        assert first.lookup(ROOT, name) == second.lookup(ROOT, name)
        assert {s["socket"] for s in appliance.status()} == {str(p) for p in appliance.sockets}


def test_a_ring_stopped_and_started_goes_on_where_it_was(
    appliance: ApplianceProcess, name: bytes
) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        top = guest.lookup(ROOT, name)
        bases = guest.vmm.stop()
        guest.send(fuse_client.lookup(top, b"small"))  # waits in the ring
        guest.vmm.start(guest.memory, guest.rings, bases)
        (used,) = guest.rings[1].collect(timeout_s=DEADLINE_S)
        assert fuse_client.parse_reply(used.data).error == 0


def test_device_reset_ends_the_fuse_session(appliance: ApplianceProcess, name: bytes) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        bases = guest.vmm.stop()
        guest.vmm.front_end.reset_device()
        guest.vmm.start(guest.memory, guest.rings, bases)
        assert guest.ask(fuse_client.lookup(ROOT, name)).error == errno.EIO
        guest.mount()
        assert guest.lookup(ROOT, name)


def test_memory_can_come_and_go_while_rings_run(appliance: ApplianceProcess, name: bytes) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        front_end = guest.vmm.front_end
        extra = os.memfd_create("more")
        os.ftruncate(extra, 1 << 20)
        region = Region(1 << 40, 1 << 20, 1 << 41, 0)
        front_end.acks = True
        front_end.add_mem_reg(region, extra)
        assert guest.lookup(ROOT, name)
        front_end.rem_mem_reg(region)
        assert guest.lookup(ROOT, name)
        os.close(extra)


@pytest.mark.parametrize("vmm", [CloudHypervisor, Crosvm, Uml])
def test_other_front_ends_are_served(
    store: Path, name: bytes, tmp_path: Path, vmm: type[CloudHypervisor | Crosvm | Uml]
) -> None:
    with ApplianceProcess(store, tmp_path, "--tag=t", "--num-request-queues=1") as appliance:
        front_end = appliance.connect()
        with FakeGuest(front_end, vmm=new_vmm(vmm, front_end)) as guest:
            guest.mount()
            assert guest.lookup(ROOT, name)


def new_vmm(kind: type[CloudHypervisor | Crosvm | Uml], front_end: FrontEnd) -> Vmm:
    return kind(front_end)


def test_a_broken_ring_stops_alone_and_a_reset_heals_it(
    appliance: ApplianceProcess, name: bytes
) -> None:
    with FakeGuest(appliance.connect(), num_request_queues=2) as guest:
        guest.mount()
        bad = guest.rings[1]
        err_fd = bad.err_fd
        guest.vmm.front_end.set_vring_err(1, err_fd)
        bases = guest.vmm.stop()
        guest.vmm.start(guest.memory, guest.rings, bases)
        break_ring(bad)
        wait_readable(err_fd)
        assert guest.ask(fuse_client.lookup(ROOT, name), queue=2).error == 0
        assert "avail.idx" in appliance.log()


def break_ring(ring: DriverRing) -> None:
    ring.avail_idx = (ring.avail_idx + 5000) & 0xFFFF
    ring.kick()


def test_sigterm_ends_it_with_status_0_and_removes_the_socket(
    appliance: ApplianceProcess, name: bytes
) -> None:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        guest.lookup(ROOT, name)
        assert appliance.stop() == 0
    assert not appliance.sockets[0].exists()
    status = subprocess.run(
        [*APPLIANCE, "status", "--store", appliance.uri],
        check=False,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert status.returncode == 1
    assert "no supervisor is running" in status.stderr


def test_a_second_front_end_waits_for_the_first_to_leave(
    appliance: ApplianceProcess, name: bytes
) -> None:
    first = FakeGuest(appliance.connect())
    first.mount()
    assert appliance.waiting() == []
    waiting = appliance.connect()
    (at_socket,) = next(found for _ in every_event(DEADLINE_S) if (found := appliance.waiting()))
    assert at_socket == {"socket": str(appliance.sockets[0]), "pid": os.getpid()}
    state = "waits for the connected front-end to disconnect"
    line = f"{appliance.sockets[0]}: process {os.getpid()} {state}"
    assert line in appliance.status_text().splitlines()
    first.close()
    with FakeGuest(waiting) as second:
        second.mount()
        assert second.lookup(ROOT, name)
        assert appliance.waiting() == []
    (logged,) = (line for line in appliance.log().splitlines() if "waits until" in line)
    assert f"{appliance.sockets[0]}: a second front-end, process {os.getpid()}, waits" in logged


def test_a_front_end_that_gives_up_waiting_is_not_shown(appliance: ApplianceProcess) -> None:
    with FakeGuest(appliance.connect()) as first:
        first.mount()
        waiting = appliance.connect()
        assert any(appliance.waiting() for _ in every_event(DEADLINE_S))
        waiting.close()
        assert any(not appliance.waiting() for _ in every_event(DEADLINE_S))
    with FakeGuest(appliance.connect()) as next_one:
        next_one.mount()


def test_front_ends_that_come_back_at_once_are_not_said_to_wait(
    appliance: ApplianceProcess,
) -> None:
    for _ in range(3):
        with FakeGuest(appliance.connect()) as guest:
            guest.mount()
    assert "waits until" not in appliance.log()


def test_requests_without_init_are_logged_once_for_a_connection(
    store: Path, name: bytes, tmp_path: Path
) -> None:
    with ApplianceProcess(store, tmp_path, "--num-request-queues=2") as appliance:
        for num_lines in (1, 2):
            with FakeGuest(appliance.connect(), num_request_queues=2) as guest:
                for queue in (1, 2, 1):
                    answer = guest.ask(fuse_client.lookup(ROOT, name), queue=queue)
                    assert answer.error == errno.EIO
                guest.mount()
            lines = [line for line in appliance.log().splitlines() if "no INIT" in line]
            assert len(lines) == num_lines
            assert "LOOKUP is answered EIO, as all requests will be: no INIT" in lines[-1]


def living_worker(appliance: ApplianceProcess, *, restarts: int) -> int:
    """Return the pid of the worker of queue 1 once it was restarted `restarts` times."""
    for _ in every_event(DEADLINE_S):
        for worker in appliance.status()[0]["workers"]:
            if worker["queues"] == [1] and worker["restarts"] == restarts:
                return int(worker["pid"])
    raise AssertionError(f"no worker after {restarts} restarts:\n{appliance.log()}")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def num_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def wait_readable(fd: int) -> None:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    assert poller.poll(DEADLINE_S * 1000)
