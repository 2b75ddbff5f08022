"""Debian's Nix in a guest, on an overlay above the mount; the host's is tests/mount's.

The program itself, with the libraries it needs, is a store path that the guest runs from the mount.
"""

import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness.served import NEW_SERIES, Served, serve

from tests.fakes.appliance_process import import_tree

ANSWER_S = 300.0
EQUAL = "setting = 1\n" * 10
PACKAGES = ("kept", "dropped")
ROOT = "/tmp/root"


class Stored(NamedTuple):
    """The packages' names in the mount, and what registers them with Nix."""

    path: Path
    tools: str
    names: list[str]
    registration: str


def make_tools(path: Path) -> Path:
    """Make a root directory with nix-store, and nothing else but what it loads."""
    listed = subprocess.run(
        ["ldd", "/usr/bin/nix-store"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        target = path / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (path / "bin").mkdir()
    shutil.copy("/usr/bin/nix", path / "bin" / "nix-store")
    (path / "etc" / "nix").mkdir(parents=True)
    (path / "etc" / "nix" / "nix.conf").write_text("build-users-group =\nsandbox = false\n")
    (path / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (path / "etc" / "group").write_text("root:x:0:\n")
    for place in ("nix/store", "dev", "proc", "tmp", "root"):
        (path / place).mkdir(parents=True)
    return path


def make_package(path: Path) -> Path:
    for place in (".", "etc", "share/doc"):
        (path / place).mkdir(parents=True, exist_ok=True)
        for name in ("a.conf", "b.conf"):
            (path / place / name).write_text(EQUAL)
        (path / place / "empty").touch()
    (path / "name").write_text(path.name)
    return path


def registration(name: str, original: Path) -> str:
    """Return what `nix-store --load-db` takes of a path: its NAR's digest and size."""
    command: list[str | Path] = ["nix-store", "--dump", original]
    nar = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return f"/nix/store/{name}\n{hashlib.sha256(nar).hexdigest()}\n{len(nar)}\n\n0\n"


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


def overlay(lower: str, upper: str, merged: str) -> str:
    return (
        f"mkdir -p {upper}/up {upper}/work && mount -t overlay overlay"
        f" -o lowerdir={lower},upperdir={upper}/up,workdir={upper}/work {merged}"
    )


def nix(served: Served, words: str) -> str:
    """Run nix-store in the root that the test has made; return what it wrote."""
    script = f"HOME=/root chroot {ROOT} /bin/nix-store 2>&1 {words}"
    output = served.guest.check(script, ANSWER_S).decode()
    assert "error" not in output, output
    return output


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
    nix(served, f"--load-db <<'END'\n{stored.registration}END\n")
    nix(served, "--verify --check-contents")
    nix(served, "--optimise")
    nix(served, "--verify --check-contents")
    nix(served, "--gc")
    store = f"{ROOT}/nix/store"
    assert guest.run(f"test -e {store}/{dropped}", ANSWER_S).status == 1
    same = " && ".join(
        f"cmp {store}/{kept}/{place}/{name} /mnt/{dropped}/{place}/{name}"
        for place in (".", "etc", "share/doc")
        for name in ("a.conf", "b.conf", "empty")
    )
    guest.check(same, ANSWER_S)
    nix(served, "--verify --check-contents")
    assert guest.check(f"cat {store}/{kept}/name /mnt/{dropped}/name", ANSWER_S) == b"keptdropped"
