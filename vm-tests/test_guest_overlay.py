"""The overlay scenarios in guests; tests/mount/test_overlay_scenarios.py has them on the host."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="module", params=["uml", f"qemu-{NEW_SERIES}"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Served, list[str]]]:
    directory = tmp_path_factory.mktemp("served")
    for name in PACKAGES:
        subprocess.run([program("overlay"), "make", directory / name], check=True)
    names = import_tree(directory / "store", *(directory / name for name in PACKAGES))
    with serve(request.param, directory / "store", directory) as served:
        served.mount()
        # The reference: the same tree in a file system of the guest's kernel.
        made = " && ".join(f"overlay make {name}" for name in PACKAGES)
        served.guest.check(f"mkdir /tmp/original /tmp/scratch && cd /tmp/original && {made}", 60)
        yield served, names


def run(served: Served, options: str, lower: str, names: list[str]) -> dict[str, str]:
    script = f"overlay run {options} {lower} /tmp/scratch {' '.join(names)}"
    return outcomes(served.guest.check(script, ANSWER_S))


@pytest.mark.parametrize("options", OPTIONS)
def test_equal_things_stay_apart_in_an_overlay(
    options: str, served: tuple[Served, list[str]]
) -> None:
    guest, names = served
    expected = run(guest, options, "/tmp/original", list(PACKAGES))
    assert len(expected) == NUM_SCENARIOS
    assert failures(expected) == {}

    found = run(guest, options, "/mnt", names)

    assert failures(found) == {}
    assert found == expected


def test_equal_files_are_locked_watched_and_run_apart_without_an_overlay(
    served: tuple[Served, list[str]],
) -> None:
    guest, names = served
    script = "overlay read {} {} {}"
    expected = outcomes(
        guest.guest.check(script.format("/tmp/original", *PACKAGES), ANSWER_S)
    )
    assert len(expected) == NUM_READING
    assert failures(expected) == {}

    assert outcomes(guest.guest.check(script.format("/mnt", *names), ANSWER_S)) == expected
