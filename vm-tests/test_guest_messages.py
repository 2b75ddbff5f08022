"""What a real kernel asks, counted: everything once, and nothing again while it is remembered.

Here the root cannot be listed, so its attributes never expire, and nothing is asked for on the way
through it either.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness import tree
from vmharness.served import MACHINES, Served, difference, serve
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import import_tree

ANSWER_S = 60.0
DIRECTORIES = 12
FILES = 8  # in each directory; the first is empty
LARGE_SIZE = 4 << 20
READ_SIZE = 128 << 10  # linux: VM_READAHEAD_PAGES
DROP_CACHES = "echo 3 > /proc/sys/vm/drop_caches"


class Stored(NamedTuple):
    """A store with three trees: one to walk through, one whose names are asked for, one more."""

    path: Path
    source: Path
    walked: str
    named: str
    other: str


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    walked, named = directory / "walked", directory / "named"
    for index in range(DIRECTORIES):
        leaf = walked / f"{index:02}"
        leaf.mkdir(parents=True)
        for number in range(FILES):
            (leaf / str(number)).write_bytes(b"%d/%d " % (index, number) * number * 500)
        (leaf / "link").symlink_to(f"target {index}")
    named.mkdir()
    for name in ("first", "second", "third"):
        (named / name).mkdir()
        (named / name / "file").write_bytes(name.encode() * 5000)
        (named / name / "equal").write_bytes(b"equal content" * 5000)
    (named / "large").write_bytes(bytes(range(256)) * (LARGE_SIZE // 256))
    (named / "link").symlink_to("first/file")
    (named / "readable link").symlink_to("not followed")
    other = directory / "other"
    other.mkdir()
    (other / "file").write_bytes(b"other")
    store = directory / "store"
    return Stored(store, walked, *import_tree(store, walked, named, other))


@pytest.fixture(scope="module", params=MACHINES)
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serve(request.param, stored.path, tmp_path_factory.mktemp("served")) as served:
        served.mount()
        # what is asked once a mount, to be told that it need not be asked
        served.guest.check(f"ls /mnt/{stored.other} && cat /mnt/{stored.other}/file", ANSWER_S)
        yield served


def cost(served: Served, directory: str, script: str) -> dict[str, int]:
    """Return what the guest asks for while a script runs in a store path."""
    job = served.guest.start(f"cd /mnt/{directory} && echo here && read go && {{ {script}; }}")
    job.wait_for_output(b"here\n", ANSWER_S)
    before = served.requests()
    job.send(b"go\n")
    result = job.wait(ANSWER_S)
    assert result.status == 0, result.output
    return difference(before, served.requests())


def test_what_open_and_close_mean_was_asked_once(served: Served) -> None:
    totals = served.requests()

    assert (totals["INIT"], totals["OPEN"], totals["OPENDIR"], totals["FLUSH"]) == (1, 1, 1, 1)
    assert not totals.keys() & {"RELEASE", "RELEASEDIR", "ACCESS"}


def test_a_first_read_costs_a_lookup_for_each_name_and_one_read(
    served: Served, stored: Stored
) -> None:
    assert cost(served, stored.named, "cat second/file") == {"LOOKUP": 2, "READ": 1}
    assert cost(served, stored.named, "cat second/file") == {}


def test_equal_files_are_read_once_for_each_place(served: Served, stored: Stored) -> None:
    cost(served, stored.named, "cat first/equal second/equal")

    # A file of its own to the guest's kernel, as overlayfs on top needs it.
    assert cost(served, stored.named, "cat third/equal") == {"LOOKUP": 2, "READ": 1}
    assert cost(served, stored.named, "cat first/equal third/equal") == {}


def test_a_large_file_costs_a_read_for_each_window_of_readahead(
    served: Served, stored: Stored
) -> None:
    asked = cost(served, stored.named, "cat large")

    assert asked.pop("LOOKUP") == 1
    assert LARGE_SIZE // READ_SIZE <= asked.pop("READ") <= LARGE_SIZE // READ_SIZE + 8
    assert not asked


def test_symlinks_are_read_once(served: Served, stored: Stored) -> None:
    asked = cost(served, stored.named, "readlink 'readable link'")
    again = cost(served, stored.named, "readlink 'readable link'; readlink 'readable link'")

    assert (asked, again) == ({"LOOKUP": 1, "READLINK": 1}, {})


def test_a_missing_name_is_asked_once(served: Served, stored: Stored) -> None:
    asked = cost(served, stored.named, "! probe stat missing; ! probe stat missing; ! cat missing")

    assert asked == {"LOOKUP": 1}


def test_a_missing_name_in_the_root_is_asked_each_time(served: Served, stored: Stored) -> None:
    missing = "0" * 32 + "-missing"

    asked = cost(served, stored.named, f"! probe stat /mnt/{missing}; ! probe stat /mnt/{missing}")

    assert asked["LOOKUP"] == 2


def test_a_walk_reads_each_file_once_and_a_second_one_asks_nothing(
    served: Served, stored: Stored
) -> None:
    first = cost(served, stored.walked, "probe tree-digest read .")

    assert first.pop("READ") == DIRECTORIES * (FILES - 1)
    assert first.pop("READLINK") == DIRECTORIES
    # one page at a time, and the end of each is asked for
    assert first.pop("READDIRPLUS") <= 3 * (1 + DIRECTORIES)
    assert not first
    for mode in ("read", "mmap", "sendfile"):
        assert cost(served, stored.walked, f"probe tree-digest {mode} .") == {}
    assert cost(served, "", f"probe tree-digest read /mnt/{stored.walked}") == {}


def test_what_was_forgotten_is_found_again(served: Served, stored: Stored) -> None:
    expected = tree.tree_digest(tree.records(stored.source, is_normalised=True))
    digest = f"probe tree-digest -n read /mnt/{stored.walked}"
    served.guest.check(digest, ANSWER_S)
    before = served.requests()

    served.guest.check(DROP_CACHES, ANSWER_S)
    forgotten = difference(before, served.requests())

    # one page cache for equal files: fewer inodes than names
    assert forgotten.pop("FORGET", 0) + forgotten.pop("BATCH_FORGET", 0) > DIRECTORIES
    assert not forgotten
    assert TreeDigest.parse(served.guest.check(digest, ANSWER_S)) == expected
    assert difference(before, served.requests())["READ"] == DIRECTORIES * (FILES - 1)
    assert served.requests()["OPEN"] == 1
