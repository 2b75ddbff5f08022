"""Guests that are saved, and go on here or with another supervisor of another store."""

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.errors import VhostError
from appliance.protos.device_state_pb2 import DeviceState, SavedGrant
from appliance.session.device_state import MAGIC, STATE_MAX, VERSION, parse_untrusted
from appliance.vhost._vhost_wire import StateDirection
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.fakes.vmms import CloudHypervisor, NewerQemu

pytestmark = pytest.mark.slow

ROOT = 1
NO_FD = 0x100
FAILED = 0x101
HEADER = struct.Struct("<8sIIQ")


class Stores(NamedTuple):
    """Two stores with the same paths, put in another order and among others; one lacks `second`."""

    here: Path
    there: Path
    poorer: Path
    first: bytes
    second: bytes
    link: bytes


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    directory = tmp_path_factory.mktemp("stores")
    trees = {}
    for name in ("first", "second", "other"):
        trees[name] = directory / name
        (trees[name] / "sub" / "deep").mkdir(parents=True)
        (trees[name] / "small").write_bytes(name.encode())
        (trees[name] / "sub" / "deep" / "file").write_bytes(b"deep in " + name.encode())
    trees["link"] = directory / "link"
    trees["link"].symlink_to("first/small")
    here, there, poorer = (directory / name for name in ("here", "there", "poorer"))
    first, second, link = import_tree(here, trees["first"], trees["second"], trees["link"])
    import_tree(there, trees["other"], trees["link"], trees["second"], trees["first"])
    import_tree(poorer, trees["link"], trees["other"], trees["first"])
    return Stores(here, there, poorer, first.encode(), second.encode(), link.encode())


@pytest.fixture(scope="module")
def here(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApplianceProcess]:
    with serve(stores.here, tmp_path_factory.mktemp("served") / "here") as process:
        yield process


@pytest.fixture(scope="module")
def there(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApplianceProcess]:
    with serve(stores.there, tmp_path_factory.mktemp("served") / "there") as process:
        yield process


def serve(store: Path, directory: Path, *options: str) -> ApplianceProcess:
    directory.mkdir()
    return ApplianceProcess(store, directory, *options)


class Known(NamedTuple):
    """What a guest knows of the store paths: nodeids of things, and their entries as they came."""

    first: int
    small: int
    deep: int
    second: int
    second_small: int
    link: int
    entry: bytes


def walk(guest: FakeGuest, stores: Stores) -> Known:
    first = guest.lookup(ROOT, stores.first)
    second = guest.lookup(ROOT, stores.second)
    deep = guest.lookup(guest.lookup(guest.lookup(first, b"sub"), b"deep"), b"file")
    return Known(
        first=first,
        small=guest.lookup(first, b"small"),
        deep=deep,
        second=second,
        second_small=guest.lookup(second, b"small"),
        link=guest.lookup(ROOT, stores.link),
        entry=guest.ask(fuse_client.lookup(ROOT, stores.first)).body,
    )


def new_guest(appliance: ApplianceProcess) -> tuple[FakeGuest, NewerQemu]:
    front_end = appliance.connect()
    vmm = NewerQemu(front_end, 2)
    guest = FakeGuest(front_end, vmm=vmm)
    guest.mount()
    return guest, vmm


def move(guest: FakeGuest, appliance: ApplianceProcess, state: bytes) -> tuple[NewerQemu, int]:
    """Have the guest's VMM connect elsewhere and bring the state; return what the check said."""
    guest.vmm.close()
    vmm = NewerQemu(appliance.connect(), 2)
    guest.vmm = vmm
    vmm.realize()
    return vmm, vmm.front_end.load_state(state)


def check_first(guest: FakeGuest, known: Known, stores: Stores) -> None:
    """Check that the guest reads what it knew of the first path, without looking it up."""
    assert guest.ask(fuse_client.read(known.deep, 0, 100)).body == b"deep in first"
    assert guest.ask(fuse_client.read(known.small, 0, 100)).body == b"first"
    assert guest.ask(fuse_client.lookup(ROOT, stores.first)).body == known.entry


def check_all(guest: FakeGuest, known: Known, stores: Stores) -> None:
    check_first(guest, known, stores)
    assert guest.ask(fuse_client.read(known.second_small, 0, 100)).body == b"second"
    assert guest.ask(fuse_client.readlink(known.link)).body == b"first/small"
    assert walk(guest, stores) == known


def wait_for_log(appliance: ApplianceProcess, text: str) -> None:
    for _ in every_event(DEADLINE_S):
        if text in appliance.log():
            return
    raise AssertionError(f"{text!r} is not in\n{appliance.log()}")


# --- Moving ---


def test_a_guest_goes_on_with_another_store_and_back_again(
    here: ApplianceProcess, there: ApplianceProcess, stores: Stores
) -> None:
    guest, vmm = new_guest(here)
    with guest:
        known = walk(guest, stores)
        for target in (there, here, there):
            state, bases = vmm.save()
            assert len(state) < 500
            vmm, result = move(guest, target, state)
            assert result == 0
            vmm.start(guest.memory, guest.rings, bases)
            check_all(guest, known, stores)
        # A path that was never looked up before gets numbers that nothing had.
        assert guest.ask(fuse_client.getattr_(known.link + 1)).error == errno.ESTALE
        assert there.status()[0]["requests"]["READ"] == 3


def test_a_saved_session_goes_on(here: ApplianceProcess, stores: Stores) -> None:
    guest, vmm = new_guest(here)
    with guest:
        first = guest.lookup(ROOT, stores.first)
        early, bases = vmm.save()
        vmm.start(guest.memory, guest.rings, bases)
        known = walk(guest, stores)
        assert known.first == first
        state, bases = vmm.save()
        assert len(state) > len(early)
        # As QEMU's loadvm: the machine is reset, and what was saved first takes its place.
        vmm.front_end.reset_device()
        assert vmm.front_end.load_state(early) == 0
        vmm.start(guest.memory, guest.rings, bases)
        check_first(guest, known, stores)
        assert guest.ask(fuse_client.getattr_(known.second)).error == errno.ESTALE
        assert guest.lookup(ROOT, stores.second) == known.second


def test_a_guest_that_had_not_mounted_mounts_later(
    here: ApplianceProcess, there: ApplianceProcess, stores: Stores
) -> None:
    front_end = here.connect()
    vmm = NewerQemu(front_end, 2)
    with FakeGuest(front_end, vmm=vmm) as guest:
        state, bases = vmm.save()
        vmm, result = move(guest, there, state)
        assert result == 0
        vmm.start(guest.memory, guest.rings, bases)
        assert guest.ask(fuse_client.lookup(ROOT, stores.first)).error == errno.EIO
        guest.mount()
        walk(guest, stores)


def test_a_path_as_the_root_moves_too(stores: Stores, tmp_path: Path) -> None:
    name = stores.first.decode()
    with (
        serve(stores.here, tmp_path / "here", f"--root={name}") as here,
        serve(stores.there, tmp_path / "there", f"--root={name}") as there,
        serve(stores.there, tmp_path / "whole") as whole,
    ):
        guest, vmm = new_guest(here)
        with guest:
            small = guest.lookup(ROOT, b"small")
            state, bases = vmm.save()
            vmm, result = move(guest, whole, state)
            assert result == 1
            wait_for_log(whole, "a store path was the root directory")
            vmm, result = move(guest, there, state)
            assert result == 0
            vmm.start(guest.memory, guest.rings, bases)
            assert guest.ask(fuse_client.read(small, 0, 9)).body == b"first"
            assert guest.lookup(ROOT, b"small") == small


def test_a_view_moves_with_its_files_and_what_was_removed_stays_stale(
    stores: Stores, tmp_path: Path
) -> None:
    names = (stores.first, stores.second, stores.link)
    for store in (stores.here, stores.there):
        command = [*APPLIANCE, "view", "create", "--store", uri_of(store)]
        subprocess.run([*command, "v", "--registration-files", "--closure", *names], check=True)
    with (
        serve(stores.here, tmp_path / "here", "--view=v") as here,
        serve(stores.there, tmp_path / "there", "--view=v") as there,
    ):
        guest, vmm = new_guest(here)
        with guest:
            known = walk(guest, stores)
            listed = guest.lookup(ROOT, b".store-paths")
            state, bases = vmm.save()
            vmm, result = move(guest, there, state)
            assert result == 0
            vmm.start(guest.memory, guest.rings, bases)
            check_all(guest, known, stores)
            paths = guest.ask(fuse_client.read(listed, 0, 4096)).body
            assert all(name in paths for name in names)
            assert guest.lookup(ROOT, b".store-paths") == listed

            remove = [*APPLIANCE, "view", "rm", "--store", uri_of(stores.there), "v"]
            subprocess.run([*remove, stores.second], check=True)
            for _ in every_event(DEADLINE_S):
                if guest.ask(fuse_client.getattr_(known.second)).error == errno.ESTALE:
                    break
            state, bases = vmm.save()
            vmm, result = move(guest, here, state)
            assert result == 0
            vmm.start(guest.memory, guest.rings, bases)
            check_first(guest, known, stores)
            assert guest.ask(fuse_client.getattr_(known.second)).error == errno.ESTALE
            assert guest.lookup(ROOT, stores.second) not in {known.second, 0}


def test_what_a_service_has_is_fetched_where_the_guest_goes_on(
    here: ApplianceProcess, stores: Stores, tmp_path: Path
) -> None:
    guest, vmm = new_guest(here)
    with (
        guest,
        DaemonProcess(uri_of(stores.there), tmp_path / "daemon") as daemon,
        DaemonProcess(uri_of(stores.poorer), tmp_path / "poorer") as other,
        served_from(daemon, tmp_path / "there") as there,
        served_from(other, tmp_path / "nowhere") as nowhere,
    ):
        known = walk(guest, stores)
        state, bases = vmm.save()
        vmm, result = move(guest, nowhere, state)
        assert result == 1
        wait_for_log(nowhere, f"{stores.second.decode()} is not in the store and cannot be fetched")
        vmm, result = move(guest, there, state)
        assert result == 0
        vmm.start(guest.memory, guest.rings, bases)
        check_all(guest, known, stores)


def test_a_request_that_waits_is_answered_before_the_state_is_saved(
    here: ApplianceProcess, stores: Stores, tmp_path: Path
) -> None:
    with (
        DaemonProcess(uri_of(stores.there), tmp_path / "daemon") as daemon,
        served_from(daemon, tmp_path / "there") as there,
    ):
        guest, vmm = new_guest(there)
        with guest:
            guest.lookup(ROOT, stores.first)
            daemon.process.send_signal(signal.SIGSTOP)
            ring = guest.rings[1]
            guest.send(fuse_client.lookup(ROOT, stores.second))
            for _ in every_event(DEADLINE_S):
                if ring.avail_event == ring.avail_idx:
                    break  # it was taken
            assert ring.poll() == []
            for queue in range(2):
                vmm.front_end.set_vring_enable(queue, 0)
            daemon.process.send_signal(signal.SIGCONT)
            state, bases = vmm.save()
            (waited,) = ring.poll()
            second = fuse_client.parse_entry(fuse_client.parse_reply(waited.data).body).nodeid
            vmm, result = move(guest, here, state)
            assert result == 0
            vmm.start(guest.memory, guest.rings, bases)
            assert guest.ask(fuse_client.getattr_(second)).error == 0
            assert guest.lookup(ROOT, stores.second) == second


def served_from(daemon: DaemonProcess, directory: Path) -> ApplianceProcess:
    directory.mkdir()
    uri = f"grpc+unix:{daemon.socket}"
    return ApplianceProcess(uri, directory, f"--state-dir={directory / 'state'}")


# --- What is missing ---


def test_a_path_that_is_missing_is_named_and_the_session_stays_usable(
    here: ApplianceProcess, stores: Stores, tmp_path: Path
) -> None:
    guest, vmm = new_guest(here)
    with guest, serve(stores.poorer, tmp_path / "poorer") as poorer:
        walk(guest, stores)
        state, bases = vmm.save()
        vmm, result = move(guest, poorer, state)
        assert result == 1
        wait_for_log(poorer, f"{stores.second.decode()} is not in the store")
        assert stores.first.decode() not in poorer.log()
        vmm.start(guest.memory, guest.rings, bases)
        guest.mount()
        assert guest.lookup(ROOT, stores.first)


def test_a_guest_can_go_on_without_what_is_missing(
    here: ApplianceProcess, stores: Stores, tmp_path: Path
) -> None:
    guest, vmm = new_guest(here)
    option = "--migration-on-error=guest-error"
    with guest, serve(stores.poorer, tmp_path / "poorer", option) as poorer:
        known = walk(guest, stores)
        state, bases = vmm.save()
        vmm, result = move(guest, poorer, state)
        assert result == 0
        wait_for_log(poorer, f"{stores.second.decode()} is not in the store")
        vmm.start(guest.memory, guest.rings, bases)
        check_first(guest, known, stores)
        assert guest.ask(fuse_client.readlink(known.link)).body == b"first/small"
        for nodeid in (known.second, known.second_small):
            assert guest.ask(fuse_client.getattr_(nodeid)).error == errno.ESTALE


def test_other_inode_numbers_are_refused(
    here: ApplianceProcess, stores: Stores, tmp_path: Path
) -> None:
    guest, vmm = new_guest(here)
    with guest, serve(stores.there, tmp_path / "other", "--inodes=content") as other:
        state, _bases = vmm.save()
        _vmm, result = move(guest, other, state)
        assert result == 1
        wait_for_log(other, "served with --inodes=place, this socket has content")


# --- States that are none ---


def packed(message: bytes, *, magic: bytes = MAGIC, version: int = VERSION) -> bytes:
    return HEADER.pack(magic, version, zlib.crc32(message), len(message)) + message


def with_grants(stores: Stores, *bases: int, next_base: int = 1 << 40) -> bytes:
    """Return a state with grants at these bases, each of a path that is there."""
    names = [stores.first, stores.second, stores.link]
    grants = [
        SavedGrant(base=base, span=1, name=name, kind=ord("l"), digest=bytes(32))
        for base, name in zip(bases, names, strict=False)
    ]
    state = DeviceState(next_base=next_base, grants=grants)
    return packed(state.SerializeToString())


# With what parsing says of them; `test_restoring.py` has what the supervisor says of the others.
HOSTILE: dict[str, tuple[Callable[[bytes, Stores], bytes], str]] = {
    "empty": (lambda _good, _stores: b"", "has 0 bytes"),
    "a header cut short": (lambda good, _stores: good[:20], "has 20 bytes"),
    "cut short": (lambda good, _stores: good[:-1], "after its header, expected"),
    "longer": (lambda good, _stores: good + b"x", "after its header, expected"),
    "huge": (lambda _good, _stores: bytes(STATE_MAX + 1), f"more than {STATE_MAX} bytes"),
    "a huge length": (
        lambda _good, _stores: HEADER.pack(MAGIC, VERSION, 0, 2**64 - 1),
        "expected 18446744073709551615",
    ),
    "of another program": (lambda good, _stores: b"virtiofs" + good[8:], "not one of this program"),
    "of a later version": (
        lambda good, _stores: packed(good[24:], version=2),
        "has version 2; this release reads version 1",
    ),
    "damaged": (lambda good, _stores: good[:-1] + bytes([good[-1] ^ 1]), "checksum is wrong"),
    "random": (lambda _good, _stores: os.urandom(1000), "not one of this program"),
    "no message": (lambda _good, _stores: packed(b"\xff" * 50), "is no DeviceState"),
    "of a later kernel": (
        lambda _good, _stores: packed(
            DeviceState(init={"minor": 99}, next_base=2).SerializeToString()  # type: ignore[arg-type]
        ),
        "speaks FUSE 7.99",
    ),
    "with unknown flags": (
        lambda _good, _stores: packed(
            DeviceState(
                init={"minor": 38, "flags": 1 << 63},  # type: ignore[arg-type]
                next_base=2,
            ).SerializeToString()
        ),
        "promised FUSE flags 0x8000000000000000",
    ),
    "base 0": (lambda _good, stores: with_grants(stores, 0), ""),
    "a store path as root": (lambda _good, stores: with_grants(stores, 1), ""),
    "overlapping": (lambda _good, stores: with_grants(stores, 9, 9), ""),
    "descending": (lambda _good, stores: with_grants(stores, 9, 5), ""),
    "other content": (lambda _good, stores: with_grants(stores, 9), ""),
    "a base beyond the numbers": (lambda _good, stores: with_grants(stores, 2**64 - 1), ""),
    "a taken next base": (lambda _good, stores: with_grants(stores, next_base=1), ""),
    "a huge next base": (lambda _good, stores: with_grants(stores, next_base=2**64 - 1), ""),
}


def test_what_is_no_state_of_a_guest_is_refused_and_changes_nothing(
    here: ApplianceProcess, stores: Stores
) -> None:
    guest, vmm = new_guest(here)
    with guest:
        known = walk(guest, stores)
        good, bases = vmm.save()
        for what, (make, error) in HOSTILE.items():
            state = make(good, stores)
            assert vmm.front_end.load_state(state) == 1, what
            if error and len(state) <= STATE_MAX:
                with pytest.raises(VhostError, match=re.escape(error)):
                    parse_untrusted(state)
        # The log has the first of them, and counts others like them.
        wait_for_log(here, "refused: CHECK_DEVICE_STATE: the device state has 0 bytes")
        assert vmm.front_end.check_device_state() == 1  # nothing was transferred since
        vmm.start(guest.memory, guest.rings, bases)
        check_all(guest, known, stores)


def test_the_state_of_a_session_whose_rings_run_is_refused(stores: Stores, tmp_path: Path) -> None:
    with serve(stores.here, tmp_path / "here") as here, (made := new_guest(here))[0] as guest:
        vmm = made[1]
        known = walk(guest, stores)
        for direction in StateDirection:
            reading, writing = os.pipe()
            fd = writing if direction == StateDirection.SAVE else reading
            assert vmm.front_end.set_device_state_fd(fd, direction) == FAILED
            os.close(reading)
            os.close(writing)
        assert vmm.front_end.check_device_state() == 1
        with (Path(os.devnull)).open() as null:
            vmm.stop()
            assert vmm.front_end.set_device_state_fd(null.fileno(), 2) == FAILED
            assert vmm.front_end.set_device_state_fd(null.fileno(), 0, phase=1) == FAILED
        wait_for_log(here, "rings [0, 1] run")
        wait_for_log(here, "direction 2, expected 0 (save) or 1 (load)")
        wait_for_log(here, "phase 1, expected 0")
        assert known.first


# --- Descriptors of other kinds than QEMU's pipes ---


def test_a_state_goes_through_sockets_and_files(
    here: ApplianceProcess, there: ApplianceProcess, stores: Stores
) -> None:
    guest, vmm = new_guest(here)
    with guest:
        known = walk(guest, stores)
        expected, bases = vmm.save()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert vmm.front_end.set_device_state_fd(theirs.fileno(), 0) == NO_FD
            theirs.close()
            with ours.makefile("rb") as stream:
                assert stream.read() == expected
            assert vmm.front_end.check_device_state() == 0
        file = os.memfd_create("state", os.MFD_CLOEXEC)
        assert vmm.front_end.set_device_state_fd(file, 0) == NO_FD
        assert vmm.front_end.check_device_state() == 0
        assert os.pread(file, 1 << 16, 0) == expected

        vmm, result = move(guest, there, expected)
        assert result == 0
        os.lseek(file, 0, os.SEEK_SET)
        assert vmm.front_end.set_device_state_fd(file, 1) == NO_FD
        assert vmm.front_end.check_device_state() == 0
        os.close(file)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert vmm.front_end.set_device_state_fd(theirs.fileno(), 1) == NO_FD
            ours.sendall(expected)
            assert vmm.front_end.check_device_state() == 0  # though there is no end of it
        vmm.start(guest.memory, guest.rings, bases)
        check_all(guest, known, stores)


# --- cloud-hypervisor ---


def test_cloud_hypervisor_pauses_saves_goes_on_and_restores(
    here: ApplianceProcess, there: ApplianceProcess, stores: Stores
) -> None:
    vmm = CloudHypervisor(here.connect(), 2)
    with FakeGuest(vmm.front_end, vmm=vmm) as guest:
        guest.mount()
        known = walk(guest, stores)
        bases = vmm.stop()
        state = vmm.front_end.save_state()
        vmm.start(guest.memory, guest.rings, bases)
        check_all(guest, known, stores)
        vmm.stop()
        # A guest that is paused with a request in its ring, which nobody has taken.
        guest.send(fuse_client.read(known.deep, 0, 100))

        restored = CloudHypervisor(there.connect(), 2)
        restored.realize_restored()
        assert restored.front_end.load_state(state) == 0
        restored.start(guest.memory, guest.rings, [ring.avail_idx for ring in guest.rings])
        vmm.close()
        guest.vmm = restored
        (waited,) = guest.rings[1].collect(timeout_s=DEADLINE_S)
        assert fuse_client.parse_reply(waited.data).body == b"deep in first"
        check_all(guest, known, stores)


def test_a_guest_that_comes_back_without_a_state_gets_one_warning(
    here: ApplianceProcess, there: ApplianceProcess, stores: Stores
) -> None:
    vmm = CloudHypervisor(here.connect(), 2)
    with FakeGuest(vmm.front_end, vmm=vmm) as guest:
        guest.mount()
        known = walk(guest, stores)
        bases = vmm.stop()
        restored = CloudHypervisor(there.connect(), 2)
        restored.realize_restored()
        restored.start(guest.memory, guest.rings, bases)
        vmm.close()
        guest.vmm = restored
        before = there.log().count("no INIT on this connection")
        for nodeid in (known.first, known.small, known.deep):
            assert guest.ask(fuse_client.getattr_(nodeid)).error == errno.EIO
        assert there.log().count("no INIT on this connection, and no device state") == before + 1
        guest.mount()
        walk(guest, stores)
