"""Whether store paths are what is said of them: contents, NAR, content address, the path itself."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Final

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.names import display
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import (
    CorruptBlobError,
    PathInfoError,
    ProtocolError,
    ServiceUnavailableError,
    StoreError,
    WrongDigestError,
)
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import ContentHash, NixHash
from appliance.nix.path_info import PathInfo, read_path_info
from appliance.nix.path_info_rules import path_of_address
from appliance.nix.store_path import STORE_DIR, InvalidReferenceError, StorePath, encode_base32
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import Services
from appliance.services.nar_extent import NarTooLargeError, extent_of
from appliance.services.nar_render import PIECE_SIZE, RecentDirectories, render


class VerifyError(StoreError):
    """Something stored is not what is said of it; the text is one line, with the place."""


class InvalidPathError(VerifyError):
    """A path is not in the store."""


class MissingReferenceError(VerifyError):
    """A path refers to one that is not in the store."""

    def __init__(self, path: StorePath, reference: str) -> None:
        super().__init__(f"{path.absolute()}: refers to {STORE_DIR}/{reference}, which is missing")


class UnreadableError(VerifyError):
    """The store cannot give what it has."""

    def __init__(self, where: str, cause: Exception) -> None:
        super().__init__(f"{where}: {' '.join(str(cause).split())}")


class UnworkableError(VerifyError):
    """There is too much in a path for a NAR of it to be made."""

    def __init__(self, path: StorePath, cause: NarTooLargeError) -> None:
        super().__init__(f"{path.absolute()}: {cause}")


class MismatchError(VerifyError):
    """Two values differ that should not."""

    def __init__(self, where: str, what: str, expected: object, actual: object) -> None:
        super().__init__(f"{where}: {what}: expected {expected}, got {actual}")


class ContentMismatchError(MismatchError):
    """A blob or directory is not there, or has another digest."""


class SizeMismatchError(MismatchError):
    """A blob or directory is not of the size that its node says."""


class NarHashMismatchError(MismatchError):
    """The NAR has another SHA-256 than the one on record."""


class NarSizeMismatchError(MismatchError):
    """The NAR has another size than the one on record."""


class ContentAddressMismatchError(MismatchError):
    """The content has another content address than the one on record, or can have none such."""


class StorePathMismatchError(MismatchError):
    """Another store path follows from the content address, or none."""


Report = Callable[[VerifyError], None]

_NOTHING: Final = "nothing"


class VerifyProgress:
    """What was read so far, and of which file last."""

    def __init__(self) -> None:
        self.num_files = 0
        self.num_bytes = 0
        self.path = ""


class Verifier:
    """Verifies one path after another, reports what is wrong and goes on.

    The same object is reported once in a path. Of a path whose content cannot be had as it should
    be there is no NAR to compare: only what is wrong with the content is reported.
    """

    def __init__(self, services: Services, report: Report) -> None:
        self.num_paths = 0
        self.num_failed = 0
        self.progress = VerifyProgress()
        # Of those there are; each has at least one error reported.
        self.failed: list[StorePath] = []
        # Of which the content is not there, or not what its digest says.
        self.damaged: dict[Digest, DirectoryNode | FileNode] = {}
        self._services = services
        self._report_error = report
        self._num_errors = 0

    async def verify_all(self) -> None:
        """Verify every path there is.

        Raises:
            ServiceUnavailableError: a service is not there.
        """
        for path in await self._all_paths():
            await self.verify(path)

    async def verify_closure(self, paths: Sequence[StorePath]) -> None:
        """Verify `paths`, or all if it is empty, and all that they refer to.

        Raises:
            ServiceUnavailableError: a service is not there.
        """
        left = list(reversed(paths or await self._all_paths()))
        seen = {path.digest for path in left}
        while left:
            path = left.pop()
            await self.verify(path)
            for reference in reversed(await self._references(path)):
                if reference.digest not in seen:
                    seen.add(reference.digest)
                    left.append(reference)

    async def verify(self, path: StorePath) -> None:
        """Verify one path.

        Raises:
            ServiceUnavailableError: a service is not there.
        """
        await self._verify(path, None)

    async def verify_path_info(self, encoded: bytes) -> None:
        """Verify what a valid PathInfo says, which need not be in the store.

        Raises:
            ServiceUnavailableError: a service is not there.
        """
        await self._verify(read_path_info(encoded).path, encoded)

    async def _all_paths(self) -> list[StorePath]:
        paths: set[StorePath] = set()
        try:
            async for encoded in self._services.path_infos.list():
                try:
                    paths.add(read_path_info(encoded).path)
                except PathInfoError as exc:
                    self._fail(UnreadableError("a PathInfo", exc))
        except ServiceUnavailableError:
            raise
        except (StoreError, ProtocolError) as exc:
            self._fail(UnreadableError("the list of paths", exc))
        return sorted(paths, key=StorePath.basename)

    async def _references(self, path: StorePath) -> list[StorePath]:
        """Return those that are there, and report the others; none of a path that is not."""
        found: list[StorePath] = []
        missing: list[str] = []
        with suppress(CorruptBlobError, ProtocolError):  # as reported already
            encoded = await self._services.path_infos.get(path.digest)
            if encoded is None:
                return []
            message = pathinfo_pb2.PathInfo.FromString(encoded)
            names = dict(zip(message.references, message.narinfo.reference_names, strict=False))
            for digest in read_path_info(encoded).references:
                reference = await self._services.path_infos.get(digest)
                if reference is None:
                    missing.append(names.get(digest) or encode_base32(digest))
                else:
                    found.append(read_path_info(reference).path)
        if missing and path not in self.failed:
            self.num_failed += 1
            self.failed.append(path)
        for name in missing:
            self._report(MissingReferenceError(path, name))
        return found

    async def _verify(self, path: StorePath, stated: bytes | None) -> None:
        self.num_paths += 1
        num_errors = self._num_errors
        try:
            encoded = stated or await self._services.path_infos.get(path.digest)
            if encoded is None or read_path_info(encoded).path != path:
                raise InvalidPathError(f"path {path.absolute()} is not valid")
            await self._verify_contents(encoded)
        except ServiceUnavailableError:
            raise
        except VerifyError as exc:
            self._report(exc)
        except (StoreError, ProtocolError) as exc:
            self._report(UnreadableError(path.absolute(), exc))
        if self._num_errors > num_errors:
            self.num_failed += 1
            self.failed.append(path)

    async def _verify_contents(self, encoded: bytes) -> None:
        info = read_path_info(encoded)
        narinfo = pathinfo_pb2.PathInfo.FromString(encoded).narinfo
        address = ContentAddress.of_message(narinfo)
        address_hash = self._check_path(info, narinfo, address) if address else None
        contents = _CheckedContents(self._services, self._report, self.progress, self.damaged)
        if not await self._is_workable(info, contents):
            return
        if address and address.method is not Method.NAR:
            contents.hash = address_hash
        nar_hash = hashlib.sha256()
        size = 0
        loop = asyncio.get_running_loop()
        async with aclosing(render(info.node, contents)) as pieces:
            async for piece in pieces:
                size += len(piece)
                await loop.run_in_executor(None, nar_hash.update, piece)
                if address_hash and contents.hash is None:
                    await loop.run_in_executor(None, address_hash.update, piece)
        if contents.are_complete:
            self._check_nar(info, size, nar_hash.digest())
            if address and address_hash:
                self._check_address(info, address, address_hash.digests())

    async def _is_workable(self, info: PathInfo, contents: "_CheckedContents") -> bool:
        """Whether a NAR can be made; else what is in the path is checked without one."""
        extent = await extent_of(info.node, self._services.directories)
        if extent is None:
            return True
        try:
            extent.check("the tree")
        except NarTooLargeError as exc:
            self._report(UnworkableError(info.path, exc))
            await contents.check_once(info.node)
            return False
        return True

    def _check_path(
        self, info: PathInfo, narinfo: pathinfo_pb2.NARInfo, address: ContentAddress
    ) -> ContentHash:
        """Check the path against its content address, and return the hash to check that with."""
        where = info.path.absolute()
        refers_to_itself = info.path.basename() in narinfo.reference_names
        try:
            expected = path_of_address(info.path, narinfo, address).absolute()
        except InvalidReferenceError as exc:
            expected = f"none ({exc})"
        if expected != where:
            self._report(StorePathMismatchError(where, f"path of {address}", expected, where))
        return ContentHash(address.hash.algorithm, info.path if refers_to_itself else None)

    def _check_nar(self, info: PathInfo, size: int, sha256: bytes) -> None:
        where = info.path.absolute()
        if info.nar_sha256 and sha256 != info.nar_sha256:
            stated, actual = NixHash("sha256", info.nar_sha256), NixHash("sha256", sha256)
            self._report(NarHashMismatchError(where, "hash of the NAR", stated, actual))
        if (info.nar_sha256 or info.nar_size) and size != info.nar_size:
            self._report(NarSizeMismatchError(where, "size of the NAR", info.nar_size, size))

    def _check_address(
        self, info: PathInfo, address: ContentAddress, digests: Sequence[bytes]
    ) -> None:
        actual: object = address
        if address.method is not Method.NAR and not _is_plain_file(info.node):
            actual = "something else than a file that is not executable"
        elif address.hash.digest not in digests:
            actual = address._replace(hash=address.hash._replace(digest=digests[0]))
        if actual != address:
            where = info.path.absolute()
            self._report(ContentAddressMismatchError(where, "content address", address, actual))

    def _fail(self, error: VerifyError) -> None:
        self.num_failed += 1
        self._report(error)

    def _report(self, error: VerifyError) -> None:
        self._num_errors += 1
        self._report_error(error)


class _CheckedContents:
    """Contents that are checked as a NAR is made of them; in place of wrong ones there is less."""

    def __init__(
        self,
        services: Services,
        report: Report,
        progress: VerifyProgress,
        damaged: dict[Digest, DirectoryNode | FileNode],
    ) -> None:
        self.are_complete = True
        self.hash: ContentHash | None = None
        self._blobs = services.blobs
        self._directories = RecentDirectories(services.directories)
        self._report = report
        self._progress = progress
        self._damaged = damaged
        self._dialects = {*SizeDialect}
        self._open_directories: list[bytes] = []
        self._reported: set[tuple[type[VerifyError], Digest, int]] = set()

    async def check_once(self, root: Node) -> None:
        """Check what is below `root`, each directory and blob once."""
        left = [root]
        seen: set[tuple[Digest, int]] = set()
        while left:
            node = left.pop()
            if isinstance(node, SymlinkNode) or (node.digest, node.size) in seen:
                continue
            seen.add((node.digest, node.size))
            if isinstance(node, DirectoryNode):
                left.extend(await self.children(node))
            else:
                async with aclosing(self.content(node)) as pieces:
                    async for _piece in pieces:
                        pass

    async def children(self, node: DirectoryNode) -> Iterator[Node]:
        directory = Directory()
        with self._checking(node) as where:
            found = await self._directories.get(node.digest)
            actual = None if found is None else found.digest()
            if found is None or actual != node.digest:
                raise ContentMismatchError(where, "directory", node.digest, actual or _NOTHING)
            directory = found
            self._check_size(node, directory, where)
        return self._entered(node, directory)

    async def content(self, node: FileNode) -> AsyncGenerator[bytes, None]:
        hasher = blake3()
        size = 0
        with self._checking(node) as where:
            self._progress.path = where
            reader = await self._blobs.open_read(node.digest)
            if reader is None:
                raise ContentMismatchError(where, "blob", node.digest, _NOTHING)
            try:
                while data := await reader.read(PIECE_SIZE):
                    hasher.update(data)
                    size += len(data)
                    self._progress.num_bytes += len(data)
                    if size <= node.size:
                        if self.hash is not None:
                            self.hash.update(data)
                        yield data
            finally:
                await reader.close()
            actual = Digest(hasher.digest())
            if actual != node.digest:
                raise ContentMismatchError(where, "blob", node.digest, actual)
            if size != node.size:
                raise SizeMismatchError(where, f"size of the blob {actual}", node.size, size)
            self._progress.num_files += 1

    def _entered(self, node: DirectoryNode, directory: Directory) -> Iterator[Node]:
        # It is used up when the last thing in the directory was dealt with.
        self._open_directories.append(node.name)
        yield from directory.nodes()
        self._open_directories.pop()

    def _check_size(self, node: DirectoryNode, directory: Directory, where: str) -> None:
        # One tree counts in one way.
        sizes = {dialect: directory.size(dialect) for dialect in self._dialects}
        fitting = {dialect for dialect, size in sizes.items() if size == node.size}
        if fitting:
            self._dialects = fitting
            return
        actual = " or ".join(map(str, sorted({*sizes.values()})))
        what = f"size of the directory {node.digest}"
        self._report_once(SizeMismatchError(where, what, node.size, actual), node)

    @contextmanager
    def _checking(self, node: DirectoryNode | FileNode) -> Iterator[str]:
        where = f"{STORE_DIR}/{display(b'/'.join((*self._open_directories, node.name)))}"
        kind = "blob" if isinstance(node, FileNode) else "directory"
        error: VerifyError
        try:
            yield where
        except ServiceUnavailableError:
            raise
        except VerifyError as exc:
            error = exc
        except WrongDigestError as exc:
            error = ContentMismatchError(where, kind, exc.expected, exc.actual)
        except (StoreError, ProtocolError) as exc:
            error = UnreadableError(where, exc)
        else:
            return
        self.are_complete = False
        if not isinstance(error, SizeMismatchError):
            self._damaged[node.digest] = node
        self._report_once(error, node)

    def _report_once(self, error: VerifyError, node: DirectoryNode | FileNode) -> None:
        known = (type(error), node.digest, node.size)
        if known not in self._reported:
            self._reported.add(known)
            self._report(error)


def _is_plain_file(node: Node) -> bool:
    return isinstance(node, FileNode) and not node.executable
