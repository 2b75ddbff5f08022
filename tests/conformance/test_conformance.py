"""The read-only POSIX conformance program on mounts of the host kernel.

Guests run the same program on their virtiofs mounts: vm-tests/guest/conformance.c.
"""

import subprocess
from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted

SOURCES = Path(__file__).parents[2] / "vm-tests" / "guest"
NUM_CHECKS = 16


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "conformance"
    flags = ["-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-Wconversion"]
    sources = sorted(SOURCES.glob("conformance*.c"))
    subprocess.run(["gcc", *flags, "-Wshadow", "-o", str(path), *map(str, sources)], check=True)
    return path


def check(program: Path, tree: Path) -> tuple[int, str]:
    done = subprocess.run(
        [program, "check", tree], check=False, stdout=subprocess.PIPE, text=True, timeout=120
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("options", [[], ["--passthrough"], ["--threads=1"]])
def test_a_mount_conforms(program: Path, tmp_path: Path, options: list[str]) -> None:
    subprocess.run([program, "make", tmp_path / "tree"], check=True)
    (name,) = import_tree(tmp_path / "store", tmp_path / "tree")
    (tmp_path / "mnt").mkdir()
    with Mounted(tmp_path / "store", tmp_path / "mnt", *options) as mounted:
        for _warm in range(2):
            status, output = check(program, mounted.path / name)
            assert status == 0, output
            assert output.count("ok ") == NUM_CHECKS


def test_the_program_tells_a_writable_tree_from_a_mount(program: Path, tmp_path: Path) -> None:
    subprocess.run([program, "make", tmp_path / "tree"], check=True)
    status, output = check(program, tmp_path / "tree")
    assert status == 1
    assert "FAILED writes are refused" in output
    assert "ok reading" in output
