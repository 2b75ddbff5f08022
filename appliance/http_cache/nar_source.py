"""NARs for responses: straight from a local store where there is one, else from services."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from typing import Final, Protocol

from zstandard import ZstdCompressor

from appliance.castore.directory import Node
from appliance.errors import ContentMissingError
from appliance.services.contracts import Services
from appliance.services.local_nar import LocalNar, Piece
from appliance.services.nar_extent import extent_of
from appliance.services.nar_render import render_nar
from appliance.store.writer import AsyncStore

# Entries of Directories that one response keeps decoded: 100 KiB of memory.
_KEPT_ENTRIES: Final = 1 << 9
# In bytes; less is gathered before the event loop is given something to send.
_GATHERED_SIZE: Final = 1 << 18
# The size in bits of what zstd looks back on, for each response: 1 MiB.
_WINDOW_LOG: Final = 20


class OpenNar(Protocol):
    """A NAR of `size` bytes."""

    size: int

    def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` to `end`.

        Raises:
            StoreError, NarError: content is missing or wrong. The caller must not let what was
                yielded until then pass for the NAR.
        """


class NarSource:
    """Opens NARs.

    Args:
        services: have the contents.
        local: the store that all services are in, if there is one.
    """

    def __init__(self, services: Services, local: AsyncStore | None) -> None:
        self._services = services
        self._local = local

    async def open(self, node: Node) -> OpenNar:
        """Return the NAR of `node`.

        Raises:
            ContentMissingError: a Directory is not there.
            NarTooLargeError: the tree has too many entries, or its NAR too many bytes.
        """
        if self._local is not None:
            nar = LocalNar(self._local.store, node, kept_entries=_KEPT_ENTRIES)
            measured = await self._local.run(nar.measure)
            return _StoredNar(self._local, nar, measured.extent.nar_size)
        extent = await extent_of(node, self._services.directories)
        if extent is None:
            raise ContentMissingError("a directory of this NAR is not in the store")
        extent.check("the tree")
        return _ServedNar(self._services, node, extent.nar_size)


class _StoredNar:
    def __init__(self, local: AsyncStore, nar: LocalNar, size: int) -> None:
        self._local = local
        self._nar = nar
        self.size = size

    async def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        pieces = self._nar.pieces(start, end)
        try:
            while data := await self._local.run(lambda: _next_bytes(pieces)):
                yield data
        finally:
            pieces.close()


class _ServedNar:
    def __init__(self, services: Services, node: Node, size: int) -> None:
        self._services = services
        self._node = node
        self.size = size

    async def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        # Services read whole blobs, so that they can check them.
        offset = 0
        rendered = render_nar(self._node, self._services.blobs, self._services.directories)
        async with aclosing(rendered) as pieces:
            async for piece in pieces:
                wanted = piece[max(start - offset, 0) : max(end - offset, 0)]
                offset += len(piece)
                if wanted:
                    yield wanted
                if offset >= end and end < self.size:
                    return


async def compressed(
    pieces: AsyncGenerator[bytes, None], level: int
) -> AsyncGenerator[bytes, None]:
    """Yield `pieces` compressed with zstd, in a thread of the event loop's executor."""
    loop = asyncio.get_running_loop()
    compressor = ZstdCompressor(level=level, write_content_size=False).compressobj()
    async with aclosing(pieces):
        async for piece in pieces:
            if data := await loop.run_in_executor(None, compressor.compress, piece):
                yield data
    yield compressor.flush()


def _next_bytes(pieces: Generator[Piece, None, None]) -> bytes:
    # Copied: a transport may keep what it is given, and pieces are views of a buffer.
    gathered = []
    size = 0
    for piece in pieces:
        gathered.append(bytes(piece))
        size += len(piece)
        if size >= _GATHERED_SIZE:
            break
    return gathered[0] if len(gathered) == 1 else b"".join(gathered)
