"""System calls on an overlay say and do the same whether a mount is below it or a directory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.overlaid import overlay
from tests.mount import overlay_operations

pytestmark = pytest.mark.slow

# Every so many cases are tried: steps that meet all kinds and states.
MANY = 3
SOME = 7


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "tree"
    directory.mkdir()
    # All equal: whatever crosses over from one to another shows in the other's outcome.
    for number, _case in enumerate(overlay_operations.cases()):
        overlay_operations.make_directory(directory / f"{number}")
    directory.chmod(0o555)
    return directory


@pytest.fixture(scope="module")
def served(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("served")
    (name,) = import_tree(directory / "store", original)
    (directory / "mnt").mkdir()
    with Mounted(directory / "store", directory / "mnt", "--allow-other") as mounted:
        yield mounted.path / name


def outcomes(lower: Path, directory: Path, options: str, *arguments: str) -> dict[str, Any]:
    with overlay(lower, directory, options) as merged:
        done = subprocess.run(
            [sys.executable, overlay_operations.__file__, merged, *arguments],
            check=False,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ("plain", [f"{MANY}"]),
        ("metacopy=on", [f"{SOME}"]),
        # After a copy-up, this overlayfs counts 1 link of a file as long as its inode is in memory,
        # and 2 afterwards, whatever is below it. Another test may drop the caches meanwhile.
        ("index=on,nfs_export=on", [f"{SOME}", overlay_operations.NO_LINK_COUNTS]),
        ("plain", [f"{SOME}", "nobody"]),
    ],
    ids=["plain", "metacopy", "nfs_export", "nobody"],
)
def test_every_call_says_and_does_the_same(
    original: Path, served: Path, tmp_path: Path, options: str, arguments: list[str]
) -> None:
    expected = outcomes(original, tmp_path / "original", options, *arguments)
    assert all(is_left_alone for *_said, is_left_alone in expected.values())
    assert len(expected) > 400

    found = outcomes(served, tmp_path / "served", options, *arguments)

    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    for name in different[:1]:
        print("found", json.dumps(found[name], indent=1))
        print("expected", json.dumps(expected[name], indent=1))
    assert different == []
