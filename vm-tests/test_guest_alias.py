"""Equal directories in two places stay two places; and the root, which alone may change."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness.guest import Job
from vmharness.served import MACHINES, Served, serve

from tests.fakes.appliance_process import import_tree

ANSWER_S = 60.0
DROP_CACHES = "echo 3 > /proc/sys/vm/drop_caches"


class Stored(NamedTuple):
    """A store with two trees, both with "x/same" and "y/same", all four of equal content."""

    path: Path
    first: str
    second: str


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    for tree in ("first", "second"):
        for place in ("x", "y"):
            below = directory / tree / place / "same" / "deep"
            below.mkdir(parents=True)
            (below / "file").write_bytes(b"content")
        (directory / tree / "differs").write_text(tree)
    store = directory / "store"
    first, second = import_tree(store, directory / "first", directory / "second")
    return Stored(store, f"/mnt/{first}", f"/mnt/{second}")


@pytest.fixture(scope="module", params=MACHINES)
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    with serve(request.param, stored.path, directory, "--list-root") as served:
        served.mount()
        yield served


def test_who_stands_in_one_place_is_not_moved_by_who_looks_at_another(
    served: Served, stored: Stored
) -> None:
    guest = served.guest
    others = [f"{stored.first}/y/same", f"{stored.second}/x/same", f"{stored.second}/y/same"]
    standing = guest.start(f"probe stand {stored.first}/x/same")
    standing.wait_for_output(b"standing\n", ANSWER_S)
    before = where(served, standing)
    assert before.startswith(b"cwd=%s/x/same ino=" % stored.first.encode())

    for other in others:
        look = f"ls -laR {other} && cat {other}/deep/file && cd {other} && pwd -P && cd deep"
        output = guest.check(f"{look}; {DROP_CACHES}; {look}", ANSWER_S)
        assert output.endswith(b"content%s\n" % other.encode())
        assert where(served, standing) == before

    standing.close_input()
    assert standing.wait(ANSWER_S).status == 0


def where(served: Served, standing: Job) -> bytes:
    """Return what the standing process says of its working directory now."""
    num_lines = standing.output.count(b"\n")
    standing.send(b"where\n")
    served.guest.wait(lambda: standing.output.count(b"\n") > num_lines, ANSWER_S)
    return standing.output.splitlines()[-1]


def test_a_mount_stays_where_it_was_made(served: Served, stored: Stored) -> None:
    guest = served.guest
    mounted = f"{stored.first}/x/same/deep"
    others = [f"{stored.first}/y/same", f"{stored.second}/x/same", f"{stored.second}/y/same"]
    guest.check(f"mount -t tmpfs none {mounted} && echo mine > {mounted}/mark", ANSWER_S)

    for other in others:
        look = f"ls {other}/deep && cat {other}/deep/file"
        assert guest.check(f"{look}; {DROP_CACHES}; {look}", ANSWER_S) == b"file\ncontent" * 2
        assert guest.check(f"ls {mounted} && cat {mounted}/mark", ANSWER_S) == b"mark\nmine\n"

    assert guest.check("grep -c ' tmpfs .*/deep\\|/deep tmpfs ' /proc/mounts", ANSWER_S) == b"1\n"
    guest.check(f"umount {mounted} && cat {mounted}/file", ANSWER_S)


def test_equal_directories_have_an_st_ino_each(served: Served, stored: Stored) -> None:
    places = [f"{tree}/{place}/same" for tree in (stored.first, stored.second) for place in "xy"]

    lines = served.guest.check(f"probe stat {' '.join(places)}", ANSWER_S).splitlines()

    assert len(set(lines)) == len(places)


def test_a_path_imported_while_the_guest_runs_appears_in_the_root(
    served: Served, stored: Stored, tmp_path: Path
) -> None:
    added = tmp_path / f"added for {served.machine}".replace(" ", "-")
    added.write_text(served.machine)
    (name,) = import_tree(tmp_path / "elsewhere", added)
    listed = served.guest.check("ls /mnt", ANSWER_S).decode().split()
    assert {f"/mnt/{entry}" for entry in listed} >= {stored.first, stored.second}
    assert name not in listed
    assert served.guest.run(f"cat /mnt/{name}", ANSWER_S).status == 1

    assert import_tree(stored.path, added) == [name]

    # not remembered as missing; in the listing once the root's attributes have expired
    assert served.guest.check(f"cat /mnt/{name}", ANSWER_S).decode() == served.machine
    served.guest.check(f"until ls /mnt | grep -qx {name}; do usleep 100000; done", ANSWER_S)
