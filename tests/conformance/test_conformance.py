"""The read-only POSIX conformance program on mounts of the host kernel.

Guests run the same program on their virtiofs mounts: vm-tests/test_guest_conformance.py.
"""

import subprocess
from pathlib import Path

import pytest
from vmharness.initramfs import program

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted

pytestmark = pytest.mark.slow

NUM_CHECKS = 16


def check(tree: Path) -> tuple[int, str]:
    command: list[str | Path] = [program("conformance"), "check", tree]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    subprocess.run([program("conformance"), "make", tmp_path / "tree"], check=True)
    return tmp_path / "tree"


@pytest.mark.parametrize("options", [[], ["--passthrough"], ["--threads=1"]])
def test_a_mount_conforms(tree: Path, tmp_path: Path, options: list[str]) -> None:
    (name,) = import_tree(tmp_path / "store", tree)
    (tmp_path / "mnt").mkdir()
    with Mounted(tmp_path / "store", tmp_path / "mnt", *options) as mounted:
        for _warm in range(2):
            status, output = check(mounted.path / name)
            assert status == 0, output
            assert output.count("ok ") == NUM_CHECKS


def test_the_program_tells_a_writable_tree_from_a_mount(tree: Path) -> None:
    status, output = check(tree)
    assert status == 1
    assert "FAILED writes are refused" in output
    assert "ok reading" in output
