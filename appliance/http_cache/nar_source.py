"""NARs for responses: straight from a local store where there is one, else from services."""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Final, Protocol

from zstandard import COMPRESSOBJ_FLUSH_BLOCK, ZstdCompressor

from appliance.castore.directory import Node
from appliance.errors import ContentMissingError
from appliance.http_cache.http_exchange import in_thread
from appliance.services.contracts import Services
from appliance.services.local_nar import LocalNar, Piece
from appliance.services.nar_extent import extent_of
from appliance.services.nar_plan import KeptPlans, NarPlan
from appliance.services.nar_render import render_nar
from appliance.services.nar_sender import NarSender
from appliance.store.writer import AsyncStore

# Threads that render and send NARs: more than there are processors, since each may wait for a disk
# or, for short, for a client.
_NUM_THREADS: Final = 8
# Entries of Directories that one response keeps decoded: 100 KiB of memory.
_KEPT_ENTRIES: Final = 1 << 9
# What is gathered before the event loop is given something to send: bytes, and how long at most.
_GATHERED_SIZE: Final = 1 << 18
_GATHERED_S: Final = 0.1
# In bytes; after this many, zstd returns what it has.
_FLUSHED_SIZE: Final = 16 << 20


class OpenNar(Protocol):
    """A NAR of `size` bytes."""

    size: int

    def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` to `end`.

        Raises:
            StoreError, NarError: content is missing or wrong. The caller must not let what was
                yielded until then pass for the NAR.
        """

    def compressed(self, level: int) -> AsyncGenerator[bytes, None]:
        """Yield all of it compressed with zstd; raises what `pieces` raises."""

    async def sender(self, start: int, end: int) -> NarSender | None:
        """Return what sends the bytes from `start` to `end` by itself, if there is such a way.

        Raises:
            StoreError: a Directory is missing, or its content is wrong.
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
        self._plans = KeptPlans()
        self.executor = ThreadPoolExecutor(_NUM_THREADS, "nar")
        """The threads that render NARs; they may send them, too."""

    async def open(self, node: Node) -> OpenNar:
        """Return the NAR of `node`.

        Raises:
            ContentMissingError: a Directory is not there.
            NarTooLargeError: the tree has too many entries, or its NAR too many bytes.
        """
        if self._local is not None:
            stored = _StoredNar(self._local, node, self._plans, self.executor)
            await stored.measure()
            return stored
        extent = await extent_of(node, self._services.directories)
        if extent is None:
            raise ContentMissingError("a directory of this NAR is not in the store")
        extent.check("the tree")
        return _ServedNar(self._services, node, extent.nar_size)

    def close(self) -> None:
        """End the threads; no NAR may be in use."""
        self.executor.shutdown()


class _StoredNar:
    def __init__(
        self, local: AsyncStore, node: Node, plans: KeptPlans, executor: ThreadPoolExecutor
    ) -> None:
        self._local = local
        self._nar = LocalNar(local.store, node, kept_entries=_KEPT_ENTRIES)
        self._node = node
        self._plans = plans
        self._plan: NarPlan | None = plans.get(node)
        self._executor = executor
        self.size = 0 if self._plan is None else self._plan.nar_size

    async def measure(self) -> None:
        """Set `size`."""
        if self._plan is None:
            self.size = (await in_thread(self._nar.measure, self._executor)).extent.nar_size

    async def sender(self, start: int, end: int) -> NarSender | None:
        if not self._local.store.env.is_locked:
            return None  # What was read is not certain before it has been copied.
        if self._plan is None:
            self._plan = await in_thread(self._nar.plan, self._executor)
            if self._plan is None:
                return None
            self._plans.keep(self._node, self._plan)
        return NarSender(self._local.store, self._plan, start, end)

    async def pieces(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        pieces = self._nar.pieces(start, end)
        try:
            while data := await in_thread(lambda: _gathered(pieces), self._executor):
                yield data
        finally:
            pieces.close()

    async def compressed(self, level: int) -> AsyncGenerator[bytes, None]:
        pieces = self._nar.pieces()
        compressed = _compress(pieces, level)
        try:
            while data := await in_thread(lambda: _gathered(compressed), self._executor):
                yield data
        finally:
            compressed.close()
            pieces.close()


class _ServedNar:
    def __init__(self, services: Services, node: Node, size: int) -> None:
        self._services = services
        self._node = node
        self.size = size

    async def sender(self, start: int, end: int) -> NarSender | None:
        del start, end
        return None

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

    async def compressed(self, level: int) -> AsyncGenerator[bytes, None]:
        loop = asyncio.get_running_loop()
        compressor = _compressor(level).compressobj()
        async with aclosing(self.pieces(0, self.size)) as pieces:
            async for piece in pieces:
                if data := await loop.run_in_executor(None, compressor.compress, piece):
                    yield data
        yield compressor.flush()


def _compressor(level: int) -> ZstdCompressor:
    return ZstdCompressor(level=level, write_content_size=False)


def _compress(pieces: Generator[Piece, None, None], level: int) -> Generator[Piece, None, None]:
    compressor = _compressor(level).compressobj()
    size = 0
    for piece in pieces:
        data = compressor.compress(piece)
        size += len(piece)
        if size >= _FLUSHED_SIZE:
            size = 0
            data += compressor.flush(COMPRESSOBJ_FLUSH_BLOCK)
        if data:
            yield data
    yield compressor.flush()


def _gathered(pieces: Generator[Piece, None, None]) -> bytes:
    # Copied: a transport may keep what it is given, and pieces are views of a buffer.
    gathered = []
    size = 0
    deadline_s = time.monotonic() + _GATHERED_S
    for piece in pieces:
        gathered.append(bytes(piece))
        size += len(piece)
        if size >= _GATHERED_SIZE or time.monotonic() >= deadline_s:
            break
    return gathered[0] if len(gathered) == 1 else b"".join(gathered)
