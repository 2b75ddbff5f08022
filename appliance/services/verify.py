"""Verification of store paths: contents, NARs, content addresses, and the paths themselves."""

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

from appliance.castore.directory import DirectoryNode, FileNode, Node
from appliance.errors import (
    CorruptBlobError,
    PathInfoError,
    ProtocolError,
    ServiceUnavailableError,
    StoreError,
)
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import ContentHash, NixHash
from appliance.nix.narinfo import narinfo_of
from appliance.nix.path_info import PathInfo, read_path_info
from appliance.nix.path_info_rules import path_of_address
from appliance.nix.store_path import STORE_DIR, StorePath, StorePathError, encode_base32
from appliance.nix.trusted_keys import TrustedKeys
from appliance.protos import pathinfo_pb2
from appliance.services.checked_contents import CheckedContents, Report, VerifyProgress
from appliance.services.contracts import Services
from appliance.services.nar_extent import NarTooLargeError, extent_of
from appliance.services.nar_render import render
from appliance.services.verify_errors import VerifyError, mismatch, unreadable

if TYPE_CHECKING:
    from appliance.castore.digest import Digest


class Verifier:
    """Verifies one path after another, reports each error and goes on.

    Within one path, the same error of the same object is reported once. If content of a path is
    missing or wrong, there is no NAR to compare: only the errors of the content are reported.

    Args:
        services: have the paths and their contents.
        report: is called with each error.
        trusted_keys: one of them must have signed each path without a content address; None if
            signatures do not matter.
    """

    def __init__(
        self, services: Services, report: Report, trusted_keys: TrustedKeys | None = None
    ) -> None:
        self._trusted_keys = trusted_keys
        self.num_paths = 0
        self.num_failed = 0
        self.progress = VerifyProgress()
        # Paths with at least one reported error.
        self.failed: list[StorePath] = []
        # Nodes whose content is missing, unreadable, or has another digest.
        self.damaged: dict[Digest, DirectoryNode | FileNode] = {}
        self._services = services
        self._report_error = report
        self._num_errors = 0

    async def verify_all(self) -> None:
        """Verify every path of the services.

        Raises:
            ServiceUnavailableError: a service cannot be reached.
        """
        paths = await self._all_paths()
        self.progress.num_expected_paths = len(paths)
        for path in paths:
            await self.verify(path)
            self.progress.num_paths += 1

    async def verify_closure(self, paths: Sequence[StorePath]) -> None:
        """Verify `paths`, or all paths if that is empty, and all paths that they refer to.

        Raises:
            ServiceUnavailableError: a service cannot be reached.
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
            ServiceUnavailableError: a service cannot be reached.
        """
        await self._verify(path, None)

    async def verify_path_info(self, encoded: bytes) -> None:
        """Verify the claims of a valid PathInfo, which need not be in the store.

        Raises:
            ServiceUnavailableError: a service cannot be reached.
        """
        await self._verify(read_path_info(encoded).path, encoded)

    async def _all_paths(self) -> list[StorePath]:
        paths: set[StorePath] = set()
        try:
            async for encoded in self._services.path_infos.list():
                try:
                    paths.add(read_path_info(encoded).path)
                except PathInfoError as exc:
                    self._fail(unreadable("a PathInfo", exc))
        except ServiceUnavailableError:
            raise
        except (StoreError, ProtocolError) as exc:
            self._fail(unreadable("the list of paths", exc))
        return sorted(paths, key=StorePath.basename)

    async def _references(self, path: StorePath) -> list[StorePath]:
        """Return the references of `path` that are in the store, and report the others.

        Return nothing if `path` itself is not in the store.
        """
        found: list[StorePath] = []
        missing: list[str] = []
        with suppress(CorruptBlobError, ProtocolError):  # `verify` has reported it
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
            self._report(
                VerifyError(
                    f"{path.absolute()}: refers to {STORE_DIR}/{name}, which is missing",
                    rule="missing-reference",
                )
            )
        return found

    async def _verify(self, path: StorePath, stated: bytes | None) -> None:
        self.num_paths += 1
        num_errors = self._num_errors
        try:
            encoded = stated or await self._services.path_infos.get(path.digest)
            if encoded is None or read_path_info(encoded).path != path:
                raise VerifyError(f"path {path.absolute()} is not valid", rule="invalid-path")
            await self._verify_contents(encoded)
        except ServiceUnavailableError:
            raise
        except VerifyError as exc:
            self._report(exc)
        except (StoreError, ProtocolError) as exc:
            self._report(unreadable(path.absolute(), exc))
        if self._num_errors > num_errors:
            self.num_failed += 1
            self.failed.append(path)

    async def _verify_contents(self, encoded: bytes) -> None:
        info = read_path_info(encoded)
        message = pathinfo_pb2.PathInfo.FromString(encoded)
        narinfo = message.narinfo
        if self._trusted_keys is not None:
            self._check_signatures(info.path, message, self._trusted_keys)
        address = ContentAddress.of_message(narinfo)
        address_hash = self._check_path(info, narinfo, address) if address else None
        contents = CheckedContents(self._services, self._report, self.progress, self.damaged)
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

    async def _is_workable(self, info: PathInfo, contents: CheckedContents) -> bool:
        """Whether the NAR can be made; if not, the contents are checked without it."""
        extent = await extent_of(info.node, self._services.directories)
        if extent is None:
            return True
        try:
            extent.check("the tree")
        except NarTooLargeError as exc:
            self._report(VerifyError(f"{info.path.absolute()}: {exc}", rule="unworkable"))
            await contents.check_once(info.node)
            return False
        return True

    def _check_signatures(
        self, path: StorePath, message: pathinfo_pb2.PathInfo, trusted_keys: TrustedKeys
    ) -> None:
        where = path.absolute()
        try:
            claim = narinfo_of(message)
            for name in trusted_keys.wrong_signatures(claim):
                self._report(
                    VerifyError(f"{where}: signature by {name} is wrong", rule="wrong-signature")
                )
            trusted_keys.check(claim)
        except PathInfoError as exc:
            self._report(VerifyError(f"{where}: not trusted: {exc}", rule="untrusted"))

    def _check_path(
        self, info: PathInfo, narinfo: pathinfo_pb2.NARInfo, address: ContentAddress
    ) -> ContentHash:
        """Check the path against its content address; return the hash that the content must have.

        The caller feeds the content to the hash, and checks the result with `_check_address`.
        """
        where = info.path.absolute()
        refers_to_itself = info.path.basename() in narinfo.reference_names
        try:
            expected = path_of_address(info.path, narinfo, address).absolute()
        except StorePathError as exc:
            expected = f"none ({exc})"
        if expected != where:
            self._report(
                mismatch(
                    "store-path-mismatch",
                    where,
                    f"path of {address}",
                    expected=expected,
                    actual=where,
                )
            )
        return ContentHash(address.hash.algorithm, info.path if refers_to_itself else None)

    def _check_nar(self, info: PathInfo, size: int, sha256: bytes) -> None:
        where = info.path.absolute()
        if info.nar_sha256 and sha256 != info.nar_sha256:
            stated, actual = NixHash("sha256", info.nar_sha256), NixHash("sha256", sha256)
            self._report(
                mismatch(
                    "nar-hash-mismatch", where, "hash of the NAR", expected=stated, actual=actual
                )
            )
        if (info.nar_sha256 or info.nar_size) and size != info.nar_size:
            self._report(
                mismatch(
                    "nar-size-mismatch",
                    where,
                    "size of the NAR",
                    expected=info.nar_size,
                    actual=size,
                )
            )

    def _check_address(
        self, info: PathInfo, address: ContentAddress, digests: Sequence[bytes]
    ) -> None:
        actual: object = address
        if address.method is not Method.NAR and not _is_plain_file(info.node):
            actual = "something other than a file that is not executable"
        elif address.hash.digest not in digests:
            actual = address._replace(hash=address.hash._replace(digest=digests[0]))
        if actual != address:
            where = info.path.absolute()
            self._report(
                mismatch(
                    "content-address-mismatch",
                    where,
                    "content address",
                    expected=address,
                    actual=actual,
                )
            )

    def _fail(self, error: VerifyError) -> None:
        self.num_failed += 1
        self._report(error)

    def _report(self, error: VerifyError) -> None:
        self._num_errors += 1
        self._report_error(error)


def _is_plain_file(node: Node) -> bool:
    return isinstance(node, FileNode) and not node.executable
