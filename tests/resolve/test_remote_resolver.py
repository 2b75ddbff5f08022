"""Wants that services answer, over services in the memory of this process."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from appliance.castore.digest import EMPTY_DIGEST
from appliance.resolve.remote import RemoteResolver, open_remote
from appliance.resolve.resolver import SessionGrants
from appliance.services.addresses import MemoryAddress, ServiceAddresses
from appliance.session.grants import GrantTable
from appliance.session.wants import (
    BackingWanted,
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
    Want,
)
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
