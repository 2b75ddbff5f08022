"""Whatever is done to one of several equal files under overlayfs, the others stay as they are.

Guests run the same program on their virtiofs mounts: vm-tests/test_guest_overlay.py.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness.initramfs import program

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.overlaid import (
    AILING,
    HANDLES_AIL,
    NUM_READING,
    NUM_SCENARIOS,
    OPTIONS,
    PACKAGES,
    failures,
    outcomes,
)

pytestmark = pytest.mark.slow


class Lower(NamedTuple):
    """A directory with two equal packages, and their names."""

    path: Path
    packages: list[str]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    directory = tmp_path_factory.mktemp("original")
    for name in PACKAGES:
        subprocess.run([program("overlay"), "make", directory / name], check=True)
    return Lower(directory, list(PACKAGES))


@pytest.fixture(
    scope="module",
    params=[[], ["--threads=1"], ["--passthrough"]],
    ids=["mount", "one thread", "passthrough"],
)
def served(
    request: pytest.FixtureRequest, original: Lower, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lower]:
    directory = tmp_path_factory.mktemp("served")
    names = import_tree(directory / "store", *(original.path / name for name in PACKAGES))
    (directory / "mnt").mkdir()
    # Listed as the original is: Linux finds the name of a directory by a listing of the one above,
    # when it has nothing but a handle of it.
    with Mounted(directory / "store", directory / "mnt", "--list-root", *request.param) as mounted:
        yield Lower(mounted.path, names)


def comparable(found: dict[str, str]) -> dict[str, str]:
    """Return what this machine's kernel can do on any FUSE mount."""
    return {
        name: outcome
        for name, outcome in found.items()
        if not (HANDLES_AIL and name.endswith(f" {AILING}"))
    }


def run(options: str, lower: Lower, scratch: Path) -> dict[str, str]:
    scratch.mkdir()
    # A mount namespace of its own: what it has mounted goes with it, whatever happens.
    command: list[str | Path] = [
        "unshare",
        "--mount",
        program("overlay"),
        "run",
        options,
        lower.path,
        scratch,
    ]
    done = subprocess.run(
        [*command, *lower.packages], check=False, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return outcomes(done.stdout)


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_things_stay_apart_in_an_overlay(
    options: str, original: Lower, served: Lower, tmp_path: Path
) -> None:
    expected = run(options, original, tmp_path / "original")
    assert len(expected) == NUM_SCENARIOS
    assert failures(expected) == {}

    found = comparable(run(options, served, tmp_path / "served"))

    assert failures(found) == {}
    assert found == comparable(expected)


def test_equal_files_are_locked_watched_and_run_apart_without_an_overlay(
    original: Lower, served: Lower
) -> None:
    def read(lower: Lower) -> dict[str, str]:
        command: list[str | Path] = [program("overlay"), "read", lower.path, *lower.packages]
        return outcomes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    expected = read(original)
    assert len(expected) == NUM_READING
    assert failures(expected) == {}

    assert comparable(read(served)) == comparable(expected)
