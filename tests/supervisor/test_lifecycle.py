"""The life of `appliance virtiofs`: failing starts, processes killed under load, memory, end."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.hostile_guest import LARGE, ROOT, descendants, make_tree, memory_kib, parent_of
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

pytestmark = pytest.mark.slow

NUM_QUEUES: Final = 4
KILLING_S: Final = 4.0
PIECE: Final = 4096
WORKER_MEMORY_KIB: Final = 8 << 10


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("store") / "store"
    (name,) = import_tree(path, make_tree(tmp_path_factory.mktemp("tree")))
    return path, name.encode()


@pytest.fixture
def appliance(store: tuple[Path, bytes], tmp_path: Path) -> Iterator[ApplianceProcess]:
    with ApplianceProcess(store[0], tmp_path, f"--num-request-queues={NUM_QUEUES}") as process:
        yield process


@pytest.fixture
def guest(appliance: ApplianceProcess) -> Iterator[FakeGuest]:
    with FakeGuest(appliance.connect(), num_request_queues=NUM_QUEUES) as guest:
        guest.mount()
        yield guest


# --- Under load ---


class Load:
    """Keeps reads of the large file outstanding on every request queue and checks each answer."""

    def __init__(self, guest: FakeGuest, name: bytes) -> None:
        self.num_answered = 0
        self._guest = guest
        self._nodeid = guest.lookup(guest.lookup(ROOT, name), b"large")
        self._outstanding: dict[int, int] = {}
        self._unique = 0

    def fill(self) -> None:
        """Send 16 reads to each queue."""
        for queue in range(1, NUM_QUEUES + 1):
            for _ in range(16):
                self._unique += 1
                offset = self._unique * PIECE % len(LARGE)
                self._outstanding[self._unique] = offset
                request = fuse_client.read(self._nodeid, offset, PIECE, unique=self._unique)
                self._guest.send(request, queue=queue)

    def drain(self) -> None:
        """Wait for all answers and check that each request got one, with the right bytes."""
        for queue in range(1, NUM_QUEUES + 1):
            for used in self._guest.rings[queue].collect(16, timeout_s=DEADLINE_S):
                answer = fuse_client.parse_reply(used.data)
                offset = self._outstanding.pop(answer.unique)  # KeyError: answered twice
                assert answer.error == 0
                assert answer.body == LARGE[offset : offset + PIECE]
                self.num_answered += 1
        assert not self._outstanding


def worker_pids(appliance: ApplianceProcess, sessions: set[int]) -> list[int]:
    """Return the living workers: the processes below the fork server, except `sessions`."""
    supervisor = appliance.process.pid
    below = [pid for pid in descendants(supervisor) if parent_of_or_0(pid) not in {0, supervisor}]
    return [pid for pid in below if pid not in sessions]


def session_pids(appliance: ApplianceProcess) -> set[int]:
    return {session["pid"] for session in appliance.status()}


def parent_of_or_0(pid: int) -> int:
    try:
        return parent_of(pid)
    except FileNotFoundError:
        return 0


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_workers_killed_at_random_moments_lose_and_repeat_no_request(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    rng = random.Random(4)
    load = Load(guest, store[1])
    sessions = session_pids(appliance)
    end_s = time.monotonic() + KILLING_S
    num_killed = 0
    while time.monotonic() < end_s:
        load.fill()
        for pid in rng.sample(pids := worker_pids(appliance, sessions), min(2, len(pids))):
            kill(pid)
            num_killed += 1
        load.drain()
    assert num_killed > 4
    assert load.num_answered >= 128
    assert appliance.process.poll() is None


def test_the_fork_server_killed_under_load_loses_and_repeats_no_request(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    load = Load(guest, store[1])
    for _ in range(3):
        load.fill()
        for pid in descendants(appliance.process.pid):
            if parent_of_or_0(pid) == appliance.process.pid:
                kill(pid)
        load.drain()
    assert load.num_answered == 3 * 16 * NUM_QUEUES


def group_members(group: int) -> set[int]:
    """Return the processes of a process group."""
    members = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int(path.read_text().rpartition(")")[2].split()[2]) == group:
                members.add(int(path.parent.name))
    return members


@pytest.mark.parametrize("queues", ["in use", "new"])
def test_sigterm_under_load_ends_everything_with_status_0(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes], queues: str
) -> None:
    load = Load(guest, store[1])
    group = appliance.process.pid
    if queues == "in use":
        load.fill()
        load.drain()
        assert len(group_members(group)) > NUM_QUEUES
    load.fill()  # which starts the workers of queues that are new
    assert appliance.stop() == 0
    for _ in every_event(DEADLINE_S):
        if not group_members(group):
            break
    assert not group_members(group)
    assert not appliance.sockets[0].exists()
    assert "Traceback" not in appliance.log()


def test_the_end_of_its_terminal_ends_everything_with_status_0(
    appliance: ApplianceProcess, guest: FakeGuest, store: tuple[Path, bytes]
) -> None:
    assert guest.lookup(ROOT, store[1])
    os.killpg(appliance.process.pid, signal.SIGHUP)  # to the whole group, as the kernel does
    assert appliance.process.wait(DEADLINE_S) == 0
    assert not appliance.sockets[0].exists()
    assert "Traceback" not in appliance.log()
    assert "starting another" not in appliance.log()


# --- Memory ---


def test_a_worker_keeps_at_most_8_mib_of_memory_to_itself(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Measures Private_Dirty: pages that the process has written and shares with no other one."""
    tree = tmp_path_factory.mktemp("many") / "many"
    num_directories, num_files = 50, 100
    for directory in range(num_directories):
        (tree / f"d{directory}").mkdir(parents=True)
        for number in range(num_files):
            (tree / f"d{directory}" / f"f{number}").write_bytes(b"%d %d" % (directory, number))
    (tree / "big").write_bytes(os.urandom(50 << 20))
    path = tmp_path / "store"
    (name,) = import_tree(path, tree)
    with (
        ApplianceProcess(path, tmp_path, "--num-request-queues=1") as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        top = guest.lookup(ROOT, name.encode())
        for directory in range(num_directories):
            parent = guest.lookup(top, b"d%d" % directory)
            for number in range(num_files):
                nodeid = guest.lookup(parent, b"f%d" % number)
                body = guest.ask(fuse_client.read(nodeid, 0, PIECE)).body
                assert body == b"%d %d" % (directory, number)
        big = guest.lookup(top, b"big")
        for offset in range(0, 50 << 20, 1 << 20):
            answer = guest.ask(fuse_client.read(big, offset, 1 << 20), room=1 << 20)
            assert len(answer.body) == 1 << 20
        private = {
            pid: memory_kib(pid, "Private_Dirty")
            for pid in worker_pids(appliance, session_pids(appliance))
        }
        print(f"Private_Dirty in KiB by worker: {private}")
        assert len(private) == 1
        assert max(private.values()) <= WORKER_MEMORY_KIB


# --- Starts that fail ---


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*APPLIANCE, *arguments], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )


def refusals(directory: Path) -> Sequence[tuple[list[str], int, str]]:
    """Return (options, exit status, a part of the error) of starts that must fail."""
    file = directory / "file"
    socket_path = os.fspath(directory / "fs.sock")
    store = f"--store=lmdb://{directory}/store"
    return [
        ([store, "/tmp/" + "x" * 120], 2, "has 125 bytes, at most 107 are allowed"),
        ([store, os.fspath(file)], 2, "exists and is not a socket"),
        ([store, os.fspath(directory / "no" / "such" / "fs.sock")], 2, "No such file"),
        ([store], 2, "needs a SOCKET"),
        ([store, "--fd=0"], 2, "--fd=0"),
        ([store, "--fd=99"], 2, "--fd=99"),
        ([f"--store=lmdb://{file}", socket_path], 2, f"--store lmdb://{file}: {file} is not a dir"),
        (
            [store, f"--state-dir={file}/state", socket_path],
            2,
            f"--state-dir {file}/state: {file} is",
        ),
        ([store, "--state-dir=/proc/state", socket_path], 1, "/proc/state"),
        ([store, "--tag=", socket_path], 2, "--tag '': has 0 bytes, expected 1 to 36"),
        ([store, "--tag=" + "t" * 37, socket_path], 2, "has 37 bytes, expected 1 to 36"),
        ([store, "--queue-size=0", socket_path], 2, "--queue-size 0"),
        ([store, "--queue-size=100", socket_path], 2, "--queue-size 100"),
        ([store, "--queue-size=65536", socket_path], 2, "--queue-size 65536"),
        ([store, "--num-request-queues=0", socket_path], 2, "--num-request-queues 0"),
        (["--store=lmdb:///\udcff", socket_path], 2, "the path is not UTF-8"),
        (["--store=redis://host/x", socket_path], 2, "--store: service address redis://host/x: "),
        (["--store=lmdb://host/x", socket_path], 2, "has a host"),
        ([store, "--poll-us=-1", socket_path], 2, "--poll-us -1: expected 0 to 1000000"),
        ([store, "--poll-us=1000001", socket_path], 2, "--poll-us 1000001: expected 0"),
        (["--store=lmdb:relative", socket_path], 2, "absolute"),
    ]


@pytest.mark.parametrize("case", range(21))
def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path, case: int) -> None:
    (tmp_path / "file").write_text("not a store")
    options, status, text = refusals(tmp_path)[case]
    result = run("virtiofs", *options)
    print(result.stderr)
    assert result.returncode == status
    (line,) = result.stderr.splitlines()
    assert line.startswith("appliance: ")
    assert text in line
    assert result.stdout == ""
    assert not (tmp_path / "fs.sock").exists()


@pytest.mark.parametrize("command", [("virtiofs", "/nowhere/fs.sock"), ("mount", "/tmp")])
def test_the_way_of_answering_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, str]
) -> None:
    monkeypatch.setenv("APPLIANCE_ANSWERS", "rust")
    result = run(command[0], f"--store=lmdb://{tmp_path}/store", command[1])
    assert result.returncode == 2
    assert result.stderr == "appliance: APPLIANCE_ANSWERS=rust: expected c or python\n"
    assert not (tmp_path / "store").exists()


def test_a_socket_in_use_is_left_to_its_owner(appliance: ApplianceProcess) -> None:
    path = os.fspath(appliance.sockets[0])
    result = run("virtiofs", f"--store=lmdb://{appliance.store}", path)
    assert result.returncode == 2
    assert result.stderr == f"appliance: socket path {path}: another process listens there\n"
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()


def test_a_socket_whose_owner_is_stuck_is_left_to_it(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "fs.sock")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen(0)
        client.connect(path)  # fills the backlog
        result = run("virtiofs", f"--store=lmdb://{tmp_path}/store", path)
    assert result.returncode == 2
    assert result.stderr == f"appliance: socket path {path}: another process listens there\n"


def test_the_socket_of_a_killed_supervisor_is_replaced(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    first = ApplianceProcess(store[0], tmp_path)
    first.process.kill()
    first.process.wait(DEADLINE_S)
    assert first.sockets[0].is_socket()
    with (
        ApplianceProcess(store[0], tmp_path) as second,
        FakeGuest(second.connect()) as guest,
    ):
        guest.mount()
        assert guest.lookup(ROOT, store[1])
    assert not first.sockets[0].exists()


# --- Status ---


def test_status_shows_sessions_workers_and_request_counts(
    appliance: ApplianceProcess, store: tuple[Path, bytes]
) -> None:
    options = ("status", f"--store=lmdb://{store[0]}")
    first, second = run(*options).stdout.splitlines()
    pid = appliance.process.pid
    assert re.fullmatch(rf"supervisor {pid}, [\d.]+, up \d+ s; store {store[0]}: 1 paths", first)
    assert second == "no front-end is connected"
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        guest.lookup(ROOT, store[1])
        guest.vmm.front_end.get_features()  # answered when all workers serve
        pids = [worker["pid"] for worker in appliance.status()[0]["workers"]]
        lines = run(*options).stdout.splitlines()
        head, holds, memory, requests = lines[1:3], lines[3:5], lines[5], lines[6:-1]
        assert re.fullmatch(r"  memory: [1-9][\d.]+ MiB", memory)
        assert lines[-1] == "  wanted root_name: ok 1"
        assert re.fullmatch(r"  lease: \d+-[0-9a-f]+", holds[0])
        assert holds[1] == "  paths: 1"
        assert head == [
            os.fspath(appliance.sockets[0]),
            f"  worker {pids[0]}: queue 1, 0 restarts",
        ]
        for line, opcode in zip(requests, ("INIT", "LOOKUP"), strict=True):
            assert re.fullmatch(rf"  {opcode} +1   p50 < [\d,.]+ us   p99 < [\d,.]+ us", line)


def test_status_without_a_supervisor_is_one_line_and_status_1(tmp_path: Path) -> None:
    result = run("status", f"--store=lmdb://{tmp_path}/store")
    assert result.returncode == 1
    assert result.stderr == f"appliance: no supervisor is running on {tmp_path}/store.state\n"
    assert list(tmp_path.iterdir()) == []


def test_a_client_of_the_status_socket_that_says_nothing_harms_nobody(
    appliance: ApplianceProcess,
) -> None:
    directory = appliance.store.with_name("store.state") / "supervisors"
    path = directory / str(appliance.process.pid)
    idle = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    for sock in idle:
        sock.connect(os.fspath(path))
    assert appliance.status() == []
    for sock in idle:
        sock.close()
