"""The POSIX conformance program in guests; tests/conformance runs it on mounts of the host."""

import subprocess
from pathlib import Path

import pytest
from vmharness.initramfs import program
from vmharness.served import NEW_SERIES, serve

from tests.fakes.appliance_process import import_tree

ANSWER_S = 300.0


@pytest.mark.vm
@pytest.mark.parametrize("machine", ["uml", f"qemu-{NEW_SERIES}"])
def test_a_guests_mount_conforms(machine: str, tmp_path: Path) -> None:
    subprocess.run([program("conformance"), "make", tmp_path / "tree"], check=True)
    (name,) = import_tree(tmp_path / "store", tmp_path / "tree")
    (tmp_path / "served").mkdir()
    with serve(machine, tmp_path / "store", tmp_path / "served") as served:
        served.mount("ro")
        for _warm in range(2):
            result = served.guest.run(f"conformance check /mnt/{name}", ANSWER_S)
            assert result.status == 0, result.output.decode()
