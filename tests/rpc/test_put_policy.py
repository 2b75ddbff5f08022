"""What a daemon refuses to take, and what it signs."""

import asyncio
import base64
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode
from appliance.errors import InvalidRequestError, StoreError
from appliance.nix.hashes import NixHash
from appliance.nix.narinfo import NarInfoFile, encode_path_info, narinfo_of
from appliance.nix.signing import SecretKey
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.many_blobs import put_missing
from appliance.services.open_services import open_services
from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE

SEED = bytes(range(32))
KEY = SecretKey("test-1", SEED)
OTHER_KEY = SecretKey("test-1", bytes(range(1, 33)))
CONTENT = b"content"
PATH = StorePath(bytes([7] * 20), "input-addressed")


pytestmark = pytest.mark.slow


class Put(NamedTuple):
    """A path as it is put: the node of a file, and the claims about it."""

    node: FileNode
    narinfo: NarInfoFile

    def encoded(self) -> bytes:
        return encode_path_info(self.narinfo, self.node)

    def signed(self, key: SecretKey) -> "Put":
        signature = key.sign(self.narinfo.fingerprint())
        return self._replace(narinfo=self.narinfo.with_signature(signature))


async def make_put(services: Services) -> Put:
    """Put a blob; return what is to be put about a path that has it."""
    writer = await services.blobs.open_write()
    await writer.write(CONTENT)
    digest = await writer.close()
    node = FileNode(b"", digest, len(CONTENT), executable=False)
    nar = await services.path_infos.calculate_nar(node)
    return Put(node, NarInfoFile(PATH, "", NixHash("sha256", nar.sha256), nar.size))


def run(*arguments: str | Path, status: int = 0) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run([*APPLIANCE, *arguments], check=False, capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done


def with_daemon(
    directory: Path, options: Sequence[str], work: Callable[[Services], Awaitable[None]]
) -> None:
    async def connected(uri: str) -> None:
        address = parse_service_uri(uri)
        async with open_services(ServiceAddresses(address, address, address)) as services:
            await work(services)

    store = f"lmdb://{directory}/store"
    with DaemonProcess(store, directory / "daemon", options=options) as daemon:
        asyncio.run(connected(daemon.unix_uri))


def required() -> list[str]:
    return ["--require-signatures", "--trusted-public-keys", str(KEY.public)]


def test_paths_must_be_signed_where_signatures_are_required(tmp_path: Path) -> None:
    async def work(services: Services) -> None:
        put = await make_put(services)
        for wrong, reason in (
            (put, "it has no signature"),
            (put.signed(OTHER_KEY), "its signature by test-1 is wrong"),
            (put.signed(SecretKey("other-1", bytes(32))), "it is signed by other-1 only"),
        ):
            with pytest.raises(InvalidRequestError, match=reason):
                await services.path_infos.put(wrong.encoded())
        assert await services.path_infos.get(PATH.digest) is None
        right = put.signed(KEY).encoded()
        assert await services.path_infos.put(right) == right

    with_daemon(tmp_path, required(), work)


def test_a_signature_does_not_vouch_for_other_content(tmp_path: Path) -> None:
    # The NAR hash is signed; the node with which it comes is another file of the same size.
    async def work(services: Services) -> None:
        put = (await make_put(services)).signed(KEY)
        writer = await services.blobs.open_write()
        await writer.write(CONTENT.upper())
        node = put.node._replace(digest=await writer.close())
        with pytest.raises(InvalidRequestError, match="hash of the NAR"):
            await services.path_infos.put(put._replace(node=node).encoded())
        assert await services.path_infos.get(PATH.digest) is None

    with_daemon(tmp_path, required(), work)


def test_a_content_address_is_proven_by_the_content(tmp_path: Path) -> None:
    (tmp_path / "tree").write_bytes(CONTENT)
    with DaemonProcess(
        f"lmdb://{tmp_path}/store", tmp_path / "daemon", options=required()
    ) as daemon:
        (name,) = run("import", "--store", daemon.unix_uri, tmp_path / "tree").stdout.split()
        said = run("path-info", "--sigs", "--store", daemon.unix_uri, name.decode()).stdout
        assert b"ca:fixed:r:sha256:" in said


def test_what_is_put_is_signed_once(tmp_path: Path) -> None:
    async def work(services: Services) -> None:
        put = await make_put(services)
        first = await services.path_infos.put(put.encoded())
        assert await services.path_infos.get(PATH.digest) == first
        assert await services.path_infos.put(put.encoded()) == first
        message = pathinfo_pb2.PathInfo.FromString(first)
        claim = narinfo_of(message)
        (signature,) = claim.signatures
        assert KEY.public.verifies(signature, put.narinfo.fingerprint())
        # What is not true is not signed.
        other = put.narinfo._replace(
            path=StorePath(bytes([8] * 20), "other"), nar_hash=NixHash("sha256", bytes(32))
        )
        with pytest.raises(InvalidRequestError, match="hash of the NAR"):
            await services.path_infos.put(put._replace(narinfo=other).encoded())

    secret = base64.b64encode(SEED + KEY.public.data).decode()
    (tmp_path / "key").write_text(f"{KEY.public.name}:{secret}\n")
    with_daemon(tmp_path, ["--sign", str(tmp_path / "key")], work)


def test_a_read_only_daemon_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "tree").write_bytes(CONTENT)
    (name,) = import_tree(tmp_path / "store", tmp_path / "tree")
    root = Directory(files=[FileNode(b"f", Digest.of(CONTENT), 7, executable=False)])

    async def refused(work: Awaitable[object]) -> None:
        with pytest.raises(StoreError, match="this daemon is read-only"):
            await work

    async def work(services: Services) -> None:
        path = StorePath.parse(name)
        known = await services.path_infos.get(path.digest)
        assert known is not None
        assert await services.blobs.has(Digest.of(CONTENT))
        await refused(services.path_infos.put(known))
        await refused(services.directories.put(root))
        writer = await services.blobs.open_write()

        async def put_blob() -> None:
            await writer.write(b"new")
            await writer.close()

        await refused(put_blob())
        await refused(put_missing(services.blobs, [(Digest.of(b"new"), b"new")]))
        assert not await services.blobs.has(Digest.of(b"new"))

    with_daemon(tmp_path, ["--read-only"], work)


def test_a_read_only_daemon_needs_a_store(tmp_path: Path) -> None:
    done = run("daemon", "--store", f"lmdb://{tmp_path}/none", "--read-only", status=1)
    assert b"/none" in done.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--read-only", "--allow-replace"],
        ["--read-only", "--check-content"],
        ["--read-only", "--require-signatures"],
        ["--trusted-public-keys", "test-1:AAAA"],
        ["--require-signatures", "--trusted-public-keys", "test-1:AAAA"],
        ["--require-signatures", "--trusted-public-keys", "test-1"],
        ["--sign", "/nowhere"],
        ["--sign", "/proc/self/cmdline"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, words: Sequence[str]) -> None:
    done = run("daemon", "--store", f"lmdb://{tmp_path}/store", *words, status=2)
    assert done.stderr.startswith(b"appliance: --")
    assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "store").exists()
