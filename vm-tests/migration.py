"""Guests under a newer QEMU that read all the time move between two supervisors, and are saved.

`make migrate` runs this; its name keeps it out of `make test`, as it takes minutes and downloads a
QEMU. TEST_MIGRATIONS says how often the guest moves there and back, TEST_QEMU_SUITE from which
Debian the QEMU is.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness import newer_debian, samples, tree
from vmharness.guest import Job
from vmharness.monitor import MonitorError
from vmharness.moving import MovingGuest
from vmharness.qemu import FsDevice
from vmharness.served import TAG
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import ApplianceProcess, import_tree

MIGRATIONS = int(os.environ.get("TEST_MIGRATIONS", "20"))
ANSWER_S = 180.0
LARGE_BYTES = 3 << 20
BLOCK_BYTES = 65536
# With nothing cached, and then once more, when what the back end wrote before the guest moved must
# be there: all files by their names. Then the directory that it is in, and an open file, which is
# read on and compared with what is read anew. Each round ends with a line.
READING = f"""
cd /mnt/{{name}}/3 && exec 5<../large || exit 3
here=$(stat -c %i .)
block=0
while [ ! -e /tmp/enough ]; do
    echo 3 >/proc/sys/vm/drop_caches
    for pass in anew cached; do
        [ "$(probe tree-digest -n read /mnt/{{name}})" = "$(cat /tmp/expected)" ] || exit 4
    done
    [ "$(stat -c %i .)" = "$here" ] && [ "$(stat -c %i /mnt/{{name}}/3)" = "$here" ] || exit 5
    [ "$(cat 7)" = "seven in 3" ] || exit 6
    read_on=$(dd bs={BLOCK_BYTES} count=1 <&5 2>/dev/null | sha256sum)
    anew=$(dd bs={BLOCK_BYTES} count=1 skip=$block if=../large 2>/dev/null | sha256sum)
    [ "$read_on" = "$anew" ] || exit 7
    block=$((block + 1))
    [ $block -lt {LARGE_BYTES // BLOCK_BYTES} ] || {{{{ exec 5<../large; block=0; }}}}
    echo "round"
done
echo over
"""


class Stores(NamedTuple):
    """Two stores of one tree, beside others; a third one lacks it."""

    here: Path
    there: Path
    poorer: Path
    name: str
    digest: TreeDigest


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    directory = tmp_path_factory.mktemp("stores")
    source = directory / "tree"
    samples.build_numbered(source, 6, 12, {"large": LARGE_BYTES})
    for index in range(6):
        (source / str(index) / "7").write_text(f"seven in {index}")
    others = []
    for number in range(3):
        other = directory / f"other-{number}"
        other.mkdir()
        (other / "file").write_text(str(number))
        others.append(other)
    here, there, poorer = (directory / name for name in ("here", "there", "poorer"))
    (name,) = import_tree(here, source)
    import_tree(there, *others, source)
    import_tree(poorer, *others)
    digest = tree.tree_digest(tree.records(source, is_normalised=True))
    return Stores(here, there, poorer, name, digest)


@pytest.fixture
def back_ends(stores: Stores, tmp_path: Path) -> Iterator[tuple[ApplianceProcess, ...]]:
    print(newer_debian.version_of(newer_debian.qemu()))
    directories = [tmp_path / name for name in ("here", "there", "poorer")]
    for directory in directories:
        directory.mkdir()
    with (
        ApplianceProcess(stores.here, directories[0]) as here,
        ApplianceProcess(stores.there, directories[1]) as there,
        ApplianceProcess(stores.poorer, directories[2]) as poorer,
    ):
        yield here, there, poorer


def device_of(back_end: ApplianceProcess) -> FsDevice:
    return FsDevice(back_end.sockets[0], TAG, num_request_queues=2)


def start_reading(moving: MovingGuest, stores: Stores) -> Job:
    guest = moving.guest
    guest.check(f"mount -t virtiofs -o ro {TAG} /mnt", ANSWER_S)
    digest = f"probe tree-digest -n read /mnt/{stores.name}"
    found = guest.check(f"{digest} | tee /tmp/expected", ANSWER_S)
    assert TreeDigest.parse(found) == stores.digest
    job = guest.start(READING.format(name=stores.name))
    job.wait_for_output(b"round\n", ANSWER_S)
    return job


def wait_for_a_round(moving: MovingGuest, job: Job) -> None:
    """Wait until the guest has begun and ended a round from now on."""
    wanted = job.output.count(b"round") + 2
    moving.guest.wait(
        lambda: job.buffer.count(b"round") >= wanted or job.status is not None, ANSWER_S
    )
    assert job.status is None, job.wait(ANSWER_S)


def finish(moving: MovingGuest, job: Job) -> None:
    moving.guest.check("touch /tmp/enough", ANSWER_S)
    result = job.wait(ANSWER_S)
    assert result.status == 0, result
    assert result.output.endswith(b"over\n")


def test_a_guest_that_reads_moves_there_and_back(
    back_ends: tuple[ApplianceProcess, ...], stores: Stores, tmp_path: Path
) -> None:
    here, there, _poorer = back_ends
    with MovingGuest(device_of(here), tmp_path) as moving:
        job = start_reading(moving, stores)
        for _ in range(MIGRATIONS):
            for target in (there, here):
                moving.move_to(device_of(target))
                wait_for_a_round(moving, job)
        finish(moving, job)
    for back_end in (here, there):
        assert "ERROR" not in back_end.log()
        assert "WARNING" not in back_end.log()


def test_a_guest_does_not_move_to_where_its_path_is_missing(
    back_ends: tuple[ApplianceProcess, ...], stores: Stores, tmp_path: Path
) -> None:
    here, there, poorer = back_ends
    with MovingGuest(device_of(here), tmp_path) as moving:
        job = start_reading(moving, stores)
        with pytest.raises(MonitorError):
            moving.move_to(device_of(poorer))
        assert f"{stores.name} is not in the store" in poorer.log()
        if moving.monitor.execute("query-status")["status"] != "running":
            moving.monitor.execute("cont")
        wait_for_a_round(moving, job)
        moving.move_to(device_of(there))
        wait_for_a_round(moving, job)
        finish(moving, job)


def test_a_guest_is_saved_and_loaded(
    back_ends: tuple[ApplianceProcess, ...], stores: Stores, tmp_path: Path
) -> None:
    here, _there, _poorer = back_ends
    disk = tmp_path / "disk.qcow2"
    newer_debian.create_disk(disk)
    with MovingGuest(device_of(here), tmp_path, disk) as moving:
        job = start_reading(moving, stores)
        for number in range(2):
            moving.save(f"state{number}")
            wait_for_a_round(moving, job)
            moving.load(f"state{number}")
            wait_for_a_round(moving, job)
        finish(moving, job)
