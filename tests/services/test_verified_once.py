"""Whoever reads a blob of a peer verifies it, once: see `BlobReader`."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from appliance.castore import chunking
from appliance.castore.digest import Digest
from appliance.castore.directory import FileNode
from appliance.errors import CorruptBlobError, NarError, StoreError
from appliance.rpc.server import Server
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.fetch import BlobFetcher
from appliance.services.lmdb_blobs import LmdbBlobService
from appliance.services.nar_render import file_content, render_nar
from appliance.services.open_services import open_services
from appliance.services.repair import LocalStores, Repairer, ServiceSource
from appliance.services.verify import Verifier
from appliance.store.blob_cache import BlobCache
from appliance.store.writer import AsyncStore
from tests.contracts.rig import read_blob
from tests.fakes.scripted_services import ScriptedServices
from tests.fs.guest import File, store_path

if TYPE_CHECKING:
    from appliance.services.verify_errors import VerifyError

SIZES = [3000, 1 << 20, (5 << 20) + 3]
DEADLINE_S = 60


class Peer:
    """A blob of a service in another process, as its client meets it; right or not."""

    def __init__(self, scripted: ScriptedServices, directory: Path, content: bytes) -> None:
        self.scripted = scripted
        self.directory = directory
        self.content = content
        self.digest = Digest.of(content)
        self.path = store_path(f"path-{self.digest.hex()[:8]}")
        self.node = FileNode(b"x", self.digest, len(content), executable=False)
        scripted.put(File(content), self.path.name)

    def send(self, content: bytes) -> None:
        self.scripted.blobs[self.digest] = content


# Returns whether the content was accepted.
Take = Callable[[Services, Peer], Awaitable[bool]]


async def fetch(services: Services, peer: Peer) -> bool:
    cache = BlobCache(peer.directory / "cache", 1 << 30)
    fetcher = BlobFetcher(services.blobs, cache)
    try:
        with suppress(CorruptBlobError):
            await fetcher.fetch(peer.digest, len(peer.content))
        return cache.has(peer.digest)
    finally:
        await fetcher.close()
        assert [path for path in cache.temp_path.iterdir() if path.is_file()] == []
        cache.close()


async def repair(services: Services, peer: Peer) -> bool:
    store = AsyncStore.open(peer.directory / "store", create=True)
    try:
        repairer = Repairer(LocalStores(store, None), ServiceSource(services))
        is_repaired = await repairer.repair(peer.node)
        assert await LmdbBlobService(store).has(peer.digest) == is_repaired
        return is_repaired
    finally:
        store.close()


async def cat(services: Services, peer: Peer) -> bool:
    try:
        received = b"".join([piece async for piece in file_content(peer.node, services.blobs)])
    except (CorruptBlobError, NarError):
        return False
    assert received == peer.content
    return True


async def nar(services: Services, peer: Peer) -> bool:
    try:
        async for _piece in render_nar(peer.node, services.blobs, services.directories):
            pass
    except (CorruptBlobError, NarError):
        return False
    return True


async def verify(services: Services, peer: Peer) -> bool:
    found: list[VerifyError] = []
    verifier = Verifier(services, found.append)
    await verifier.verify(peer.path)
    return verifier.damaged == {} and not any("blob" in str(error) for error in found)


async def relay(services: Services, peer: Peer) -> bool:
    """Read it through a daemon of which the blobs are the peer's."""
    server = Server(services, verifies_blobs=True)
    path = peer.directory / "relay.sock"
    server.listen(f"unix:{path}")
    await server.start()
    try:
        async with opened(f"grpc+unix:{path}") as client:
            return await read_blob(client.blobs, peer.digest) == peer.content
    except StoreError as exc:
        return "DATA_LOSS" not in str(exc)
    finally:
        await server.stop(0)


PATHS: list[Take] = [fetch, repair, cat, nar, verify, relay]


@asynccontextmanager
async def opened(uri: str) -> AsyncIterator[Services]:
    address = parse_service_uri(uri)
    async with open_services(ServiceAddresses(address, address, address)) as services:
        yield services


def run(peer: Peer, take: Take) -> bool:
    async def main() -> bool:
        async with asyncio.timeout(DEADLINE_S), opened(peer.scripted.uri) as services:
            return await take(services, peer)

    return asyncio.run(main())


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServices]:
    with ScriptedServices(tmp_path_factory.mktemp("services")) as services:
        yield services


@pytest.fixture
def num_hashed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the bytes that modules of the product hash from now on, but for names of chunks."""
    num_bytes = 0

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self._hasher = blake3()
            self.update(data)

        def update(self, data: bytes) -> None:
            nonlocal num_bytes
            num_bytes += len(data)
            self._hasher.update(data)

        def digest(self) -> bytes:
            return self._hasher.digest()

    for name, module in [*sys.modules.items()]:
        is_ours = name.startswith("appliance.") and name != chunking.__name__
        if is_ours and getattr(module, "blake3", None) is blake3:
            monkeypatch.setattr(module, "blake3", Counting)
    return lambda: num_bytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("take", PATHS)
def test_each_byte_of_a_peer_is_hashed_once(
    scripted: ScriptedServices,
    tmp_path: Path,
    num_hashed: Callable[[], int],
    take: Take,
    size: int,
) -> None:
    peer = Peer(scripted, tmp_path, os.urandom(size))
    before = num_hashed()
    assert run(peer, take)
    assert num_hashed() - before == size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("take", PATHS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:-1],
        lambda content: content + b"?",
        lambda _content: b"",
    ],
    ids=["last byte", "first byte", "shorter", "longer", "empty"],
)
def test_corrupt_bytes_of_a_peer_are_refused(
    scripted: ScriptedServices,
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    take: Take,
    size: int,
) -> None:
    peer = Peer(scripted, tmp_path, os.urandom(size))
    peer.send(damage(peer.content))
    assert not run(peer, take)
