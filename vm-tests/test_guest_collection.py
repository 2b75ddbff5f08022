"""A guest with a view reads its closure while everything else in the store is collected."""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmharness.guest import Guest
from vmharness.served import serve

from appliance.collector.collection import CollectOptions, collect, collecting
from appliance.store.store import Store
from tests.collector.stored_trees import Tree, check_exactly, make_tree, put_tree
from tests.fakes.appliance_process import uri_of
from tests.fakes.running_command import APPLIANCE

ANSWER_S = 120.0
ROUNDS = 50
LARGE = os.urandom(3_000_000)
FILES = {b"f%d" % number: b"%d" % number * 900 for number in range(30)}
LIBRARY = make_tree("library", FILES | {b"large": LARGE})
PROGRAM = make_tree("program", FILES | {b"own": LARGE[:70_000]}, [LIBRARY.path])
CLOSURE = (LIBRARY, PROGRAM)


def rest(number: int) -> Tree:
    """Return a tree that nobody needs, with files that are needed and files that are not."""
    return make_tree("rest", {b"f1": b"1" * 900, b"n": b"%d" % number, b"l": LARGE[number + 1 :]})


def sums(guest: Guest) -> bytes:
    """Return the checksums of all files, read anew."""
    files = " ".join(shlex.quote(f"/mnt/{tree.path.basename()}") for tree in CLOSURE)
    script = f"echo 3 >/proc/sys/vm/drop_caches; find {files} -type f | sort | xargs cat | md5sum"
    return guest.check(script, ANSWER_S)


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing: no power cut is tested."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def test_a_guest_reads_its_closure_while_everything_else_is_freed(
    memory: Path, tmp_path: Path
) -> None:
    store = Store.open(memory / "store", create=True)
    for tree in CLOSURE:
        put_tree(store, tree)
    command = [*APPLIANCE, "view", "create", "--store", uri_of(store.path), "web"]
    subprocess.run([*command, "--closure", PROGRAM.path.basename()], check=True)
    with serve("uml", store.path, tmp_path, "--view=web") as served:
        served.mount()
        before = sums(served.guest)
        reading = served.guest.start("probe loop-read -d read /mnt 2")
        reading.wait_for_output(b"pass 1 ", ANSWER_S)
        for number in range(ROUNDS):
            put_tree(store, rest(number))
            with collecting(store.path):
                swept = collect(store, CollectOptions(grace_s=0))
            assert (swept.num_paths, swept.num_files) == (1, 1)
        during = reading.output.count(b"pass ")
        reading.wait_for_output(b"pass %d " % (during + 2), ANSWER_S)
        reading.close_input()
        status, output = reading.wait(ANSWER_S)
        assert status == 0, output
        assert during > 1
        assert len({line.split()[2] for line in output.splitlines()}) == 1
        assert sums(served.guest) == before
        assert "ERROR" not in served.server.log()
        check_exactly(store, CLOSURE)
    store.close()
