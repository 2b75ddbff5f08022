"""Session processes and workers are killed at random while guests read.

A killed worker is not seen. A killed session process ends the connection of its own front-end,
which connects again; nobody else notices. Nothing is left afterwards. `make storm` has 1,000 kills.
"""

import contextlib
import os
import random
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from appliance.store.leases import living_leases
from appliance.store.root_lists import roots_locked
from appliance.supervisor.status import collect
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.frontend import BackendGoneError
from tests.fakes.hostile_guest import (
    LARGE,
    ROOT,
    descendants,
    memory_kib,
    num_fds,
    open_files,
    parent_of,
)
from tests.fakes.running_command import DEADLINE_S, every_event

pytestmark = pytest.mark.slow

NUM_KILLS: Final = int(os.environ.get("TEST_RANDOM_KILLS", "20"))
NUM_GUESTS: Final = 4 if NUM_KILLS < 100 else 8
# Of the twelve processes of four guests, one session process is killed for two workers.
SESSION_SHARE: Final = 1 / 3
BATCH: Final = 8
PIECE: Final = 4096
GROWTH_KIB: Final = 4096


class Reader(threading.Thread):
    """A guest that reads and compares until it is told to stop; it connects again when it must."""

    def __init__(self, appliance: ApplianceProcess, index: int, name: bytes) -> None:
        super().__init__()
        self.index = index
        self.num_lost = 0
        self.num_batches = 0
        self.stop = threading.Event()
        self.errors: list[str] = []
        self._appliance = appliance
        self._name = name
        self._rng = random.Random(index)

    def run(self) -> None:
        while not self.stop.is_set() and not self.errors:
            try:
                with contextlib.closing(self._appliance.connect(self.index)) as front_end:
                    self._serve(FakeGuest(front_end))
            except (BackendGoneError, ConnectionError):
                self.num_lost += 1
            except Exception as exc:  # noqa: BLE001 - the main thread raises it
                self.errors.append(f"guest {self.index}: {exc!r}")

    def _serve(self, guest: FakeGuest) -> None:
        try:
            (reply,) = self._answers(guest, [fuse_client.init()])
            assert reply.error == 0
            large = self._lookup(guest, self._lookup(guest, ROOT, self._name), b"large")
            while not self.stop.is_set():
                self._read_batch(guest, large)
                self.num_batches += 1
        finally:
            guest.close()

    def _lookup(self, guest: FakeGuest, nodeid: int, name: bytes) -> int:
        (reply,) = self._answers(guest, [fuse_client.lookup(nodeid, name)])
        assert reply.error == 0, reply
        return fuse_client.parse_entry(reply.body).nodeid

    def _read_batch(self, guest: FakeGuest, large: int) -> None:
        pieces = [self._rng.randrange(len(LARGE) // PIECE) for _ in range(BATCH)]
        replies = self._answers(
            guest,
            [
                fuse_client.read(large, piece * PIECE, PIECE, unique=number + 1)
                for number, piece in enumerate(pieces)
            ],
        )
        assert sorted(reply.unique for reply in replies) == list(range(1, BATCH + 1))
        for reply in replies:
            start = pieces[reply.unique - 1] * PIECE
            assert (reply.error, reply.body) == (0, LARGE[start : start + PIECE])
        (reply,) = self._answers(guest, [fuse_client.statfs()], queue=0)
        assert reply.error == 0

    def _answers(
        self, guest: FakeGuest, requests: list[bytes], queue: int = 1
    ) -> list[fuse_client.Answer]:
        ring = guest.rings[queue]
        for request in requests:
            ring.add_chain([request], [16, 4096])
        ring.publish()
        poller = select.poll()
        poller.register(ring.call_fd, select.POLLIN)
        poller.register(guest.vmm.front_end.sock, 0)  # that the other side has hung up
        done = ring.poll()
        while len(done) < len(requests):
            events = dict(poller.poll(DEADLINE_S * 1000))
            if not events:
                raise TimeoutError(f"{len(done)} of {len(requests)} answers")
            ring.calls()
            done += ring.poll()
            if guest.vmm.front_end.sock.fileno() in events and len(done) < len(requests):
                raise BackendGoneError
        return [fuse_client.parse_reply(used.data) for used in done]


class Footprint(NamedTuple):
    """What a supervisor and its fork server have when nobody is connected."""

    fds: tuple[int, int]
    memory_files: tuple[int, int]
    rss_kib: tuple[int, int]


def fork_server_of(appliance: ApplianceProcess) -> int:
    pid = appliance.process.pid
    (found,) = (child for child in descendants(pid) if parent_of(child) == pid)
    return found


def footprint(appliance: ApplianceProcess) -> Footprint:
    """Return it once all sessions have ended."""
    pid = appliance.process.pid
    for _ in every_event(DEADLINE_S):
        if len(descendants(pid)) == 1 and not sessions(appliance):
            break
    pids = pid, fork_server_of(appliance)

    def memory_files(of: int) -> int:
        return sum(name.startswith("/memfd:") for name in open_files(of))

    return Footprint(
        (num_fds(pids[0]), num_fds(pids[1])),
        (memory_files(pids[0]), memory_files(pids[1])),
        (memory_kib(pids[0], "Rss"), memory_kib(pids[1], "Rss")),
    )


def sessions(appliance: ApplianceProcess) -> list[dict[str, Any]]:
    state = appliance.store.with_name(appliance.store.name + ".state")
    (report,) = collect(state)
    found: list[dict[str, Any]] = report["sessions"]
    return found


class Storm:
    """Kills, and what they must come to."""

    def __init__(self, appliance: ApplianceProcess, readers: list[Reader], seed: int) -> None:
        self.num_sessions_killed = [0] * len(readers)
        self.num_workers_killed = 0
        self._appliance = appliance
        self._readers = readers
        self._rng = random.Random(seed)
        # How far each reader was at its last kill, and which session process it had then.
        self._before = [(-1, 0)] * len(readers)

    def kill_one(self) -> None:
        """Kill a process of a guest that has been answered since its last kill."""
        for _ in every_event(DEADLINE_S):
            by_socket = {session["socket"]: session for session in sessions(self._appliance)}
            for reader in self._rng.sample(self._readers, len(self._readers)):
                assert not reader.errors, reader.errors
                session = by_socket.get(str(self._appliance.sockets[reader.index]))
                num_batches, killed_pid = self._before[reader.index]
                if session is None or session["pid"] == killed_pid:
                    continue
                if reader.num_batches > num_batches and session["workers"]:
                    self._kill(reader, session)
                    return
        raise AssertionError("no guest is answered any more")

    def _kill(self, reader: Reader, session: dict[str, Any]) -> None:
        is_session = self._rng.random() < SESSION_SHARE
        killed_pid = session["pid"] if is_session else 0
        self._before[reader.index] = reader.num_batches, killed_pid
        if is_session:
            self.num_sessions_killed[reader.index] += 1
            os.kill(session["pid"], signal.SIGKILL)
            return
        worker = self._rng.choice(session["workers"])
        with contextlib.suppress(ProcessLookupError):  # it was killed before, and is not back yet
            os.kill(worker["pid"], signal.SIGKILL)
            self.num_workers_killed += 1

    @property
    def num_killed(self) -> int:
        return sum(self.num_sessions_killed) + self.num_workers_killed


@pytest.fixture
def appliance(store: tuple[Path, bytes], tmp_path: Path) -> Iterator[ApplianceProcess]:
    sockets = [f"{index}.sock" for index in range(NUM_GUESTS)]
    with ApplianceProcess(store[0], tmp_path, "--num-request-queues=1", sockets=sockets) as process:
        yield process


def run_storm(appliance: ApplianceProcess, name: bytes, num_kills: int, seed: int) -> Storm:
    readers = [Reader(appliance, index, name) for index in range(NUM_GUESTS)]
    storm = Storm(appliance, readers, seed)
    for reader in readers:
        reader.start()
    try:
        while storm.num_killed < num_kills:
            storm.kill_one()
        ended_at = [reader.num_batches for reader in readers]
        for _ in every_event(DEADLINE_S):
            lost = [reader.num_lost for reader in readers]
            are_served = [
                reader.num_batches > before or reader.errors
                for reader, before in zip(readers, ended_at, strict=True)
            ]
            if lost == storm.num_sessions_killed and all(are_served):
                break
    finally:
        for reader in readers:
            reader.stop.set()
        for reader in readers:
            reader.join(DEADLINE_S)
    assert [reader.errors for reader in readers if reader.errors] == []
    assert [reader.num_lost for reader in readers] == storm.num_sessions_killed
    assert all(
        reader.num_batches > before for reader, before in zip(readers, ended_at, strict=True)
    )
    return storm


def test_kills_at_random_end_the_connections_of_killed_sessions_and_leave_nothing(
    appliance: ApplianceProcess, store: tuple[Path, bytes]
) -> None:
    own_fds = num_fds(os.getpid())
    run_storm(appliance, store[1], NUM_GUESTS * 2, seed=1)  # allocators have their memory then
    before = footprint(appliance)

    storm = run_storm(appliance, store[1], NUM_KILLS, seed=2)

    after = footprint(appliance)
    num_sessions = sum(storm.num_sessions_killed)
    print(f"{num_sessions} session processes and {storm.num_workers_killed} workers were killed")
    print(before, after, sep="\n")
    assert num_sessions + storm.num_workers_killed == NUM_KILLS
    assert num_sessions
    assert storm.num_workers_killed
    assert after.fds == before.fds
    assert after.memory_files == (0, 0)
    for grown, was in zip(after.rss_kib, before.rss_kib, strict=True):
        assert grown <= was + GROWTH_KIB
    assert num_fds(os.getpid()) == own_fds
    state = store[0].with_name(store[0].name + ".state")
    assert len(list((state / "sessions").iterdir())) == 1, "the socket of the fork server"
    with roots_locked(store[0], is_exclusive=True):
        assert [lease for lease in living_leases(store[0]) if lease.kind == "session"] == []
    assert list((store[0] / "leases").iterdir()) == []
    assert "Traceback" not in appliance.log()
