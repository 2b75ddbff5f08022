"""What the largest objects take of a daemon and its clients."""

from pathlib import Path

import pytest

from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.store_client import run_client

BLOB_SIZE = 1 << 30
BLOB_LIMIT_BYTES = 200 << 20
NUM_DIRECTORIES = 20_000
CLOSURE_LIMIT_BYTES = 400 << 20

pytestmark = pytest.mark.slow


def test_blob_of_any_size_passes_through(tmp_path: Path) -> None:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        put = run_client(daemon.unix_uri, "put", str(BLOB_SIZE))
        read = run_client(daemon.unix_uri, "read", put.digest.hex())
        most = max(put.memory_bytes, read.memory_bytes, daemon.memory_bytes("VmHWM"))

    assert most < BLOB_LIMIT_BYTES


def test_closure_of_many_directories_passes_through(tmp_path: Path) -> None:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        put = run_client(daemon.unix_uri, "put-closure", str(NUM_DIRECTORIES))
        got = run_client(daemon.unix_uri, "get-closure", put.digest.hex())
        most = max(put.memory_bytes, got.memory_bytes, daemon.memory_bytes("VmHWM"))

    assert got.digest == put.digest
    assert most < CLOSURE_LIMIT_BYTES
