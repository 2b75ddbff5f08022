"""Contents that are checked while a NAR is made of them, and how far a verification is."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

from blake3 import blake3

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.names import display
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import (
    ProtocolError,
    ServiceUnavailableError,
    StoreError,
    WrongDigestError,
)
from appliance.nix.store_path import STORE_DIR
from appliance.services.contracts import Services
from appliance.services.nar_render import PIECE_SIZE, RecentDirectories
from appliance.services.verify_errors import (
    VerifyError,
    content_mismatch,
    size_mismatch,
    unreadable,
)

if TYPE_CHECKING:
    from appliance.nix.hashes import ContentHash

Report = Callable[[VerifyError], None]


class VerifyProgress:
    """The numbers of files and bytes read so far, and the path of the file read last."""

    def __init__(self) -> None:
        self.num_files = 0
        self.num_bytes = 0
        self.path = ""
        self.num_paths = 0
        self.num_expected_paths = 0
        """The number of all paths to verify, if it is known; 0 otherwise."""

    def fraction(self) -> float | None:
        """Return how much is done, 0 to 1, by paths; None if that is not known."""
        if not self.num_expected_paths:
            return None
        return min(self.num_paths / self.num_expected_paths, 1.0)


class CheckedContents:
    """Contents for `render` that are checked while a NAR is made of them.

    Errors are reported, not raised; `are_complete` is False from then on. In place of a directory
    that is missing or wrong, an empty one is given; a blob that is missing or wrong may end early
    or have wrong bytes. A wrong size of a directory is reported too, but the contents count as
    complete. `hash`, if set, is fed with the content of files.
    """

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
        self._reported: set[tuple[str, Digest, int]] = set()

    async def check_once(self, root: Node) -> None:
        """Check `root` and everything below it, each directory and blob once."""
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
        """Return what is in a directory; see `nar_render.Contents`."""
        directory = Directory()
        with self._checking(node) as where:
            found = await self._directories.get(node.digest)
            actual = None if found is None else found.digest()
            if found is None or actual != node.digest:
                raise content_mismatch(where, node, actual or "nothing")
            directory = found
            self._check_size(node, directory, where)
        return self._entered(node, directory)

    async def content(self, node: FileNode) -> AsyncGenerator[bytes, None]:
        """Yield the content of a file; see `nar_render.Contents`."""
        hasher = blake3()
        size = 0
        with self._checking(node) as where:
            self._progress.path = where
            reader = await self._blobs.open_read(node.digest)
            if reader is None:
                raise content_mismatch(where, node, "nothing")
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
                raise content_mismatch(where, node, actual)
            if size != node.size:
                raise size_mismatch(where, node, size)
            self._progress.num_files += 1

    def _entered(self, node: DirectoryNode, directory: Directory) -> Iterator[Node]:
        # The generator ends once `render` has dealt with everything in the directory.
        self._open_directories.append(node.name)
        yield from directory.nodes()
        self._open_directories.pop()

    def _check_size(self, node: DirectoryNode, directory: Directory, where: str) -> None:
        # All directories of one tree count in the same way.
        sizes = {dialect: directory.size(dialect) for dialect in self._dialects}
        fitting = {dialect for dialect, size in sizes.items() if size == node.size}
        if fitting:
            self._dialects = fitting
            return
        actual = " or ".join(map(str, sorted({*sizes.values()})))
        self._report_once(size_mismatch(where, node, actual), node)

    @contextmanager
    def _checking(self, node: DirectoryNode | FileNode) -> Iterator[str]:
        """Report an error of the body instead of raising it; yield the place for its text.

        Execution goes on after the body. Only a service that cannot be reached ends the
        verification.
        """
        where = f"{STORE_DIR}/{display(b'/'.join((*self._open_directories, node.name)))}"
        error: VerifyError
        try:
            yield where
        except ServiceUnavailableError:
            raise
        except VerifyError as exc:
            error = exc
        except WrongDigestError as exc:
            error = content_mismatch(where, node, exc.actual)
        except (StoreError, ProtocolError) as exc:
            error = unreadable(where, exc)
        else:
            return
        self.are_complete = False
        if error.rule != "size-mismatch":
            self._damaged[node.digest] = node
        self._report_once(error, node)

    def _report_once(self, error: VerifyError, node: DirectoryNode | FileNode) -> None:
        known = (error.rule, node.digest, node.size)
        if known not in self._reported:
            self._reported.add(known)
            self._report(error)
