"""What a supervisor tells the service manager, and its log when it gets SIGUSR1."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.running_command import DEADLINE_S, every_event

pytestmark = pytest.mark.slow

ALLOWED_S = 0.9
SILENCE = "the fork server does not answer"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.fspath(tmp_path / "notify"))
        sock.settimeout(DEADLINE_S)
        yield sock


@pytest.fixture
def watched(
    manager: socket.socket, store: tuple[Path, bytes], tmp_path: Path
) -> Iterator[ApplianceProcess]:
    variables = (f"NOTIFY_SOCKET={manager.getsockname()}", f"WATCHDOG_USEC={int(ALLOWED_S * 1e6)}")
    prefix = ("env", *variables)
    with ApplianceProcess(store[0], tmp_path, prefix=prefix) as process:
        yield process


def wait_for(manager: socket.socket, message: str) -> None:
    while manager.recv(4096).decode() != message:
        pass


def fork_server_of(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (found,) = (
        int(child)
        for child in children
        if b"appliance.worker.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return found


def test_a_fork_server_that_hangs_gives_no_sign_of_life(
    watched: ApplianceProcess, manager: socket.socket
) -> None:
    wait_for(manager, "READY=1")
    wait_for(manager, "WATCHDOG=1")
    with FakeGuest(watched.connect()) as guest:
        guest.mount()
        wait_for(manager, "STATUS=1 served, by 1 worker")
        fork_server = fork_server_of(watched.process.pid)
        os.kill(fork_server, signal.SIGSTOP)
        for _ in every_event(DEADLINE_S):
            if SILENCE in watched.log():
                break
        manager.settimeout(0)
        with suppress(BlockingIOError):
            while True:
                manager.recv(4096)
        # For longer than the watchdog would wait, there is nothing.
        for _ in every_event(DEADLINE_S):
            if watched.log().count(SILENCE) >= 4:
                break
        with pytest.raises(BlockingIOError):
            manager.recv(4096)
        # Guests do not notice.
        assert guest.ask(fuse_client.statfs()).error == 0
        manager.settimeout(DEADLINE_S)
        os.kill(fork_server, signal.SIGCONT)
        wait_for(manager, "WATCHDOG=1")
    wait_for(manager, "STATUS=0 served, by 0 workers")


def test_a_watchdog_for_another_process_is_left_alone(
    manager: socket.socket, store: tuple[Path, bytes], tmp_path: Path
) -> None:
    variables = (f"NOTIFY_SOCKET={manager.getsockname()}", "WATCHDOG_USEC=30000", "WATCHDOG_PID=1")
    with ApplianceProcess(store[0], tmp_path, prefix=("env", *variables)) as process:
        with FakeGuest(process.connect()) as guest:
            guest.mount()
            seen: set[bytes] = set()
            while not any(message.startswith(b"STATUS=1 served") for message in seen):
                seen.add(manager.recv(4096))
        assert b"WATCHDOG=1" not in seen


def test_a_signal_has_every_session_logged_and_disturbs_none(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    sockets = ("one.sock", "two.sock")
    with (
        ApplianceProcess(store[0], tmp_path, sockets=sockets) as process,
        FakeGuest(process.connect(0)) as one,
        FakeGuest(process.connect(1)) as two,
    ):
        one.mount()
        two.mount()
        two.lookup(1, store[1])
        # As `systemctl kill` sends it: to every process of the service.
        os.killpg(process.process.pid, signal.SIGUSR1)
        states: dict[str, str] = {}
        for _ in every_event(DEADLINE_S):
            states = dict(re.findall(r"state of \S*/(\w+)\.sock: (\{.*\})", process.log()))
            if len(states) == 2:
                break
        assert json.loads(states["one"])["requests"] == {"INIT": 1}
        state = json.loads(states["two"])
        assert state["requests"] == {"INIT": 1, "LOOKUP": 1}
        assert state["wants"] == {"root_name": {"ok": 1}}
        assert len(state["workers"]) == 1
        assert one.ask(fuse_client.statfs()).error == two.ask(fuse_client.statfs()).error == 0
        restarts = [worker["restarts"] for row in process.status() for worker in row["workers"]]
        assert restarts == [0, 0]
