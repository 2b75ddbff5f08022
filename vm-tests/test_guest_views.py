"""Two guests with overlapping views on one store, each with Nix in it."""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness.guest import Guest
from vmharness.nix_guest import ROOT, make_package, make_tools, nix, overlay
from vmharness.served import boot_guest

from tests.fakes.appliance_process import ApplianceProcess, import_tree, uri_of
from tests.fakes.running_command import APPLIANCE

ANSWER_S = 300.0
PACKAGES = ("common", "left", "right", "neither")


class Stored(NamedTuple):
    store: Path
    tools: str
    names: dict[str, str]

    def of_view(self, view: str) -> list[str]:
        return [self.tools, self.names["common"], self.names[view]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    store = directory / "store"
    originals = [make_package(directory / package) for package in PACKAGES]
    tools, *names = import_tree(store, make_tools(directory / "tools"), *originals)
    made = Stored(store, tools, dict(zip(PACKAGES, names, strict=True)))
    for view in ("left", "right"):
        command = [*APPLIANCE, "view", "create", "--store", uri_of(store), "--registration-files"]
        subprocess.run([*command, view, "--closure", *made.of_view(view)], check=True)
    return made


@pytest.fixture(scope="module")
def guests(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    directory = tmp_path_factory.mktemp("served")
    sockets = ("left.sock,view=left", "right.sock,view=right")
    options = ("--tag=store", "--num-request-queues=1")
    consoles = {view: tmp_path_factory.mktemp(view) for view in ("left", "right")}
    with (
        ApplianceProcess(stored.store, directory, *options, sockets=sockets) as server,
        boot_guest("uml", server.sockets[:1], consoles["left"]) as left,
        boot_guest("uml", server.sockets[1:], consoles["right"]) as right,
    ):
        for guest in (left, right):
            guest.check("mount -t virtiofs -o ro store /mnt", ANSWER_S)
        yield {"left": left, "right": right}


def test_each_guest_sees_its_view_and_nothing_else(
    guests: dict[str, Guest], stored: Stored
) -> None:
    for view, guest in guests.items():
        seen = stored.of_view(view)
        listed = guest.check("ls -A /mnt", ANSWER_S).decode().split()
        assert sorted(listed) == sorted([*seen, ".registration", ".store-paths"])
        for name in [stored.tools, *stored.names.values()]:
            status = guest.run(f"ls {shlex.quote(f'/mnt/{name}')} >/dev/null 2>&1", ANSWER_S).status
            assert (status == 0) == (name in seen), name
        assert guest.check("cat /mnt/.store-paths", ANSWER_S).decode().splitlines() == sorted(
            f"/nix/store/{name}" for name in seen
        )


def test_nix_registers_verifies_and_collects_within_a_view(
    guests: dict[str, Guest], stored: Stored
) -> None:
    guest, common, own = guests["left"], stored.names["common"], stored.names["left"]
    guest.check(f"mkdir -p {ROOT} /tmp/o", ANSWER_S)
    guest.check(overlay(f"/mnt/{stored.tools}", "/tmp/o/root", ROOT), ANSWER_S)
    guest.check(overlay("/mnt", "/tmp/o/store", f"{ROOT}/nix/store"), ANSWER_S)
    guest.check(
        f"mount -t proc proc {ROOT}/proc; mount -t devtmpfs dev {ROOT}/dev;"
        f" mkdir -p {ROOT}/nix/var/nix/gcroots;"
        f" ln -s /nix/store/{own} {ROOT}/nix/var/nix/gcroots/own",
        ANSWER_S,
    )
    nix(guest, "--load-db </mnt/.registration")
    nix(guest, "--verify --check-contents")
    nix(guest, f"--check-validity /nix/store/{common} /nix/store/{own}")
    nix(guest, "--gc")
    assert guest.run(f"test -e {ROOT}/nix/store/{common}", ANSWER_S).status == 1
    assert guest.check(f"cat {ROOT}/nix/store/{own}/name", ANSWER_S) == b"left"
    # Only the overlay has lost it.
    assert guest.check(f"cat /mnt/{common}/name", ANSWER_S) == b"common"
    nix(guest, "--verify --check-contents")


def test_a_guest_follows_its_view(guests: dict[str, Guest], stored: Stored) -> None:
    left, right = guests["left"], guests["right"]
    added, removed = stored.names["neither"], stored.names["common"]
    left.check("echo 3 >/proc/sys/vm/drop_caches", ANSWER_S)

    def view(*words: str) -> None:
        command = [*APPLIANCE, "view", words[0], "--store", uri_of(stored.store)]
        subprocess.run([*command, *words[1:]], check=True)

    view("add", "left", added)
    assert left.check(f"cat /mnt/{added}/name", ANSWER_S) == b"neither"
    view("rm", "left", removed)
    # The attributes of the root may be a second old, and with them its listing.
    left.check(f"while ls -A /mnt | grep -q {removed}; do usleep 50000; done", ANSWER_S)
    assert left.run(f"cat /mnt/{removed}/etc/a.conf", ANSWER_S).status == 1
    assert right.check(f"cat /mnt/{removed}/name", ANSWER_S) == b"common"
    assert right.run(f"cat /mnt/{added}/name", ANSWER_S).status == 1
