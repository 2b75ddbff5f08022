"""What a guest knows of two stores with the same paths, and how it moves between them."""

from pathlib import Path
from typing import NamedTuple

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.vmms import NewerQemu

ROOT = 1


class Stores(NamedTuple):
    """Two stores with the same paths, put in another order and among others; one lacks `second`."""

    here: Path
    there: Path
    poorer: Path
    first: bytes
    second: bytes
    link: bytes


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


def served_from(daemon: DaemonProcess, directory: Path) -> ApplianceProcess:
    directory.mkdir()
    uri = f"grpc+unix:{daemon.socket}"
    return ApplianceProcess(uri, directory, f"--state-dir={directory / 'state'}")
