"""Services at one address, and content that no other test has."""

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from appliance.castore.chunking import UNCHUNKED_MAX
from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import BlobService, DirectoryService, Services
from appliance.services.open_services import open_services

T = TypeVar("T")

_NUMBERS: Final = itertools.count()


class Rig:
    """The services at `uri`.

    Args:
        uri: their address.
        cuts_over: blobs of more bytes are cut into chunks, if they are long enough for two.
        is_slow: thousands of requests take too long.
    """

    def __init__(self, uri: str, *, cuts_over: int = UNCHUNKED_MAX, is_slow: bool = False) -> None:
        address = parse_service_uri(uri)
        self.uri = uri
        self.cuts_over = cuts_over
        self.is_slow = is_slow
        self.addresses = ServiceAddresses(address, address, address)

    def run(self, work: Callable[[Services], Awaitable[T]]) -> T:
        async def main() -> T:
            async with open_services(self.addresses) as services:
                return await work(services)

        return asyncio.run(main())


def fresh_bytes(size: int = 12) -> bytes:
    return next(_NUMBERS).to_bytes(4, "little") + os.urandom(size)


def fresh_leaf() -> Directory:
    name = fresh_bytes().hex().encode()
    return Directory(files=[FileNode(name, Digest(os.urandom(32)), 7, executable=False)])


def parent_of(*children: Directory, dialect: SizeDialect = DEFAULT_DIALECT) -> Directory:
    """Return a directory of directories named a, b and so on."""
    return Directory(
        DirectoryNode(bytes([ord("a") + index]), child.digest(), child.size(dialect))
        for index, child in enumerate(children)
    )


async def put_blob(blobs: BlobService, content: bytes) -> Digest:
    writer = await blobs.open_write()
    try:
        await writer.write(content)
        return await writer.close()
    finally:
        await writer.abort()


async def read_blob(blobs: BlobService, digest: Digest) -> bytes | None:
    reader = await blobs.open_read(digest)
    if reader is None:
        return None
    try:
        parts = []
        while data := await reader.read(1 << 20):
            parts.append(data)
        return b"".join(parts)
    finally:
        await reader.close()


async def put_closure(directories: DirectoryService, *members: Directory) -> Digest:
    putter = directories.put_multiple_start()
    try:
        for member in members:
            await putter.put(member)
        return await putter.close()
    finally:
        await putter.abort()


async def closure(directories: DirectoryService, root: Digest) -> list[Directory]:
    return [directory async for directory in directories.get_recursive(root)]
