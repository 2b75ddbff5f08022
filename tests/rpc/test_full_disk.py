"""What a daemon says, and keeps, when the disk under its store is full."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode
from appliance.protos import castore_rpc_pb2
from tests.contracts.rig import fresh_bytes
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.wire import Answer, run
from tests.store.audit import audit

pytestmark = pytest.mark.slow

DISK_SIZE_MB = 24
BLOBS = "tvix.castore.v1.BlobService"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE_MB}m", "tmpfs", path], check=True
    )
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def put(target: str, content: bytes) -> Answer:
    messages = [
        castore_rpc_pb2.BlobChunk(data=content[start : start + (1 << 20)]).SerializeToString()
        for start in range(0, len(content), 1 << 20)
    ]
    return run(target, lambda wire: wire.send(f"{BLOBS}/Put", messages))


def read(target: str, digest: Digest) -> Answer:
    request = castore_rpc_pb2.ReadBlobRequest(digest=digest).SerializeToString()
    return run(target, lambda wire: wire.ask(f"{BLOBS}/Read", request))


@pytest.mark.parametrize("size", [30_000, 3 << 20, 40 << 20])
def test_full_disk_is_said_and_nothing_torn(tmp_path: Path, disk: Path, size: int) -> None:
    kept: list[Digest] = []
    with DaemonProcess(f"lmdb://{disk}/store", tmp_path) as daemon:
        target = f"unix:{daemon.socket}"
        while True:
            content = fresh_bytes(size)
            answer = put(target, content)
            if answer.code != grpc.StatusCode.OK:
                break
            kept.append(Digest.of(content))
        assert answer.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the disk is full" in answer.text or "No space left" in answer.text
        for digest in kept:
            assert read(target, digest).code == grpc.StatusCode.OK
        assert daemon.stop() == 0
    assert audit(disk / "store").num_blobs == len(kept)


def test_closure_that_does_not_fit_is_refused(tmp_path: Path, disk: Path) -> None:
    def directories() -> Iterator[bytes]:
        for number in range(2 * DISK_SIZE_MB):
            files = [
                FileNode(b"%08d-%08d" % (number, index), Digest(bytes(32)), 1, executable=False)
                for index in range(20_000)
            ]
            yield Directory(files=files).to_bytes()

    with DaemonProcess(f"lmdb://{disk}/store", tmp_path) as daemon:
        answer = run(
            f"unix:{daemon.socket}",
            lambda wire: wire.send("tvix.castore.v1.DirectoryService/Put", directories()),
        )
        assert answer.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert put(f"unix:{daemon.socket}", b"something small").code == grpc.StatusCode.OK
        assert daemon.stop() == 0
    assert audit(disk / "store").num_blobs == 1
