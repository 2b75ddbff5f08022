"""The overlay scenarios in guests; tests/mount/test_overlay_scenarios.py has them on the host."""

import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from vmharness.initramfs import program
from vmharness.served import NEW_SERIES, Served, serve

from tests.fakes.appliance_process import import_tree
from tests.fakes.overlaid import (
    NUM_READING,
    NUM_SCENARIOS,
    OPTIONS,
    PACKAGES,
    failures,
    outcomes,
)

ANSWER_S = 300.0
# Emulated CPUs are slow: of the options those that differ most. And UML's tmpfs, the upper half of
# the overlays, has no "user." attributes (Linux 6.6).
TRIED = {
    "uml": [options for options in OPTIONS if options != "userxattr"],
    f"qemu-{NEW_SERIES}": ["plain", "metacopy=on", "index=on,nfs_export=on"],
}


class Guest(NamedTuple):
    """A guest, and the packages' names in its mount."""

    served: Served
    names: list[str]

    def overlay(self, command: str, lower: str, *words: str) -> dict[str, str]:
        script = f"overlay {command} {lower} {' '.join(words)}"
        return outcomes(self.served.guest.check(script, ANSWER_S))


@pytest.fixture(scope="module", params=TRIED)
def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("served")
    for name in PACKAGES:
        subprocess.run([program("overlay"), "make", directory / name], check=True)
    names = import_tree(directory / "store", *(directory / name for name in PACKAGES))
    with serve(request.param, directory / "store", directory, "--list-root") as served:
        served.mount()
        # The reference: the same tree in a file system of the guest's kernel.
        made = " && ".join(f"overlay make {name}" for name in PACKAGES)
        served.guest.check(f"mkdir /tmp/original /tmp/scratch && cd /tmp/original && {made}", 60)
        yield Guest(served, names)


def test_equal_things_stay_apart_in_an_overlay(guest: Guest) -> None:
    expected: dict[str, str] = {}
    found: dict[str, str] = {}
    tried = TRIED[guest.served.machine]
    for options in tried:
        command = f"run {options}"
        expected |= guest.overlay(command, "/tmp/original", "/tmp/scratch", *PACKAGES)
        found |= guest.overlay(command, "/mnt", "/tmp/scratch", *guest.names)

    assert len(expected) == NUM_SCENARIOS * len(tried)
    assert failures(expected) == {}
    assert failures(found) == {}
    assert found == expected


def test_equal_files_are_locked_watched_and_run_apart_without_an_overlay(guest: Guest) -> None:
    expected = guest.overlay("read", "/tmp/original", *PACKAGES)
    assert len(expected) == NUM_READING
    assert failures(expected) == {}

    assert guest.overlay("read", "/mnt", *guest.names) == expected
