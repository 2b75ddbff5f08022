"""Nothing in a guest changes the tree, and what is in it runs."""

import errno
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness import tree
from vmharness.served import NEW_SERIES, TAG, Served, serve
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import import_tree

ANSWER_S = 60.0
MACHINES = ("uml", f"qemu-{NEW_SERIES}")
DROP_CACHES = "echo 3 > /proc/sys/vm/drop_caches"


class Stored(NamedTuple):
    """A store with a tree to change, and one with programs."""

    path: Path
    source: Path
    seen_at: str
    programs: str


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    source = directory / "tree"
    (source / "empty").mkdir(parents=True)
    (source / "file").write_bytes(b"content of the file\n" * 500)
    (source / "link").symlink_to("file")
    programs = directory / "programs"
    build_programs(programs)
    store = directory / "store"
    names = import_tree(store, source, programs)
    return Stored(store, source, *(f"/mnt/{name}" for name in names))


def build_programs(directory: Path) -> None:
    """Collect a static program, a dynamic one with its loader and libraries, and a script."""
    directory.mkdir()
    busybox = shutil.which("busybox")
    dynamic = shutil.which("bash")
    assert busybox
    assert dynamic
    shutil.copy(busybox, directory / "busybox")
    shutil.copy(dynamic, directory / "dynamic")
    needed = subprocess.run(["ldd", dynamic], check=True, capture_output=True, text=True).stdout
    for library in re.findall(r"(/\S+) \(0x", needed):
        shutil.copy(library, directory)
    (directory / "script").write_text("#!/bin/sh\necho script\n")
    (directory / "script").chmod(0o755)
    (directory / "text").write_text("#!/bin/sh\necho script\n")


@pytest.fixture(scope="module", params=MACHINES)
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serve(request.param, stored.path, tmp_path_factory.mktemp("served")) as served:
        served.mount()
        yield served


def digest(served: Served, stored: Stored) -> TreeDigest:
    script = f"{DROP_CACHES}; probe tree-digest -n read {stored.seen_at}"
    return TreeDigest.parse(served.guest.check(script, ANSWER_S))


@pytest.mark.parametrize("options", ["ro", "rw"])
def test_every_way_to_change_something_is_refused(
    served: Served, stored: Stored, options: str
) -> None:
    expected = tree.tree_digest(tree.records(stored.source, is_normalised=True))
    served.guest.check("umount /mnt", ANSWER_S)
    served.mount(options)

    lines = served.guest.check(f"acts change {stored.seen_at}", ANSWER_S).decode().splitlines()

    ways = dict(line.split() for line in lines)
    assert len(ways) > 20
    assert ways == dict.fromkeys(ways, str(errno.EROFS))
    # also what the page cache holds
    script = f"probe tree-digest -n read {stored.seen_at}"
    assert TreeDigest.parse(served.guest.check(script, ANSWER_S)) == expected
    assert digest(served, stored) == expected


def test_the_shells_own_tools_say_so_too(served: Served, stored: Stored) -> None:
    for command in ("touch new", "mkdir new", "rm -r empty", "mv file new", "ln file new"):
        result = served.guest.run(f"cd {stored.seen_at} && {command}", ANSWER_S)
        assert result.status == 1
        assert b"Read-only file system" in result.output


def test_df_answers(served: Served, stored: Stored) -> None:
    row = served.guest.check(f"df -k {stored.seen_at} | tail -n 1", ANSWER_S).split()

    assert (row[0], row[-1]) == (TAG.encode(), b"/mnt")
    assert int(row[1]) > 0


def test_an_unmounted_device_can_be_mounted_again(served: Served, stored: Stored) -> None:
    expected = digest(served, stored)
    for _ in range(3):
        served.guest.check("umount /mnt && ! ls /mnt | grep .", ANSWER_S)
        served.mount()
        assert digest(served, stored) == expected


def test_programs_run(served: Served, stored: Stored) -> None:
    at = stored.programs
    loader = "ld-linux-x86-64.so.2"
    for command, said in (
        (f"{at}/busybox echo static", b"static\n"),
        (f"{at}/{loader} --library-path {at} {at}/dynamic -c 'echo dynamic'", b"dynamic\n"),
        (f"{at}/script", b"script\n"),
    ):
        assert served.guest.check(f"{DROP_CACHES}; {command}", ANSWER_S) == said


def test_what_is_not_executable_does_not_run(served: Served, stored: Stored) -> None:
    result = served.guest.run(f"{stored.programs}/text", ANSWER_S)

    assert result.status == 126
    assert b"Permission denied" in result.output
