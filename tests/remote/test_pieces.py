"""Large blobs of a peer, read by guests and mounts piece by piece, in real processes."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from appliance.castore.digest import Digest
from appliance.services.grpc_messages import SNIX, TVIX, Family
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.fuse_client import ROOT
from tests.fakes.mounted import Mounted
from tests.fakes.peak_memory import peak_bytes, with_children
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.strict_server import Peer, strict_server
from tests.remote.test_daemon import size_of_files

pytestmark = pytest.mark.slow

MIB: Final = 1 << 20
SIZE: Final = 20 * MIB + 7
CONTENT: Final = random.Random(9).randbytes(SIZE)
OTHER: Final = random.Random(10).randbytes(SIZE)
MEMORY_MAX: Final = 200 * MIB
ANSWERS: Final = ["python", "c"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a store with a tree of two large files, and the name of the tree."""
    directory = tmp_path_factory.mktemp("pieces")
    tree = directory / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(CONTENT)
    (tree / "other").write_bytes(OTHER)
    (name,) = import_tree(f"lmdb://{directory}/store", tree)
    return f"lmdb://{directory}/store", name


@pytest.fixture
def daemon(store: tuple[str, str], tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(store[0], tmp_path / "daemon") as daemon:
        yield daemon


@contextmanager
def guest_of(uri: str, directory: Path, *options: str) -> Iterator[FakeGuest]:
    directory.mkdir(exist_ok=True)
    with (
        ApplianceProcess(uri, directory, *options) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        yield guest
        assert "ERROR" not in appliance.log()


def read(guest: FakeGuest, nodeid: int, offset: int, size: int) -> bytes:
    answer = guest.ask(fuse_client.read(nodeid, offset, size), room=MIB)
    assert answer.error == 0
    return answer.body


def check_everything(guest: FakeGuest, nodeid: int, content: bytes, step: int = MIB) -> None:
    for at in range(0, len(content), step):
        assert read(guest, nodeid, at, step) == content[at : at + step]


def nodeid_of(guest: FakeGuest, base_name: str, name: bytes = b"large") -> int:
    return guest.lookup(guest.lookup(ROOT, base_name.encode()), name)


@pytest.mark.parametrize("answers", ANSWERS)
def test_a_guest_waits_for_pieces_and_then_has_the_blob(
    daemon: DaemonProcess,
    store: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: str,
) -> None:
    monkeypatch.setenv("APPLIANCE_ANSWERS", answers)
    state = tmp_path / "state"
    with guest_of(daemon.unix_uri, tmp_path / "a", f"--state-dir={state}") as guest:
        nodeid = nodeid_of(guest, store[1])
        for at in (11 * MIB + 3, 0, SIZE - 4096):
            assert read(guest, nodeid, at, 4096) == CONTENT[at : at + 4096]
        assert 0 < size_of_files(state / "cache") < 4 * MIB
        check_everything(guest, nodeid, CONTENT)
        for _ in every_event(DEADLINE_S):
            names = [path.name for path in (state / "cache").glob("v*/blobs/*/*")]
            if names == [Digest.of(CONTENT).hex()]:
                break
        check_everything(guest, nodeid, CONTENT)


def test_no_process_needs_much_memory(
    daemon: DaemonProcess, store: tuple[str, str], tmp_path: Path
) -> None:
    with (
        ApplianceProcess(daemon.unix_uri, tmp_path, f"--state-dir={tmp_path}/state") as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        for name, content in ((b"large", CONTENT), (b"other", OTHER)):
            check_everything(guest, nodeid_of(guest, store[1], name), content)
        pids = [*with_children(appliance.process.pid), daemon.process.pid]
        assert len(pids) > 3
        assert all(peak_bytes(pid) < MEMORY_MAX for pid in pids)


@pytest.mark.parametrize("family", [SNIX, TVIX])
def test_pieces_of_a_peer_on_another_http2_stack(tmp_path: Path, family: Family) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(CONTENT)
    state = tmp_path / "state"
    with strict_server(tmp_path, Peer(family)) as server:
        (name,) = import_tree(server.unix_uri, tree)
        with guest_of(server.unix_uri, tmp_path / "a", f"--state-dir={state}") as guest:
            nodeid = nodeid_of(guest, name)
            at = 13 * MIB + 1
            assert read(guest, nodeid, at, 4096) == CONTENT[at : at + 4096]
            assert 0 < size_of_files(state / "cache") < 2 * MIB
            check_everything(guest, nodeid, CONTENT)
        assert server.resets == []


def test_a_supervisor_that_is_killed_leaves_pieces_for_the_next(
    daemon: DaemonProcess, store: tuple[str, str], tmp_path: Path
) -> None:
    state = f"--state-dir={tmp_path}/state"
    appliance = ApplianceProcess(daemon.unix_uri, tmp_path, state)
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        nodeid = nodeid_of(guest, store[1])
        assert read(guest, nodeid, 0, MIB) == CONTENT[:MIB]
        guest.send(fuse_client.read(nodeid, 8 * MIB, MIB), room=MIB)
        appliance.process.kill()
        appliance.process.wait(DEADLINE_S)
    (tmp_path / "fs.sock").unlink(missing_ok=True)
    with guest_of(daemon.unix_uri, tmp_path / "next", state) as guest:
        nodeid = nodeid_of(guest, store[1])
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            assert read(guest, nodeid, 0, MIB) == CONTENT[:MIB]
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        check_everything(guest, nodeid, CONTENT)


@pytest.mark.parametrize("cache_size", ["1G", "24M"])
def test_two_supervisors_share_the_pieces_in_one_cache(
    daemon: DaemonProcess, store: tuple[str, str], tmp_path: Path, cache_size: str
) -> None:
    # Both files do not fit the smaller one, so each evicts the other again and again.
    options = (f"--state-dir={tmp_path}/state", f"--blob-cache-size={cache_size}")
    bound = {"1G": 1 << 30, "24M": 24 * MIB}[cache_size]
    with ExitStack() as stack:
        guests = [
            stack.enter_context(guest_of(daemon.unix_uri, tmp_path / place, *options))
            for place in "ab"
        ]
        nodeids = [
            nodeid_of(guest, store[1], name)
            for guest, name in zip(guests, (b"large", b"other"), strict=True)
        ]
        large = nodeid_of(guests[1], store[1])
        chance = random.Random(1)
        for at in range(0, SIZE, MIB):
            guests[0].send(fuse_client.read(nodeids[0], at, MIB), room=MIB)
            other_at = chance.randrange(SIZE - 4096)
            assert read(guests[1], nodeids[1], other_at, 4096) == OTHER[other_at:][:4096]
            back = SIZE - MIB - at if at <= SIZE - MIB else 0
            assert read(guests[1], large, back, MIB) == CONTENT[back : back + MIB]
            (used,) = guests[0].rings[1].collect(timeout_s=DEADLINE_S)
            assert fuse_client.parse_reply(used.data).body == CONTENT[at : at + MIB]
            assert size_of_files(tmp_path / "state" / "cache") <= bound


@pytest.mark.parametrize("options", [(), ("--passthrough",)])
def test_a_mount_reads_pieces(
    daemon: DaemonProcess, store: tuple[str, str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "mnt").mkdir()
    state = f"--state-dir={tmp_path}/state"
    with Mounted(daemon.unix_uri, tmp_path / "mnt", state, *options):
        path = tmp_path / "mnt" / store[1] / "large"
        fd = os.open(path, os.O_RDONLY)
        try:
            assert os.pread(fd, 4096, 15 * MIB) == CONTENT[15 * MIB : 15 * MIB + 4096]
        finally:
            os.close(fd)
        assert path.read_bytes() == CONTENT
