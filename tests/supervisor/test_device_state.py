"""Guests that are saved, and go on here or with another supervisor of another store."""

import errno
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, uri_of
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.fakes.vmms import CloudHypervisor, NewerQemu
from tests.supervisor.moved_guests import (
    ROOT,
    Stores,
    check_all,
    check_first,
    move,
    new_guest,
    serve,
    served_from,
    wait_for_log,
    walk,
)

pytestmark = pytest.mark.slow

NO_FD = 0x100
FAILED = 0x101


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
