"""Several queues, several devices, and the device taken from the driver and given back."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness import tree
from vmharness.served import NEW_SERIES, Served, difference, serve
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import every_event

ANSWER_S = 60.0
CPUS = 2
QUEUES = 4
TAGS = ("one", "two")
MACHINES = ("qemu", f"qemu-{NEW_SERIES}")
DROP_CACHES = "echo 3 > /proc/sys/vm/drop_caches"


class Stored(NamedTuple):
    """A store with one tree."""

    path: Path
    source: Path
    name: str


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    source = directory / "tree"
    for index in range(4):
        (source / str(index)).mkdir(parents=True)
        for number in range(40):
            (source / str(index) / str(number)).write_bytes(b"%d %d\n" % (index, number) * number)
    store = directory / "store"
    (name,) = import_tree(store, source)
    return Stored(store, source, name)


@pytest.fixture(scope="module", params=MACHINES)
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    with serve(
        request.param, stored.path, directory, num_request_queues=QUEUES, tags=TAGS
    ) as served:
        served.guest.check("mkdir /mnt/one /mnt/two", ANSWER_S)
        for tag in TAGS:
            served.mount(tag=tag, at=f"/mnt/{tag}")
        yield served


def digest(served: Served, tag: str, name: str, *, jobs: int = 1) -> TreeDigest:
    script = f"{DROP_CACHES}; probe tree-digest -n read /mnt/{tag}/{name} {jobs}"
    return TreeDigest.parse(served.guest.check(script, ANSWER_S))


def expected(stored: Stored) -> TreeDigest:
    return tree.tree_digest(tree.records(stored.source, is_normalised=True))


def workers(served: Served, tag: str) -> dict[int, int]:
    """Return the worker's pid for each queue of a device."""
    (session,) = (s for s in served.server.status() if Path(s["socket"]).stem == tag)
    return {queue: worker["pid"] for worker in session["workers"] for queue in worker["queues"]}


def num_wakeups(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (count,) = (line.split()[1] for line in lines if line.startswith("voluntary_ctxt_switches"))
    return int(count)


def use_all_queues(served: Served, tag: str, name: str) -> None:
    """Read on each CPU; and drop what was read, for which there is the hiprio queue."""
    for cpu in range(CPUS):
        served.guest.check(
            f"taskset -c {cpu} probe tree-digest read /mnt/{tag}/{name}; {DROP_CACHES}", ANSWER_S
        )


def test_each_queue_that_the_driver_uses_has_a_worker_of_its_own(
    served: Served, stored: Stored
) -> None:
    # linux fs/fuse/virtio_fs.c: since 6.12 the driver uses a request queue for each CPU
    num_request_queues = 1 if served.machine == "qemu" else CPUS

    for tag in TAGS:
        use_all_queues(served, tag, stored.name)
        pids: dict[int, int] = {}
        for _ in every_event(ANSWER_S):  # nobody waits for a reply from the hiprio queue
            pids = workers(served, tag)
            if len(pids) == 1 + num_request_queues:
                break
        assert sorted(pids) == list(range(1 + num_request_queues))
        assert len(set(pids.values())) == len(pids)


def test_a_newer_driver_uses_a_queue_for_each_cpu(served: Served, stored: Stored) -> None:
    use_all_queues(served, "one", stored.name)
    pids = workers(served, "one")
    used_by_cpu = []
    for cpu in range(CPUS):
        before = {queue: num_wakeups(pid) for queue, pid in pids.items()}
        served.guest.check(
            f"{DROP_CACHES}; taskset -c {cpu} probe tree-digest read /mnt/one/{stored.name}",
            ANSWER_S,
        )
        used_by_cpu.append(
            max(pids.keys() - {0}, key=lambda queue: num_wakeups(pids[queue]) - before[queue])
        )

    if served.machine == "qemu":
        assert used_by_cpu == [1] * CPUS  # an older driver has one queue for all
    else:
        assert sorted(used_by_cpu) == list(range(1, 1 + CPUS))


def test_two_devices_are_two_sessions_with_the_same_content(served: Served, stored: Stored) -> None:
    for index, tag in enumerate(TAGS):
        before = [served.requests(number) for number in range(len(TAGS))]

        assert digest(served, tag, stored.name, jobs=3) == expected(stored)

        asked = [difference(before[n], served.requests(n)) for n in range(len(TAGS))]
        assert asked[index]["READ"] > 0
        assert "READ" not in asked[1 - index]
    devices = served.guest.check(
        f"for t in one two; do probe stat /mnt/$t/{stored.name}; done", ANSWER_S
    ).split()
    assert len({field for field in devices if field.startswith(b"dev=")}) == len(TAGS)
    assert len({field for field in devices if field.startswith(b"ino=")}) == 1


def test_readers_on_all_cpus_and_devices_get_every_byte(served: Served, stored: Stored) -> None:
    jobs = [
        served.guest.start(f"probe tree-digest -n {mode} /mnt/{tag}/{stored.name} 3")
        for tag in TAGS
        for mode in ("read", "direct")
    ]

    results = [job.wait(ANSWER_S) for job in jobs]

    assert {TreeDigest.parse(result.output) for result in results} == {expected(stored)}


def test_devices_taken_from_their_driver_and_given_back_are_as_before(
    served: Served, stored: Stored
) -> None:
    served.guest.check("umount /mnt/one /mnt/two", ANSWER_S)

    found = served.guest.check(
        "cd /sys/bus/virtio/drivers/virtiofs && for device in virtio*; do "
        "echo $device > unbind && echo $device > bind && echo $device; done",
        ANSWER_S,
    )

    assert len(found.split()) == len(TAGS)
    for tag in TAGS:
        served.mount(tag=tag, at=f"/mnt/{tag}")
        assert digest(served, tag, stored.name) == expected(stored)
