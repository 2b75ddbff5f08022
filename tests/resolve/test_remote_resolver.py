"""Wants that services answer, over services in the memory of this process."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from appliance.castore.digest import EMPTY_DIGEST
from appliance.castore.directory import DirectoryNode
from appliance.resolve.remote import ContentLoader, RemoteResolver
from appliance.resolve.remote_opening import open_remote
from appliance.resolve.resolver import SessionGrants
from appliance.services.addresses import MemoryAddress, ServiceAddresses, parse_service_uri
from appliance.services.contracts import Services
from appliance.services.memory_services import (
    MemoryBlobService,
    MemoryDirectoryService,
    MemoryPathInfoService,
)
from appliance.services.open_services import open_services
from appliance.session.grant_table import GrantTable
from appliance.session.wants import (
    BackingWanted,
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
    Want,
)
from appliance.store.store import Store
from tests.contracts.rig import fresh_leaf, parent_of, put_closure
from tests.fs.guest import basename

ADDRESSES = ServiceAddresses(MemoryAddress(), MemoryAddress(), MemoryAddress())
CACHE_BYTES = 1 << 20


@asynccontextmanager
async def opened(state_dir: Path) -> AsyncIterator[tuple[RemoteResolver, SessionGrants]]:
    table = GrantTable()
    try:
        async with open_remote(ADDRESSES, state_dir, CACHE_BYTES) as resolver:
            yield resolver, SessionGrants(table)
    finally:
        table.close()


def test_every_want_is_answered_with_an_errno(tmp_path: Path) -> None:
    answers: dict[Want, int] = {
        DirectoryWanted(EMPTY_DIGEST): 0,
        DirectoryWanted(bytes(32)): errno.EIO,
        DirectoryWanted(bytes(31)): errno.EIO,
        BlobWanted(EMPTY_DIGEST, 0): 0,
        BlobWanted(bytes(32), 5): errno.EIO,
        BlobWanted(bytes(31), 5): errno.EIO,
        BlobWanted(bytes(32), CACHE_BYTES + 1): errno.EIO,
        RootNameWanted(basename("absent")): errno.ENOENT,
        RootNameWanted(b"no store path"): errno.ENOENT,
        RootListWanted(): 0,
        BackingWanted(2, 1, bytes(32), 5): errno.EINVAL,
    }

    async def main() -> None:
        async with asyncio.timeout(30), opened(tmp_path) as (resolver, session):
            for want, answer in answers.items():
                assert await resolver.resolve(want, session) == answer, want

    asyncio.run(main())


class CountedPathInfos(MemoryPathInfoService):
    def __init__(self) -> None:
        super().__init__(MemoryBlobService(), MemoryDirectoryService())
        self.num_asked = 0

    async def get(self, path_digest: bytes) -> bytes | None:
        self.num_asked += 1
        await asyncio.sleep(0.05)
        return await super().get(path_digest)


def test_equal_names_wanted_at_once_are_one_request(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    path_infos = CountedPathInfos()
    services = Services(MemoryBlobService(), MemoryDirectoryService(), path_infos)

    async def main() -> None:
        loader = ContentLoader(services, store, None, None, ADDRESSES)
        names = [basename("one"), basename("other")] * 5
        finding = [loader.find_path(name) for name in names]
        found = await asyncio.gather(*finding, return_exceptions=True)
        errnos = {error.errno for error in found if isinstance(error, OSError)}
        assert (len(found), errnos) == (10, {errno.ENOENT})
        await loader.close()

    asyncio.run(main())
    store.close()
    assert path_infos.num_asked == 2


def test_directory_inside_a_closure_is_found_after_everything_else_is_forgotten(
    tmp_path: Path,
) -> None:
    address = parse_service_uri(f"objectstore+file://{tmp_path}/objects")
    services = ServiceAddresses(address, address, address)
    leaf = fresh_leaf()
    middle = parent_of(leaf)
    top, other = parent_of(middle), parent_of(fresh_leaf())

    async def main() -> None:
        async with open_services(services) as opened_services:
            await put_closure(opened_services.directories, leaf, middle, top)
        table = GrantTable()
        session = SessionGrants(table)
        # As another supervisor has granted it.
        for name, directory in ((b"top", top), (b"other", other)):
            table.grant(DirectoryNode(name, directory.digest(), directory.size()))
        async with asyncio.timeout(30), open_remote(services, tmp_path, CACHE_BYTES) as resolver:
            wants = [DirectoryWanted(one.digest()) for one in (leaf, middle)]
            answers = await asyncio.gather(*(resolver.resolve(one, session) for one in wants))
            assert answers == [0, 0]
            with resolver.store.snapshot() as snapshot:
                assert snapshot.image(leaf.digest()) is not None
            wanted = DirectoryWanted(fresh_leaf().digest())
            assert await resolver.resolve(wanted, session) == errno.EIO
        table.close()

    asyncio.run(main())
