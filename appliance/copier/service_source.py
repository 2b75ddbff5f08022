"""Store paths from other services: another store of this machine, or a daemon."""

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

from appliance.castore.directory import Node
from appliance.copier.claims import claim_of_message
from appliance.copier.services_target import open_in_thread
from appliance.errors import ContentMissingError
from appliance.nix.nar import Event, read_nar
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.addresses import ServiceAddresses
from appliance.services.contracts import Services
from appliance.services.nar_render import render_nar
from appliance.services.open_services import LoopThread
from appliance.store.writer import AsyncStore

T = TypeVar("T")

_NUM_READERS: Final = 8


class ServiceClosures:
    """Services as a source; they are open on the loop of `thread`."""

    num_readers = _NUM_READERS
    needs_signatures = False

    def __init__(self, thread: LoopThread, services: Services) -> None:
        self._thread = thread
        self._services = services

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """See `CopySource.claim`."""
        encoded = self._thread.run_and_wait(self._services.path_infos.get(path.digest))
        if encoded is None or read_path_info(encoded).path != path:
            return None
        return claim_of_message(path, pathinfo_pb2.PathInfo.FromString(encoded))

    def events(self, claim: NarInfoFile) -> Generator[Event, None, None]:
        """See `CopySource.events`."""
        encoded = self._thread.run_and_wait(self._services.path_infos.get(claim.path.digest))
        if encoded is None:
            raise ContentMissingError(f"path {claim.path.absolute()}: was removed from the source")
        yield from self.events_of(read_path_info(encoded).node)

    def run(self, work: Callable[[Services], Coroutine[None, None, T]]) -> T:
        """Run `work` with the services, on their loop, and return its result."""
        return self._thread.run_and_wait(work(self._services))

    def events_of(self, node: Node) -> Generator[Event, None, None]:
        """Yield the tree of a node; see `CopySource.events`."""
        pieces = render_nar(node, self._services.blobs, self._services.directories)
        source = _Pieces(self._thread, pieces)
        try:
            yield from read_nar(source.read)
        finally:
            source.close()


@contextmanager
def open_service_source(
    addresses: ServiceAddresses, stores: dict[Path, AsyncStore]
) -> Iterator[ServiceClosures]:
    """Open services for reading, on a loop in a thread of their own.

    Args:
        addresses: of the services.
        stores: stores that this process has open already, by their paths.

    Raises:
        StoreError: a local one cannot be opened.
    """
    with ExitStack() as stack:
        thread = LoopThread("source")
        stack.callback(thread.close)
        yield ServiceClosures(
            thread, open_in_thread(thread, addresses, stores, stack, is_readonly=True)
        )


class _Pieces:
    """Reads, from this thread, pieces that are made on the loop of another one."""

    def __init__(self, thread: LoopThread, pieces: AsyncGenerator[bytes, None]) -> None:
        self._thread = thread
        self._pieces = pieces
        self._left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return at most `size` of the next bytes, and none at the end only."""
        while not self._left:
            piece = self._thread.run_and_wait(self._next())
            if piece is None:
                return b""
            self._left = memoryview(piece)
        data, self._left = bytes(self._left[:size]), self._left[size:]
        return data

    def close(self) -> None:
        """Close the generator of the pieces."""
        self._thread.run_and_wait(self._close())

    async def _next(self) -> bytes | None:
        return await anext(self._pieces, None)

    async def _close(self) -> None:
        await self._pieces.aclose()
