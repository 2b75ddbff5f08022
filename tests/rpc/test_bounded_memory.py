"""What the largest objects take of a daemon and its clients."""

import subprocess
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import FileNode
from appliance.nix.path_info import read_path_info
from appliance.services.contracts import Services
from tests.contracts.rig import Rig
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.peak_memory import Measured, measure_memory
from tests.fakes.running_command import APPLIANCE
from tests.fakes.store_client import run_client
from tests.importer.trees import make_directories, make_sparse, small_disk

BLOB_SIZE = 4 << 30
BLOB_LIMIT_BYTES = 200 << 20
NUM_DIRECTORIES = 200_000
CLOSURE_LIMIT_BYTES = 400 << 20

pytestmark = pytest.mark.slow


def import_into(daemon: DaemonProcess, path: Path, staging: Path) -> Measured:
    command = [*APPLIANCE, "import", "--store", daemon.unix_uri, str(path)]
    return measure_memory(command, {"TMPDIR": str(staging)})


def imported_digest(daemon: DaemonProcess) -> Digest:
    """Return the digest of the only path that there is."""

    async def find(services: Services) -> Digest:
        (info,) = [read_path_info(encoded) async for encoded in services.path_infos.list()]
        assert isinstance(info.node, FileNode)
        return info.node.digest

    return Rig(daemon.unix_uri).run(find)


def test_blob_of_any_size_is_imported_and_read(tmp_path: Path) -> None:
    make_sparse(tmp_path / "large", BLOB_SIZE)
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        imported = import_into(daemon, tmp_path / "large", tmp_path)
        read = run_client(daemon.unix_uri, "read", imported_digest(daemon).hex())
        daemon_bytes = daemon.memory_bytes("VmHWM")
    (tmp_path / "large").unlink()
    subprocess.run(["rm", "-r", tmp_path / "store"], check=True)

    assert imported.output.endswith("-large\n")
    assert max(imported.memory_bytes, read.memory_bytes, daemon_bytes) < BLOB_LIMIT_BYTES


def test_closure_of_many_directories_is_imported(tmp_path: Path) -> None:
    # In memory: it is made and removed in no time.
    with small_disk(tmp_path / "disk", "2g") as disk:
        make_directories(disk / "tree", NUM_DIRECTORIES)
        with DaemonProcess(f"lmdb://{disk}/store", tmp_path) as daemon:
            imported = import_into(daemon, disk / "tree", tmp_path)
            # Pages of the store that are mapped are the system's, to keep or to drop.
            daemon_bytes = daemon.memory_bytes("VmHWM") - daemon.memory_bytes("RssFile")

    assert imported.output.endswith("-tree\n")
    assert max(imported.memory_bytes, daemon_bytes) < CLOSURE_LIMIT_BYTES


def test_closure_of_many_directories_is_put_and_got(tmp_path: Path) -> None:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        put = run_client(daemon.unix_uri, "put-closure", str(NUM_DIRECTORIES // 20))
        got = run_client(daemon.unix_uri, "get-closure", put.digest.hex())
        most = max(put.memory_bytes, got.memory_bytes, daemon.memory_bytes("VmHWM"))

    assert got.digest == put.digest
    assert most < CLOSURE_LIMIT_BYTES
