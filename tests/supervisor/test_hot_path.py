"""Under load: who answers, which system calls a worker makes, and what polling and idling cost."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from appliance.bench.bench_guest import BenchGuest
from appliance.bench.phases import GuestPhases, Load
from appliance.bench.tree_walk import GuestTree
from appliance.session.ring_worker import LOOK_S
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.fuse_client import ROOT
from tests.fakes.running_command import DEADLINE_S, every_event

pytestmark = pytest.mark.slow

OPS: Final = ("lookup", "miss", "getattr", "readlink", "readdirplus", "read4k", "read128k")
BIG: Final = 300_000
# What one turn of the loop may call. epoll_wait is called again for a look at the control channel.
LOOP_CALLS: Final = {"epoll_wait", "write"}
READ_CALLS: Final = {"preadv"}
FIRST_READ_CALLS: Final = {"openat", "fstat", "newfstatat"}


@pytest.fixture(autouse=True)
def _answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_ANSWERS", "c")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    tree = tmp_path_factory.mktemp("tree") / "tree"
    for directory in range(20):
        (tree / f"d{directory}").mkdir(parents=True)
        for number in range(20):
            (tree / f"d{directory}" / f"f{number}").write_bytes(b"%d" % number * 5000)
        (tree / f"d{directory}" / "link").symlink_to("f0")
        (tree / f"d{directory}" / "big").write_bytes(os.urandom(BIG))
    path = tree.parent / "store"
    (name,) = import_tree(path, tree)
    return path, name


@contextmanager
def serving(store: Path, directory: Path, *options: str) -> Iterator[ApplianceProcess]:
    state = f"--state-dir={directory}/state"
    with ApplianceProcess(store, directory, "--num-request-queues=1", state, *options) as served:
        yield served


def worker_of(appliance: ApplianceProcess, queue: int = 1) -> int:
    workers = appliance.status()[0]["workers"]
    (pid,) = [worker["pid"] for worker in workers if worker["queues"] == [queue]]
    return int(pid)


def load(socket_path: Path, start: str, seconds: float, ops: tuple[str, ...]) -> int:
    """Walk the tree and run each op for some seconds; return the number of replies."""
    with BenchGuest(socket_path, num_queues=1, depth=16, timeout_s=DEADLINE_S) as guest:
        tree = GuestTree(guest, start)
        phases = GuestPhases(tree, list(tree.walk()), Load(16, seconds, DEADLINE_S))
        results = [phases.run(op) for op in ops]
        assert [result.reason for result in results] == [""] * len(ops)
        return sum(result.completed for result in results)


@contextmanager
def connected(appliance: ApplianceProcess) -> Iterator[FakeGuest]:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        yield guest


# --- Who answers ---


def test_python_sees_less_than_one_request_in_a_hundred(
    store: tuple[Path, str], tmp_path: Path
) -> None:
    with (
        serving(store[0], tmp_path) as appliance,
        BenchGuest(appliance.sockets[0], num_queues=1, depth=16, timeout_s=DEADLINE_S) as guest,
    ):
        tree = GuestTree(guest, store[1])
        phases = GuestPhases(tree, list(tree.walk()), Load(16, 0.2, DEADLINE_S))
        for op in OPS:
            assert not phases.run(op).reason
        (session,) = appliance.status()
    total = sum(session["requests"].values())
    in_python = total - session["plain"]
    print(f"{in_python} of {total} requests were answered in Python")
    assert 0 < in_python < total / 100
    assert total > 5000


def test_status_tells_how_long_requests_took(store: tuple[Path, str], tmp_path: Path) -> None:
    with serving(store[0], tmp_path) as appliance, connected(appliance) as guest:
        guest.lookup(ROOT, store[1].encode())
        (session,) = appliance.status()
    assert session["latency_us"].keys() == session["requests"].keys() == {"INIT", "LOOKUP"}
    for latency in session["latency_us"].values():
        assert 0 < latency["p50"] <= latency["p99"] < DEADLINE_S * 1e6


# --- System calls ---


@contextmanager
def traced(pid: int, path: Path) -> Iterator[None]:
    """Write the system calls of a process to `path`."""
    strace = shutil.which("strace")
    assert strace, "package strace is missing: `make test` installs it"
    with subprocess.Popen(
        [strace, "-p", str(pid), "-o", path], stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        yield
        tracer.send_signal(signal.SIGINT)
        tracer.wait(DEADLINE_S)


def calls_in(path: Path) -> list[str]:
    """Return the names of the system calls of a trace, in their order."""
    lines = path.read_text(errors="replace").splitlines()
    return [match[1] for line in lines if (match := re.match(r"(\w+)\(", line))]


def test_a_turn_takes_few_system_calls(store: tuple[Path, str], tmp_path: Path) -> None:
    trace, num_turns, depth = tmp_path / "trace", 50, 16
    with serving(store[0], tmp_path, "--poll-us=0") as appliance, connected(appliance) as guest:
        top = guest.lookup(ROOT, store[1].encode())
        directory = guest.lookup(top, b"d1")
        big = guest.lookup(directory, b"big")
        requests = [
            fuse_client.lookup(directory, b"f1"),
            fuse_client.lookup(directory, b"absent"),
            fuse_client.getattr_(directory),
            fuse_client.readdirplus(directory, 0),
            fuse_client.read(guest.lookup(directory, b"f1"), 0, 4096),
        ]
        ring = guest.rings[1]
        with traced(worker_of(appliance), trace):
            for _ in range(num_turns):
                for number in range(depth):
                    ring.add_chain([requests[number % len(requests)]], [16, 8192])
                ring.publish()
                ring.collect(depth, timeout_s=DEADLINE_S)
            for offset in range(0, BIG - 65536, 4096):
                guest.ask(fuse_client.read(big, offset, 65536), room=65536)
    calls = calls_in(trace)
    num_reads = len(range(0, BIG - 65536, 4096))
    print({name: calls.count(name) for name in sorted(set(calls))})
    assert set(calls) <= LOOP_CALLS | READ_CALLS | FIRST_READ_CALLS
    assert calls.count("preadv") == num_reads, "one for each contiguous run of bytes"
    assert calls.count("openat") == 1
    # A large batch has a signal after its first reply, and one at its end.
    assert calls.count("write") <= 2 * num_turns + num_reads
    # The guest may be slower than the worker, who then waits within a batch, too.
    assert calls.count("epoll_wait") <= 3 * (num_turns + num_reads)


# --- Polling and idling ---


def ping_pong(guest: FakeGuest, directory: int, count: int) -> None:
    for _ in range(count):
        assert guest.ask(fuse_client.getattr_(directory)).error == 0


def events(appliance: ApplianceProcess) -> dict[str, int]:
    (session,) = appliance.status()
    return {name: session[name] for name in ("waits", "polls_paid", "polls_vain")}


def test_polling_saves_sleeps_and_kicks(store: tuple[Path, str], tmp_path: Path) -> None:
    count, kicks = 500, {}
    for poll_us in (0, 100_000):
        where = tmp_path / str(poll_us)
        where.mkdir()
        with (
            serving(store[0], where, f"--poll-us={poll_us}") as appliance,
            connected(appliance) as guest,
        ):
            top = guest.lookup(ROOT, store[1].encode())
            kick_fd = guest.rings[1].kick_fd
            before, kicks_before = events(appliance), os.eventfd_read(kick_fd)
            ping_pong(guest, top, count)
            os.eventfd_write(kick_fd, 1)  # or else reading might block
            kicks[poll_us] = os.eventfd_read(kick_fd) - 1
            after = events(appliance)
        grown = {name: after[name] - before[name] for name in before if before[name] != after[name]}
        print(f"--poll-us={poll_us}: {kicks_before}, then {kicks[poll_us]} kicks, {grown}")
        if poll_us == 0:
            assert after["polls_paid"] == after["polls_vain"] == 0
        else:
            assert after["polls_paid"] > 0
            assert grown.get("waits", 0) < count / 2
    assert kicks[100_000] < kicks[0] / 2


def switches_and_ticks(pid: int) -> tuple[int, int]:
    """Return how often a process was scheduled, and its CPU time in ticks."""
    status = Path(f"/proc/{pid}/status").read_text()
    switches = sum(map(int, re.findall(r"ctxt_switches:\s+(\d+)", status)))
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return switches, int(fields[11]) + int(fields[12])


def wait_for_rest(pid: int) -> None:
    """Return when a worker is woken up no more: it gives a last sign of life when it is idle."""
    seen, since_s = switches_and_ticks(pid), time.monotonic()
    for _ in every_event(DEADLINE_S):
        now = switches_and_ticks(pid)
        if now != seen:
            seen, since_s = now, time.monotonic()
        elif time.monotonic() - since_s > 2.5 * LOOK_S:
            return
    raise AssertionError("it is woken up again and again")


def test_an_idle_guest_costs_nothing(store: tuple[Path, str], tmp_path: Path) -> None:
    with (
        ApplianceProcess(
            store[0],
            tmp_path,
            "--num-request-queues=1",
            "--poll-us=1000",
            f"--state-dir={tmp_path}/state",
            sockets=("idle.sock", "busy.sock"),
        ) as appliance,
        FakeGuest(appliance.connect(0)) as idle,
    ):
        idle.mount()
        top = idle.lookup(ROOT, store[1].encode())
        ping_pong(idle, top, 200)
        pid = worker_of(appliance)
        wait_for_rest(pid)
        before = switches_and_ticks(pid)
        load(appliance.sockets[1], store[1], 0.5, OPS[:4])
        assert switches_and_ticks(pid) == before
        assert idle.lookup(ROOT, store[1].encode()) == top
