"""Copies store paths from one store to another, as they are kept: blobs, Directories, PathInfos.

Nothing is unpacked or rendered, and no blob is read that the target has: the Directories of a path
say which blobs it needs, and the target says which of those it lacks. Contents come first, then the
Directories, and then the PathInfo, after those of the path's references; so a copy that ends early
leaves whole paths, and the next one goes on from there.

Each blob is compared with its digest on the way, and each Directory by the service that returns it.
What a PathInfo says of its NAR is the source's word, as far as the target does not know better.
"""

import asyncio
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from graphlib import TopologicalSorter
from typing import Final, TypeVar

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode
from appliance.copier.copier import CopyOutcome, CopyStatus, about, cyclic_paths, missing_reference
from appliance.copier.ingest import CopyProgress
from appliance.errors import (
    ApplianceError,
    ContentMissingError,
    ServiceUnavailableError,
    StoreFullError,
    WrongDigestError,
)
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.services.closures import references_of
from appliance.services.contracts import BlobReader, BlobWriter, Services
from appliance.services.many_blobs import (
    DIGESTS_MAX,
    CountsPresent,
    VerifyingWriter,
    WritesExpected,
    many_of,
    missing_of,
)
from appliance.services.retry import Patience, persevere
from appliance.store.schema import INLINE_MAX

T = TypeVar("T")

# Paths and blobs under way at a time, and questions.
_PATHS_AT_A_TIME: Final = 8
_BLOBS_AT_A_TIME: Final = 32
_LOOKUPS_AT_A_TIME: Final = 64
_PIECE_SIZE: Final = 1 << 20
# Small blobs that are put in one call, where the target takes that, have up to this many bytes.
_TOGETHER_BYTES: Final = 4 << 20
_WAIT_S: Final = 0.1


class StoreProgress(CopyProgress):
    """Totals of a copy between stores; `num_bytes` counts what is there already, too."""

    def __init__(self) -> None:
        super().__init__()
        self.num_files_skipped = 0
        self.num_bytes_skipped = 0


class StoreCopy:
    """One copy of closures; used on one event loop.

    Args:
        source: where to copy from.
        target: where to copy to.
        progress: counts files and bytes.
        hold: is told the paths that the target has or gets, before it is asked for them; in a store
            of this machine, that keeps garbage collection from them.
        when_waiting: see `copier.ClosureCopy`.
    """

    def __init__(
        self,
        source: Services,
        target: Services,
        *,
        progress: StoreProgress,
        hold: Callable[[StorePath], None],
        when_waiting: Callable[[int, int], None],
    ) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._hold = hold
        self._when_waiting = when_waiting
        self._paths = asyncio.Semaphore(_PATHS_AT_A_TIME)
        self._blobs = asyncio.Semaphore(_BLOBS_AT_A_TIME)
        self._lookups = asyncio.Semaphore(_LOOKUPS_AT_A_TIME)
        # Blobs that the target has, as far as this copy knows; and those that are being copied,
        # with a future that ends when that does.
        self._seen: set[Digest] = {EMPTY_DIGEST}
        self._under_way: dict[Digest, asyncio.Future[None]] = {}
        self._copies: dict[StorePath, asyncio.Task[CopyOutcome]] = {}
        self._refused: set[StorePath] = set()

    async def run(self, paths: Iterable[StorePath]) -> AsyncGenerator[CopyOutcome, None]:
        """Copy, and yield the result for each path; a copied path is durable by then.

        Raises:
            ApplianceError: a store fails in a way that affects all paths.
        """
        wanted: dict[StorePath, bytes] = {}
        async for outcome in self._look_up(paths, wanted):
            if outcome.status is CopyStatus.REFUSED:
                self._refused.add(outcome.path)
            yield outcome
        references = {path: _references(path, encoded) for path, encoded in wanted.items()}
        for path in cyclic_paths(references):
            self._refused.add(path)
            del wanted[path]
            reason = f"path {path.absolute()}: its references lead back to it"
            yield CopyOutcome(path, CopyStatus.REFUSED, reason=reason)
        self._progress.num_expected_bytes = sum(map(_nar_size, wanted.values()))
        try:
            graph = {path: [one for one in references[path] if one in wanted] for path in wanted}
            for path in TopologicalSorter(graph).static_order():
                work = self._copy(path, wanted[path], references[path])
                self._copies[path] = asyncio.create_task(work)
            for index, copy in enumerate(self._copies.values()):
                while not (await asyncio.wait([copy], timeout=_WAIT_S))[0]:
                    self._when_waiting(index, len(self._copies))
                self._when_waiting(index + 1, len(self._copies))
                yield copy.result()
        finally:
            for copy in self._copies.values():
                copy.cancel()
            await asyncio.gather(*self._copies.values(), return_exceptions=True)

    # --- Which paths ---

    async def _look_up(
        self, paths: Iterable[StorePath], wanted: dict[StorePath, bytes]
    ) -> AsyncIterator[CopyOutcome]:
        level = list(dict.fromkeys(paths))
        seen = set(level)
        while level:
            following: list[StorePath] = []
            for path, found in zip(
                level, await asyncio.gather(*map(self._look, level)), strict=True
            ):
                if isinstance(found, CopyOutcome):
                    yield found
                    continue
                encoded, is_present = found
                if is_present:
                    yield CopyOutcome(path, CopyStatus.PRESENT)
                else:
                    wanted[path] = encoded
                new = [one for one in _references(path, encoded) if one not in seen]
                seen.update(new)
                following += new
            level = following

    async def _look(self, path: StorePath) -> tuple[bytes, bool] | CopyOutcome:
        async with self._lookups:
            self._hold(path)
            encoded = await self._target.path_infos.get(path.digest)
            if encoded is not None and read_path_info(encoded).path == path:
                return encoded, True
            try:
                encoded = await self._source.path_infos.get(path.digest)
                if encoded is None or read_path_info(encoded).path != path:
                    return _refusal(path, f"path {path.absolute()} is not valid")
                if len(references_of(_message(encoded))) != len(_message(encoded).references):
                    return _refusal(
                        path, f"path {path.absolute()}: the store knows no names of references"
                    )
            except ServiceUnavailableError:
                raise
            except ApplianceError as exc:
                return _refusal(path, about(path, exc))
            return encoded, False

    # --- One path ---

    async def _copy(
        self, path: StorePath, encoded: bytes, references: Sequence[StorePath]
    ) -> CopyOutcome:
        before = self._progress.num_files
        try:
            async with self._paths:
                self._progress.path = path.absolute()
                await self._copy_content(encoded)
            for reference in references:
                copy = self._copies.get(reference)
                is_refused = reference in self._refused
                if copy is not None:
                    is_refused = (await asyncio.shield(copy)).status is CopyStatus.REFUSED
                if is_refused:
                    return _refusal(path, missing_reference(path, reference))
            await self._target.path_infos.put(encoded, needs_references=True)
        except (StoreFullError, ServiceUnavailableError):
            raise
        except ApplianceError as exc:
            return _refusal(path, about(path, exc))
        num_files = self._progress.num_files - before
        return CopyOutcome(path, CopyStatus.COPIED, _nar_size(encoded), num_files)

    async def _copy_content(self, encoded: bytes) -> None:
        node = read_path_info(encoded).node
        match node:
            case FileNode(_, digest, size):
                await self._copy_blobs({digest: size})
            case DirectoryNode(_, digest, _):
                received = [one async for one in self._source.directories.get_recursive(digest)]
                if not received:
                    raise ContentMissingError(f"directory {digest}: the source does not have it")
                await self._copy_blobs(
                    {file.digest: file.size for one in received for file in one.files}
                )
                await _repeated(lambda: self._put_closure(received))

    async def _put_closure(self, received: Sequence[Directory]) -> None:
        putter = self._target.directories.put_multiple_start()
        try:
            # They came parents first.
            for directory in reversed(received):
                await putter.put(directory)
        except BaseException:
            await putter.abort()
            raise
        await putter.close()

    # --- Blobs ---

    async def _copy_blobs(self, sizes: Mapping[Digest, int]) -> None:
        """Return when the target has all of these blobs, whichever path they were copied for."""
        left = [digest for digest in sizes if digest not in self._seen]
        self._skip([size for digest, size in sizes.items() if digest in self._seen])
        while left:
            ours = [digest for digest in left if digest not in self._under_way]
            others = {self._under_way[digest] for digest in left if digest in self._under_way}
            if ours:
                done = asyncio.get_running_loop().create_future()
                self._under_way.update(dict.fromkeys(ours, done))
                try:
                    await self._copy_missing(ours, sizes)
                    self._seen.update(ours)
                finally:
                    for digest in ours:
                        del self._under_way[digest]
                    done.set_result(None)
            if others:
                await asyncio.wait(others)
            # What another path has failed to copy is tried for this one.
            here = set(ours)
            self._skip(
                [sizes[digest] for digest in left if digest in self._seen and digest not in here]
            )
            left = [digest for digest in left if digest not in self._seen]

    async def _copy_missing(self, digests: Sequence[Digest], sizes: Mapping[Digest, int]) -> None:
        missing = await missing_of(self._target.blobs, digests)
        missing_set = set(missing)
        self._skip([sizes[digest] for digest in digests if digest not in missing_set])
        has_many = await many_of(self._target.blobs) is not None
        together = [digest for digest in missing if has_many and sizes[digest] <= INLINE_MAX]
        alone = [digest for digest in missing if not has_many or sizes[digest] > INLINE_MAX]
        try:
            async with asyncio.TaskGroup() as group:
                for part in _parts(together, sizes):
                    group.create_task(self._copy_together(part, sizes))
                for digest in alone:
                    group.create_task(self._copy_alone(digest, sizes[digest]))
        except ExceptionGroup as exc:
            raise exc.exceptions[0] from None

    def _skip(self, sizes: Sequence[int]) -> None:
        progress = self._progress
        progress.num_files += len(sizes)
        progress.num_files_skipped += len(sizes)
        progress.num_bytes += sum(sizes)
        progress.num_bytes_skipped += sum(sizes)

    async def _copy_together(self, digests: Sequence[Digest], sizes: Mapping[Digest, int]) -> None:
        contents = await asyncio.gather(*(self._read(digest, sizes[digest]) for digest in digests))
        many = await many_of(self._target.blobs)
        if many is not None:
            await many.put_many(contents)
        self._progress.num_files += len(contents)
        self._progress.num_bytes += sum(map(len, contents))

    async def _read(self, digest: Digest, size: int) -> bytes:
        async with self._blobs:
            reader = await self._open(digest)
            try:
                content = await reader.read(size + 1)
            finally:
                await reader.close()
        if (actual := Digest.of(content)) != digest:
            raise WrongDigestError("blob", digest, actual)
        return content

    async def _copy_alone(self, digest: Digest, size: int) -> None:
        async with self._blobs:
            await _repeated(lambda: self._send(digest, size))

    async def _send(self, digest: Digest, size: int) -> None:
        sent = _SentBytes(self._progress)
        reader = await self._open(digest)
        try:
            writer = await self._open_write(digest)
            try:
                while sent.num_bytes <= size and (piece := await reader.read(_PIECE_SIZE)):
                    await writer.write(piece)
                    sent.add(len(piece), writer)
            except BaseException:
                await writer.abort()
                raise
            await writer.close()
            sent.add(0, writer)
        except BaseException:
            sent.take_back()
            raise
        finally:
            await reader.close()
        self._progress.num_files += 1

    async def _open_write(self, digest: Digest) -> BlobWriter:
        # Nothing else than what was asked for may become visible.
        blobs = self._target.blobs
        if isinstance(blobs, WritesExpected):
            return await blobs.open_write_of(digest)
        return VerifyingWriter(await blobs.open_write(), digest)

    async def _open(self, digest: Digest) -> BlobReader:
        reader = await self._source.blobs.open_read(digest)
        if reader is None:
            raise ContentMissingError(f"blob {digest}: the source does not have it")
        return reader


class _SentBytes:
    """What one blob has added to the totals; after a failure, it may be sent once more."""

    def __init__(self, progress: StoreProgress) -> None:
        self.num_bytes = 0
        self._num_present = 0
        self._progress = progress

    def add(self, num_bytes: int, writer: BlobWriter) -> None:
        present = writer.num_bytes_present if isinstance(writer, CountsPresent) else 0
        self._add(num_bytes, present - self._num_present)

    def take_back(self) -> None:
        self._add(-self.num_bytes, -self._num_present)

    def _add(self, num_bytes: int, num_present: int) -> None:
        self.num_bytes += num_bytes
        self._num_present += num_present
        self._progress.num_bytes += num_bytes
        self._progress.num_bytes_skipped += num_present


def _parts(digests: Sequence[Digest], sizes: Mapping[Digest, int]) -> list[list[Digest]]:
    parts: list[list[Digest]] = []
    num_bytes = _TOGETHER_BYTES
    for digest in digests:
        if num_bytes >= _TOGETHER_BYTES or len(parts[-1]) >= DIGESTS_MAX:
            parts.append([])
            num_bytes = 0
        parts[-1].append(digest)
        num_bytes += sizes[digest]
    return parts


async def _repeated(work: Callable[[], Awaitable[T]]) -> T:
    # What is sent as a stream cannot be repeated by the client of the service, as it is not kept.
    return await persevere(work, Patience(starts_at_failure=True))


def _message(encoded: bytes) -> pathinfo_pb2.PathInfo:
    return pathinfo_pb2.PathInfo.FromString(encoded)


def _references(path: StorePath, encoded: bytes) -> list[StorePath]:
    return [one for one in references_of(_message(encoded)) if one != path]


def _nar_size(encoded: bytes) -> int:
    return _message(encoded).narinfo.nar_size


def _refusal(path: StorePath, reason: str) -> CopyOutcome:
    return CopyOutcome(path, CopyStatus.REFUSED, reason=reason)
