"""Debian's Nix in a guest, on an overlay above the mount; the host's is tests/mount's.

The program itself, with the libraries it needs, is a store path that the guest runs from the mount.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness.nix_guest import ROOT, make_package, make_tools, nix, overlay, registration
from vmharness.served import NEW_SERIES, Served, serve

from tests.fakes.appliance_process import import_tree

ANSWER_S = 300.0
PACKAGES = ("kept", "dropped")


class Stored(NamedTuple):
    """The packages' names in the mount, and what registers them with Nix."""

    path: Path
    tools: str
    names: list[str]
    registration: str


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    originals = [make_package(directory / package) for package in PACKAGES]
    store = directory / "store"
    tools, *names = import_tree(store, make_tools(directory / "tools"), *originals)
    registrations = map(registration, names, originals)
    return Stored(store, tools, names, "".join(registrations))


@pytest.fixture(scope="module", params=["uml", f"qemu-{NEW_SERIES}"])
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    with serve(request.param, stored.path, directory, "--list-root") as served:
        served.mount()
        yield served


def test_nix_manages_a_store_that_is_an_overlay_on_the_mount(
    served: Served, stored: Stored
) -> None:
    kept, dropped = stored.names
    guest = served.guest
    guest.check(f"mkdir -p {ROOT} /tmp/o", ANSWER_S)
    guest.check(overlay(f"/mnt/{stored.tools}", "/tmp/o/root", ROOT), ANSWER_S)
    guest.check(overlay("/mnt", "/tmp/o/store", f"{ROOT}/nix/store"), ANSWER_S)
    guest.check(
        f"mount -t proc proc {ROOT}/proc; mount -t devtmpfs dev {ROOT}/dev; mkdir -p"
        f" {ROOT}/nix/var/nix/gcroots; ln -s /nix/store/{kept} {ROOT}/nix/var/nix/gcroots/kept",
        ANSWER_S,
    )
    nix(served.guest, f"--load-db <<'END'\n{stored.registration}END\n")
    nix(served.guest, "--verify --check-contents")
    nix(served.guest, "--optimise")
    nix(served.guest, "--verify --check-contents")
    nix(served.guest, "--gc")
    store = f"{ROOT}/nix/store"
    assert guest.run(f"test -e {store}/{dropped}", ANSWER_S).status == 1
    same = " && ".join(
        f"cmp {store}/{kept}/{place}/{name} /mnt/{dropped}/{place}/{name}"
        for place in (".", "etc", "share/doc")
        for name in ("a.conf", "b.conf", "empty")
    )
    guest.check(same, ANSWER_S)
    nix(served.guest, "--verify --check-contents")
    assert guest.check(f"cat {store}/{kept}/name /mnt/{dropped}/name", ANSWER_S) == b"keptdropped"
