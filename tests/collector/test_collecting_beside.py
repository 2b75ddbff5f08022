"""Collections beside sessions that read, imports that write, and other collections."""

import asyncio
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.collector.collection import CollectOptions, collect, collecting
from appliance.errors import ContentMissingError
from appliance.nix.path_info import read_path_info
from appliance.services.contracts import Services
from appliance.store.leases import Lease, LeaseKind
from appliance.store.store import Store
from tests.collector.stored_trees import Tree, check_exactly, make_tree, put_tree
from tests.contracts.rig import Rig
from tests.contracts.test_path_infos import fresh_path_info, referring_to
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.store.audit import audit

pytestmark = pytest.mark.slow

ROOT = 1
ROUNDS = 50
LARGE = os.urandom(200_000)
NOW = CollectOptions(grace_s=0)
FILES = {b"f%d" % number: b"%d" % number * 40 for number in range(20)}
KEPT = make_tree("kept", FILES | {b"large": LARGE})


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing: no power cut is tested."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture
def store(memory: Path) -> Iterator[Store]:
    made = Store.open(memory / "store", create=True)
    put_tree(made, KEPT)
    yield made
    made.close()


def rest(number: int) -> Tree:
    """Return a tree that shares a file with KEPT, and which nobody needs."""
    return make_tree("rest", {b"f1": b"1" * 40, b"n": b"%d" % number, b"l": LARGE[number:]})


def collect_rounds(store: Store) -> int:
    """Put what nobody needs and collect it, so often; return how many paths were removed."""
    num_removed = 0
    for number in range(ROUNDS):
        put_tree(store, rest(number))
        num_removed += collect(store, NOW).num_paths
    return num_removed


def read_all(guest: FakeGuest) -> None:
    """Look all files of KEPT up and read them, by requests that no kernel answers from memory."""
    top = guest.lookup(ROOT, KEPT.path.basename().encode())
    for directory in (top, guest.lookup(top, b"sub")):
        for name, data in KEPT.files.items():
            nodeid = guest.lookup(directory, name)
            answer = guest.ask(fuse_client.read(nodeid, 0, 4000))
            assert (answer.error, answer.body) == (0, data[:4000])


def test_a_guest_reads_its_closure_while_all_else_is_removed(store: Store, tmp_path: Path) -> None:
    with (
        ApplianceProcess(store.path, tmp_path) as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        read_all(guest)
        (session,) = process.status()
        assert session["holds"]["paths"] == 1
        assert (store.path / "leases" / session["holds"]["lease"]).exists()
        for number in range(ROUNDS):
            put_tree(store, rest(number))
            assert collect(store, NOW).num_paths == 1
            read_all(guest)
        check_exactly(store, [KEPT])
    collect(store, NOW)
    check_exactly(store, [])


def test_a_mount_reads_its_closure_while_all_else_is_removed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with Mounted(store.path, tmp_path / "mnt") as mounted:
        top = tmp_path / "mnt" / KEPT.path.basename()
        assert (top / "f1").read_bytes() == b"1" * 40
        stopping = threading.Event()
        failures: list[object] = []
        num_read = 0

        def read() -> None:
            nonlocal num_read
            while not stopping.is_set():
                for name, data in KEPT.files.items():
                    fd = os.open(top / "sub" / os.fsdecode(name), os.O_RDONLY)
                    found = os.pread(fd, len(data) + 1, 0)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(fd)
                    if found != data:
                        failures.append((name, len(found)))
                num_read += 1

        reader = threading.Thread(target=read)
        reader.start()
        try:
            assert collect_rounds(store) == ROUNDS
        finally:
            stopping.set()
            reader.join()
        assert not failures
        assert num_read
        assert mounted.status()["holds"]["paths"] == 1
        check_exactly(store, [KEPT])


def test_the_lease_of_a_killed_supervisor_does_not_hold_for_ever(
    store: Store, tmp_path: Path
) -> None:
    with (
        ApplianceProcess(store.path, tmp_path) as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        read_all(guest)
        os.killpg(process.process.pid, signal.SIGKILL)
        process.process.wait(DEADLINE_S)
    for _ in every_event(DEADLINE_S):  # until its children are gone, too
        if collect(store, NOW).num_paths:
            break
    check_exactly(store, [])
    assert not list((store.path / "leases").iterdir())


def test_the_lease_of_a_killed_supervisor_holds_until_its_session_ends(
    store: Store, tmp_path: Path
) -> None:
    with ApplianceProcess(store.path, tmp_path) as process:
        with FakeGuest(process.connect()) as guest:
            guest.mount()
            read_all(guest)
            process.process.kill()
            process.process.wait(DEADLINE_S)
            put_tree(store, rest(0))
            assert collect(store, NOW).num_paths == 1
            read_all(guest)
            check_exactly(store, [KEPT])
        for _ in every_event(DEADLINE_S):
            if collect(store, NOW).num_paths:
                break
    check_exactly(store, [])
    assert not list((store.path / "leases").iterdir())


def test_a_lease_lives_on_in_the_process_that_took_it_over(store: Store) -> None:
    lease = Lease.begin(store.path, LeaseKind.SESSION)
    lease.hold([KEPT.path.basename().encode()])
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[lease.fd]) as holder:
        lease.leave()
        collect(store, NOW)
        check_exactly(store, [KEPT])
        holder.kill()
    collect(store, NOW)
    check_exactly(store, [])


def test_two_collectors_and_four_imports_at_once(tmp_path: Path, memory: Path) -> None:
    uri = f"lmdb://{memory / 'store'}"
    Store.open(memory / "store", create=True).close()
    trees = []
    for number in range(4):
        tree = tmp_path / f"tree{number}"
        tree.mkdir()
        for file in range(60):
            (tree / f"f{file}").write_bytes(b"%d" % (file % (20 + number)) * 400)
        (tree / "large").write_bytes(LARGE)
        trees.append(tree)
    for _ in range(3):
        imports = [
            subprocess.Popen(
                [*APPLIANCE, "import", "--store", uri, tree], stdout=subprocess.PIPE, text=True
            )
            for tree in trees
        ]
        while any(command.poll() is None for command in imports):
            gc = [*APPLIANCE, "gc", "--store", uri, "--grace", "0"]
            collectors = [subprocess.Popen(gc, stdout=subprocess.DEVNULL) for _ in range(2)]
            assert [command.wait(DEADLINE_S) for command in collectors] == [0, 0]
        paths = [command.communicate(timeout=DEADLINE_S)[0].strip() for command in imports]
        assert [command.returncode for command in imports] == [0] * 4
        assert len(set(paths)) == 4
        audit(memory / "store")
    store = Store.open(memory / "store")
    try:
        with collecting(store.path):
            collect(store, NOW)
        check_exactly(store, [])
    finally:
        store.close()


def test_what_a_client_of_a_daemon_has_seen_and_a_collection_removed_is_missed_in_the_commit(
    memory: Path, tmp_path: Path
) -> None:
    # Both are symlinks, so there is nothing else that could be missed.
    library, library_info = fresh_path_info("library")
    program_info = referring_to(library)
    program = read_path_info(program_info).path
    gc = [*APPLIANCE, "gc", "--store", f"lmdb://{memory}/store", "--grace", "0"]

    async def work(services: Services) -> None:
        path_infos = services.path_infos
        await path_infos.put(library_info)
        assert await path_infos.get(library.digest) == library_info
        await asyncio.to_thread(subprocess.run, gc, check=True)
        with pytest.raises(
            ContentMissingError, match=r"-referrer: refers to path \S+-library, which is not"
        ):
            await path_infos.put(program_info, needs_references=True)
        assert await path_infos.get(program.digest) is None
        await path_infos.put(library_info)
        await path_infos.put(program_info, needs_references=True)
        assert await path_infos.get(program.digest) == program_info

    with DaemonProcess(f"lmdb://{memory}/store", tmp_path) as daemon:
        Rig(daemon.unix_uri).run(work)
