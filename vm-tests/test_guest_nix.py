"""Debian's Nix in a guest, on an overlay above the mount; the host's is tests/mount's.

The program itself, with the libraries it needs, is a store path that the guest runs from the mount.
The guest's Nix is told of two imported packages, and of a closure that the host's Nix has built and
`appliance copy` has brought along, by what `appliance registration` prints.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness.nix_guest import ROOT, make_package, make_tools, nix, overlay
from vmharness.served import NEW_SERIES, Served, serve

from tests.copier.nix_closure import NixClosure, make_closure
from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import APPLIANCE

ANSWER_S = 300.0
PACKAGES = ("kept", "dropped")


class Stored(NamedTuple):
    """The store, names in the mount, the closure, and what registers all of it with Nix."""

    path: Path
    tools: str
    names: list[str]
    closure: NixClosure
    registration: str


def appliance(*words: str | Path) -> str:
    done = subprocess.run([*APPLIANCE, *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    originals = [make_package(directory / package) for package in PACKAGES]
    store = directory / "store"
    uri = f"lmdb://{store}"
    tools, *names = import_tree(store, make_tools(directory / "tools"), *originals)
    closure = make_closure(directory)
    appliance("copy", "--store", uri, "--from", closure.nix.uri, "-r", *closure.tops)
    registration = appliance("registration", "--store", uri, "-r", *names, *closure.tops)
    return Stored(store, tools, names, closure, registration)


@pytest.fixture(scope="module", params=["uml", f"qemu-{NEW_SERIES}"])
def served(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    with serve(request.param, stored.path, directory, "--list-root") as served:
        served.mount()
        yield served


@pytest.fixture(scope="module")
def registered(served: Served, stored: Stored) -> Served:
    """Make a root whose store is an overlay above the mount, and register what is in the mount."""
    guest = served.guest
    guest.check(f"mkdir -p {ROOT} /tmp/o", ANSWER_S)
    guest.check(overlay(f"/mnt/{stored.tools}", "/tmp/o/root", ROOT), ANSWER_S)
    guest.check(overlay("/mnt", "/tmp/o/store", f"{ROOT}/nix/store"), ANSWER_S)
    guest.check(
        f"mount -t proc proc {ROOT}/proc; mount -t devtmpfs dev {ROOT}/dev;"
        f" mkdir -p {ROOT}/nix/var/nix/gcroots",
        ANSWER_S,
    )
    for path in (f"/nix/store/{stored.names[0]}", stored.closure.tops[0]):
        name = Path(path).name
        guest.check(f"ln -s {path} {ROOT}/nix/var/nix/gcroots/{name}", ANSWER_S)
    nix(guest, f"--load-db <<'END'\n{stored.registration}END\n")
    return served


def test_a_registered_closure_is_known_as_on_the_host(registered: Served, stored: Stored) -> None:
    guest = registered.guest
    closure = stored.closure
    top = closure.tops[0]
    assert sorted(nix(guest, f"-qR {top}").split()) == sorted(closure.built)
    assert sorted(nix(guest, f"-q --references {top}").split()) == sorted(
        closure.nix.text("nix-store", "-q", "--references", top).split()
    )
    for query in ("--deriver", "--hash", "--size"):
        assert nix(guest, f"-q {query} {top}").strip() == closure.nix.text(
            "nix-store", "-q", query, top
        )
    nix(guest, "--verify --check-contents")


def test_a_path_is_added_and_deleted_again(registered: Served, stored: Stored) -> None:
    guest = registered.guest
    guest.check(f"mkdir -p {ROOT}/tmp/added && echo new > {ROOT}/tmp/added/file", ANSWER_S)
    added = nix(guest, "--add /tmp/added").strip()
    assert guest.check(f"cat {ROOT}{added}/file", ANSWER_S) == b"new\n"
    nix(guest, "--verify --check-contents")
    nix(guest, f"--delete {added}")
    assert guest.run(f"test -e {ROOT}{added}", ANSWER_S).status == 1
    # What is in the mount, and no root needs, goes from the overlay only.
    fixed = stored.closure.tops[1]
    nix(guest, f"--delete {fixed}")
    assert guest.run(f"test -e {ROOT}{fixed}", ANSWER_S).status == 1
    guest.check(f"test -e /mnt/{Path(fixed).name}", ANSWER_S)
    refused = nix(guest, f"--delete {stored.closure.named('lib-1.0')}", status=1)
    assert "still alive" in refused
    nix(guest, "--verify --check-contents")


def test_nix_manages_a_store_that_is_an_overlay_on_the_mount(
    registered: Served, stored: Stored
) -> None:
    kept, dropped = stored.names
    guest = registered.guest
    nix(guest, "--verify --check-contents")
    nix(guest, "--optimise")
    nix(guest, "--verify --check-contents")
    nix(guest, "--gc")
    store = f"{ROOT}/nix/store"
    assert guest.run(f"test -e {store}/{dropped}", ANSWER_S).status == 1
    same = " && ".join(
        f"cmp {store}/{kept}/{place}/{name} /mnt/{dropped}/{place}/{name}"
        for place in (".", "etc", "share/doc")
        for name in ("a.conf", "b.conf", "empty")
    )
    guest.check(same, ANSWER_S)
    nix(guest, "--verify --check-contents")
    assert guest.check(f"cat {store}/{kept}/name /mnt/{dropped}/name", ANSWER_S) == b"keptdropped"
    # The closure has a root, so all of it is still there, byte for byte.
    top = stored.closure.tops[0]
    assert sorted(nix(guest, f"-qR {top}").split()) == sorted(stored.closure.built)
    application = Path(stored.closure.named("app-2.0")).name
    assert (
        guest.check(f"cat {store}/{application}/run", ANSWER_S)
        == (stored.closure.nix.directory / application / "bin" / "app").read_bytes()
    )
