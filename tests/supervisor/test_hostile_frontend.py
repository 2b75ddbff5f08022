"""Front-ends that vanish, lie or flood a real supervisor, which must serve others unaffected."""

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from appliance.vhost._vhost_wire import (
    Header,
    HeaderFlag,
    Inflight,
    Region,
    RequestNumber,
    pack_header,
)
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.driver import EVENTFD, DriverRing, GuestMemory
from tests.fakes.frontend import BackendGoneError, FrontEnd, OutOfMessagesError, RefusedError
from tests.fakes.hostile_guest import (
    ROOT,
    await_quiet,
    descendants,
    full_pipe,
    memory_kib,
    num_fds,
    wait_readable,
)
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.vmms import CloudHypervisor, Qemu, Uml, Vmm

pytestmark = pytest.mark.slow

QUEUE_SIZE: Final = 1024
NUM_CONNECTS: Final = 200


@pytest.fixture(scope="module")
def appliance(
    store: tuple[Path, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApplianceProcess]:
    directory = tmp_path_factory.mktemp("run")
    options = ("--num-request-queues=1", "--tag=t", f"--queue-size={QUEUE_SIZE}")
    with ApplianceProcess(store[0], directory, *options, sockets=("a", "b")) as process:
        visit(process)  # starts the fork server
        yield process


@pytest.fixture(autouse=True)
def _nothing_is_left_and_no_bug_shows(appliance: ApplianceProcess) -> Iterator[None]:
    pid = appliance.process.pid
    await_quiet(pid, fds=num_fds(pid))
    fds = num_fds(pid)
    log_start = len(appliance.log())
    yield
    visit(appliance)
    await_quiet(pid, fds=fds)
    assert "Traceback" not in appliance.log()[log_start:]


def visit(appliance: ApplianceProcess) -> None:
    """Connect to the attacked socket as a well-behaved guest, which must be served."""
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        assert guest.ask(fuse_client.getattr_(ROOT)).error == 0


@pytest.fixture
def neighbour(appliance: ApplianceProcess, store: tuple[Path, bytes]) -> Iterator[FakeGuest]:
    with FakeGuest(appliance.connect(1)) as guest:
        guest.mount()
        pids = descendants(appliance.process.pid)
        yield guest
        assert guest.lookup(ROOT, store[1])
        assert pids <= descendants(appliance.process.pid)


# --- Leaving ---


def load_rings(memory: GuestMemory) -> list[DriverRing]:
    """Return rings that contain requests before they are started."""
    hiprio, requests = DriverRing(memory, 128), DriverRing(memory, 128)
    hiprio.add_chain([fuse_client.forget(5)], [])
    requests.add_chain([fuse_client.init()], [4096])
    for _ in range(30):
        requests.add_chain([fuse_client.statfs()], [4096])
    hiprio.publish()
    requests.publish()
    return [hiprio, requests]


@contextlib.contextmanager
def started_qemu(
    appliance: ApplianceProcess, memory: GuestMemory
) -> Iterator[tuple[Qemu, list[DriverRing]]]:
    rings = load_rings(memory)
    with ready_qemu(appliance) as vmm:
        vmm.start(memory, rings)
        yield vmm, rings
    for ring in rings:
        ring.close()


@contextlib.contextmanager
def ready_qemu(appliance: ApplianceProcess) -> Iterator[Qemu]:
    with contextlib.closing(Qemu(appliance.connect(0))) as vmm:
        vmm.realize()
        yield vmm


def run_until_cut(vmm: Vmm, memory: GuestMemory, rings: list[DriverRing]) -> bool:
    """Run a front-end's whole life; return whether it was cut short."""
    try:
        vmm.realize()
        vmm.start(memory, rings)
        vmm.stop()
    except OutOfMessagesError:
        return True
    return False


@pytest.mark.parametrize("kind", [Qemu, Uml])
def test_a_front_end_may_vanish_after_any_message(
    appliance: ApplianceProcess, neighbour: FakeGuest, kind: type[Qemu | Uml]
) -> None:
    max_messages = 0
    is_cut = True
    while is_cut:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.fspath(appliance.sockets[0]))
        front_end = FrontEnd(sock, max_messages=max_messages)
        vmm: Vmm = kind(front_end)
        with GuestMemory() as memory:
            rings = load_rings(memory)
            is_cut = run_until_cut(vmm, memory, rings)
            vmm.close()
            for ring in rings:
                ring.close()
        max_messages += 1
    assert max_messages > 20
    assert neighbour.ask(fuse_client.statfs()).error == 0


def test_memory_of_a_guest_that_left_is_no_longer_touched(appliance: ApplianceProcess) -> None:
    with GuestMemory() as memory, started_qemu(appliance, memory) as (vmm, rings):
        vmm.front_end.sock.shutdown(socket.SHUT_WR)
        assert vmm.front_end.sock.recv(1) == b""  # the back-end has closed guest memory
        for ring in rings:
            ring.add_chain([fuse_client.statfs()], [4096])
            ring.publish()
        before = memory.image()
        visit(appliance)
        assert memory.image() == before


def test_200_connections_cost_the_supervisor_no_memory(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    pid = appliance.process.pid

    def connect(count: int) -> None:
        for number in range(count):
            if number % 10 == 0:
                visit(appliance)
            else:
                with ready_qemu(appliance):
                    pass

    connect(40)  # until allocator and caches have reached their size
    before = memory_kib(pid, "Rss")
    connect(NUM_CONNECTS)
    assert memory_kib(pid, "Rss") - before <= 1024
    assert neighbour.ask(fuse_client.statfs()).error == 0


# --- Lying ---


@pytest.mark.parametrize("seed", range(20))
def test_garbage_on_the_socket_closes_it(
    appliance: ApplianceProcess, neighbour: FakeGuest, seed: int
) -> None:
    rng = random.Random(seed)
    front_end = appliance.connect(0)
    flags = rng.choice([0, 1, 2, 3, 5, 9, rng.getrandbits(32)])
    header = Header(
        rng.choice([0, 5, 200, 1 << 31]), flags, rng.choice([4097, 1 << 20, 1 << 32]) - 1
    )
    garbage = rng.choice([rng.randbytes(200), pack_header(header) + rng.randbytes(4096)])
    fd = os.memfd_create("x")
    socket.send_fds(front_end.sock, [garbage], [fd] * rng.randrange(32))
    front_end.sock.shutdown(socket.SHUT_WR)
    with pytest.raises(BackendGoneError):
        front_end.receive(0, 0)
    os.close(fd)
    front_end.close()
    assert neighbour.ask(fuse_client.statfs()).error == 0


def test_a_region_beyond_its_file_is_refused(appliance: ApplianceProcess) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, 1 << 20)
    with ready_qemu(appliance) as vmm:
        vmm.front_end.acks = True
        for offset, size in ((0, (1 << 20) + 4096), (1 << 20, 4096), (4096, 1 << 20), (0, 1 << 62)):
            with pytest.raises(RefusedError):
                vmm.front_end.add_mem_reg(Region(0, size, 1 << 40, offset), fd)
        vmm.front_end.add_mem_reg(Region(0, 1 << 20, 1 << 40, 0), fd)
    os.close(fd)


def test_a_memory_table_beyond_its_file_ends_the_connection(appliance: ApplianceProcess) -> None:
    with GuestMemory() as memory, ready_qemu(appliance) as vmm:
        os.ftruncate(memory.fd, 4096)
        vmm.front_end.set_mem_table(memory)
        with pytest.raises(BackendGoneError):
            vmm.front_end.get_features()


@pytest.mark.parametrize("num", [0, 3, 2 * QUEUE_SIZE, 1 << 16, (1 << 32) - 1])
def test_a_ring_size_out_of_range_is_refused(appliance: ApplianceProcess, num: int) -> None:
    with ready_qemu(appliance) as vmm:
        vmm.front_end.acks = True
        with pytest.raises(RefusedError):
            vmm.front_end.set_vring_num(1, num)


def test_guest_memory_that_shrinks_harms_only_its_owner(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        before = descendants(appliance.process.pid)
        os.ftruncate(guest.memory.fd, 4096)  # the next access of the worker raises SIGBUS
        os.write(guest.rings[1].kick_fd, EVENTFD.pack(1))
        for _ in every_event(DEADLINE_S):
            if not before <= descendants(appliance.process.pid):
                break
        assert neighbour.ask(fuse_client.statfs()).error == 0
        os.ftruncate(guest.memory.fd, guest.memory.size)


def test_an_inflight_buffer_that_shrinks_harms_only_its_owner(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 1 << 20)
    front_end = appliance.connect(0)
    vmm = CloudHypervisor(front_end, inflight=(Inflight(1 << 20, 0, 2, QUEUE_SIZE), fd))
    vmm.realize()
    with GuestMemory() as memory:
        rings = load_rings(memory)
        front_end.set_inflight_fd(Inflight(1 << 20, 0, 2, QUEUE_SIZE), fd)
        os.ftruncate(fd, 0)
        with pytest.raises((RefusedError, BackendGoneError)):
            vmm.start(memory, rings)
        assert neighbour.ask(fuse_client.statfs()).error == 0
        for ring in rings:
            ring.close()
    vmm.close()


def restart_until_refused(vmm: CloudHypervisor) -> None:
    for _ in every_event(DEADLINE_S):
        vmm.pause()
        vmm.resume()


def test_an_inflight_buffer_that_shrinks_under_its_rings_harms_only_its_owner(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    front_end = appliance.connect(0)
    fd = os.memfd_create("inflight")
    os.ftruncate(fd, 1 << 20)
    vmm = CloudHypervisor(front_end, inflight=(Inflight(1 << 20, 0, 2, QUEUE_SIZE), fd))
    with FakeGuest(front_end, vmm=vmm) as guest:
        guest.mount()
        os.ftruncate(fd, 0)
        guest.send(fuse_client.statfs())
        with pytest.raises((RefusedError, BackendGoneError)):
            restart_until_refused(vmm)
        assert neighbour.ask(fuse_client.statfs()).error == 0


@pytest.mark.parametrize("kind", ["file", "directory", "/dev/null"])
def test_a_kick_descriptor_that_cannot_be_waited_for_is_refused(
    appliance: ApplianceProcess, neighbour: FakeGuest, tmp_path: Path, kind: str
) -> None:
    path = {"file": tmp_path / "file", "directory": tmp_path}.get(kind, Path(kind))
    (tmp_path / "file").touch()
    with GuestMemory() as memory, started_qemu(appliance, memory) as (vmm, _rings):
        kick = os.open(path, os.O_RDONLY)
        vmm.front_end.set_vring_kick(1, kick)
        os.close(kick)
        with pytest.raises(BackendGoneError):
            vmm.front_end.get_features()
    assert neighbour.ask(fuse_client.statfs()).error == 0


def test_a_kick_pipe_that_ends_breaks_its_ring(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    with GuestMemory() as memory, started_qemu(appliance, memory) as (vmm, rings):
        reader, writer = os.pipe()
        vmm.front_end.set_vring_err(1, rings[1].err_fd)
        vmm.front_end.set_vring_kick(1, reader)
        os.close(reader)
        os.close(writer)
        wait_readable(rings[1].err_fd)
        assert vmm.front_end.get_vring_base(1) >= 0
    assert neighbour.ask(fuse_client.statfs()).error == 0


# --- Flooding ---


def test_a_storm_of_kicks_slows_nobody_down(
    appliance: ApplianceProcess, neighbour: FakeGuest, store: tuple[Path, bytes]
) -> None:
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        for number in range(2000):
            for ring in guest.rings:
                ring.kick()
            if number % 100 == 0:
                assert guest.ask(fuse_client.lookup(ROOT, store[1])).error == 0
                assert neighbour.ask(fuse_client.lookup(ROOT, store[1])).error == 0
        # The largest count that an eventfd holds, so that the next write would block.
        os.eventfd_write(guest.rings[1].kick_fd, (1 << 64) - 3 - (1 << 32))
        assert guest.lookup(ROOT, store[1])


def test_ring_starts_and_stops_without_end_are_served(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        for _ in range(50):
            bases = guest.vmm.stop()
            guest.vmm.start(guest.memory, guest.rings, bases)
            assert guest.ask(fuse_client.getattr_(ROOT)).error == 0
            assert neighbour.ask(fuse_client.getattr_(ROOT)).error == 0


def send_without_end(sock: socket.socket, data: bytes) -> None:
    while True:
        sock.send(data)


def test_requests_without_a_reader_of_replies_block_nobody_else(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    with contextlib.closing(appliance.connect(0)) as front_end:
        front_end.sock.settimeout(0)
        message = pack_header(Header(RequestNumber.GET_FEATURES, HeaderFlag.VERSION_1, 0))
        with pytest.raises(BlockingIOError):
            send_without_end(front_end.sock, message * 100)
        for _ in range(20):
            assert neighbour.ask(fuse_client.getattr_(ROOT)).error == 0


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_replaced(
    appliance: ApplianceProcess, neighbour: FakeGuest
) -> None:
    def stop_worker() -> None:
        for session in appliance.status():
            for worker in session["workers"]:
                if (session["socket"], worker["queues"]) == (str(appliance.sockets[0]), [1]):
                    os.kill(worker["pid"], signal.SIGSTOP)

    with FakeGuest(appliance.connect(0)) as guest:
        guest.mount()
        front_end = guest.vmm.front_end
        front_end.get_features()  # answered when all workers serve
        stop_worker()
        assert guest.ask(fuse_client.statfs()).error == 0, "while it waits"
        stop_worker()
        front_end.sock.settimeout(DEADLINE_S)
        assert front_end.get_vring_base(1) == guest.rings[1].avail_idx, "while the VMM waits"
        assert f"{appliance.sockets[0]} queue 1: worker" in appliance.log()
    assert neighbour.ask(fuse_client.statfs()).error == 0


@pytest.mark.parametrize("kind", ["full pipe", "nearly full pipe", "full eventfd", "file"])
def test_a_call_descriptor_without_room_makes_no_worker_wait(
    appliance: ApplianceProcess, neighbour: FakeGuest, tmp_path: Path, kind: str
) -> None:
    with contextlib.ExitStack() as stack:
        call = stack.enter_context(a_descriptor(kind, tmp_path / "file"))
        guest = stack.enter_context(FakeGuest(appliance.connect(0)))
        guest.mount()
        front_end, ring = guest.vmm.front_end, guest.rings[1]
        front_end.set_vring_call(1, call)
        for _ in range(40):
            guest.send(fuse_client.statfs())
        for _ in every_event(DEADLINE_S):
            if ring.used_idx == ring.avail_idx:
                break
        assert front_end.get_vring_base(1) == ring.avail_idx, "its worker answers"
    assert neighbour.ask(fuse_client.statfs()).error == 0


@contextlib.contextmanager
def a_descriptor(kind: str, path: Path) -> Iterator[int]:
    """Yield a blocking descriptor: a file, or one whose next write would block."""
    if kind == "file":
        fds = [os.open(path, os.O_WRONLY | os.O_CREAT)]
    elif kind == "full eventfd":
        fds = [os.eventfd(0)]
        os.eventfd_write(fds[0], 2**64 - 2)
    else:
        fds = list(full_pipe(0 if kind == "full pipe" else 7))
    yield fds[-1]
    for fd in fds:
        os.close(fd)
