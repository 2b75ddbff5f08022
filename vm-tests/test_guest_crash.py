"""Processes of the appliance are killed while a real guest reads: it sees a pause, nothing else."""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness import samples, tree
from vmharness.guest import Job
from vmharness.served import NEW_SERIES, Served, serve
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import ApplianceProcess, import_tree
from tests.fakes.running_command import every_event

ANSWER_S = 60.0
KILLS = 10
SUPERVISOR_KILLS = int(os.environ.get("TEST_SUPERVISOR_KILLS", "4"))
MACHINES = ("uml", f"qemu-{NEW_SERIES}")


class Stored(NamedTuple):
    """A store with one tree."""

    path: Path
    source: Path
    seen_at: str


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    source = directory / "tree"
    samples.build_numbered(source, 10, 20, {f"large {index}": 1 << 20 for index in range(3)})
    store = directory / "store"
    (name,) = import_tree(store, source)
    return Stored(store, source, f"/mnt/{name}")


@pytest.fixture(scope="module", params=MACHINES)
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serve(request.param, stored.path, tmp_path_factory.mktemp("served")) as served:
        served.mount()
        assert digest(served, stored) == expected(stored)
        yield served


def expected(stored: Stored) -> TreeDigest:
    return tree.tree_digest(tree.records(stored.source, is_normalised=True))


def digest(served: Served, stored: Stored) -> TreeDigest:
    script = f"probe tree-digest -n read {stored.seen_at}"
    return TreeDigest.parse(served.guest.run(script, ANSWER_S).output)


def test_ten_killed_workers_cost_no_error_and_no_byte(served: Served, stored: Stored) -> None:
    queues = request_queues(served)
    reading = start_reading(served, stored)

    for kill, queue in zip(range(KILLS), itertools.cycle(queues)):
        os.kill(busy_worker(served, queue, restarts=kill // len(queues)), signal.SIGKILL)

    for number, queue in enumerate(queues):
        kills = len(range(number, KILLS, len(queues)))
        busy_worker(served, queue, restarts=kills)
    check_end(served, stored, reading)


def test_a_killed_worker_of_the_hiprio_queue_is_not_missed(served: Served, stored: Stored) -> None:
    reading = start_reading(served, stored)

    for kill in range(3):
        os.kill(busy_worker(served, 0, restarts=kill), signal.SIGKILL)

    busy_worker(served, 0, restarts=3)
    check_end(served, stored, reading)


def test_a_killed_fork_server_is_not_missed(served: Served, stored: Stored) -> None:
    reading = start_reading(served, stored)
    before = restarts(served)
    fork_server = parent_of(worker_of(served, 1))
    assert fork_server != served.server.process.pid

    os.kill(fork_server, signal.SIGKILL)

    for queue in before:
        busy_worker(served, queue, restarts=before[queue])  # they live on
    os.kill(worker_of(served, 1), signal.SIGKILL)
    busy_worker(served, 1, restarts=before[1] + 1)  # and their successors have another fork server
    check_end(served, stored, reading)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_supervisor_that_is_killed_again_and_again_is_not_missed(
    machine: str, stored: Stored, tmp_path: Path
) -> None:
    with serve(machine, stored.path, tmp_path) as served:
        server = served.server
        first = server.process.pid  # it leads a session of its own, in which its processes stay
        served.mount()
        reading = start_reading(served, stored)
        try:
            for number in range(SUPERVISOR_KILLS):
                server.process.kill()
                server.process.wait(ANSWER_S)
                passes = reading.output.count(b"pass ")
                reading.wait_for_output(b"pass %d " % (passes + 2), ANSWER_S)

                (tmp_path / "new").write_text(f"number {number}")
                (name,) = import_tree(stored.path, tmp_path / "new")
                server = ApplianceProcess(
                    stored.path, tmp_path, *served.options, sockets=[server.sockets[0].name]
                )
                assert served.guest.check(f"cat /mnt/{name}", ANSWER_S) == b"number %d" % number
            check_end(served, stored, reading)
        finally:
            served.guest.close()
            server.stop()
    for _ in every_event(ANSWER_S):
        if not processes_of_session(first):
            break
    assert not processes_of_session(first)


def start_reading(served: Served, stored: Stored) -> Job:
    reading = served.guest.start(f"probe loop-read -d read {stored.seen_at} 3")
    reading.wait_for_output(b"pass 1 ", ANSWER_S)
    return reading


def check_end(served: Served, stored: Stored, reading: Job) -> None:
    passes = reading.output.count(b"pass ")
    reading.wait_for_output(b"pass %d " % (passes + 2), ANSWER_S)  # one of them began after all
    reading.close_input()
    status, output = reading.wait(ANSWER_S)
    assert status == 0, output
    assert len({line.split()[2] for line in output.splitlines()}) == 1
    assert digest(served, stored) == expected(stored)


def request_queues(served: Served) -> list[int]:
    """Return the request queues that the guest's driver uses: before Linux 6.12 the first alone."""
    return [1] if served.machine == "uml" else [1, 2]


def workers(served: Served) -> dict[int, dict[str, int]]:
    (session,) = served.server.status()
    return {worker["queues"][0]: worker for worker in session["workers"]}


def restarts(served: Served) -> dict[int, int]:
    return {queue: worker["restarts"] for queue, worker in workers(served).items()}


def worker_of(served: Served, queue: int) -> int:
    return workers(served)[queue]["pid"]


def busy_worker(served: Served, queue: int, *, restarts: int) -> int:
    """Return the pid of a queue's worker once it has been restarted so often and serves again."""
    wakeups = None
    for _ in every_event(ANSWER_S):
        worker = workers(served).get(queue)
        if worker is None or worker["restarts"] != restarts:
            continue
        now = num_wakeups(worker["pid"])
        if wakeups is not None and now > wakeups:
            return worker["pid"]
        wakeups = now
    raise AssertionError(f"queue {queue}, {restarts} restarts:\n{served.server.log()}")


def num_wakeups(pid: int) -> int:
    """Return how often a process has slept and been woken up; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    (count,) = (line.split()[1] for line in fields if line.startswith("voluntary_ctxt_switches"))
    return int(count)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def processes_of_session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, _parent, _group, session, *_rest = (
                (entry / "stat").read_text().rpartition(")")[2].split()
            )
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == leader and state != "Z":
            found.append(int(entry.name))
    return found
