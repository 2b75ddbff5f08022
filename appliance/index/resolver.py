"""The resolver: puts into the index what requests wait for, many wants at a time."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from errno import EIO, ENOENT, ENOTDIR, ESTALE
from itertools import islice
from typing import Final

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, Node
from appliance.castore.path_info import read_path_info
from appliance.castore.store_path import StorePath, StorePathError
from appliance.errors import DirectoryError, PathInfoError, StoreError
from appliance.index import images
from appliance.index.children import Kind
from appliance.index.node_index import NodeIndex
from appliance.index.wants import DirectoryWanted, RootListWanted, RootNameWanted, Want
from appliance.store.lmdb_env import ReadTransaction, WriteTransaction
from appliance.store.store import Store

_LOG = logging.getLogger(__name__)

# Paths that go into the root in one transaction, for which other supervisors wait.
_ROOT_CHUNK: Final = 1024
# Sub-directories indexed along with a directory: who enters it goes on to them, and a miss costs a
# message to this process and back. A cold walk over 1,885 directories, 12 in each: 145 messages
# instead of 1,885, and a quarter less work here.
_AHEAD_MAX: Final = 16
# Together, encoded. About 1,000 entries, which take 10 ms.
_AHEAD_BYTES_MAX: Final = 64 * 1024

Change = Callable[[WriteTransaction], object]


class Resolver:
    """Resolves wants from one store into one index, both writable by this process.

    A root that was filled from another store is emptied at once.
    """

    def __init__(self, store: Store, index: NodeIndex) -> None:
        self._store = store
        self._index = index
        with store.read() as txn:
            generation = store.generation(txn)
            identity = store.identity(txn)
        index.write(lambda txn: index.claim_root(txn, identity, generation))

    def resolve(self, wants: Sequence[Want]) -> list[int]:
        """Put into the index what is wanted; return for each want 0 or the errno of the answer.

        ESTALE: no such content number. ENOTDIR: not a directory's. ENOENT: no such path in the
        store. EIO: the store lacks what it should have, or the index cannot be written; logged.
        """
        errors = [0] * len(wants)
        changes: dict[int, Change] = {}
        with self._index.read() as txn, self._store.read() as store_txn:
            for place, want in enumerate(wants):
                try:
                    change = self._plan(txn, store_txn, want)
                except OSError as exc:
                    errors[place] = exc.errno or EIO
                else:
                    if change is not None:
                        changes[place] = change
        for place in self._failing(changes):
            errors[place] = EIO
        if any(isinstance(want, RootListWanted) for want in wants):
            error = self._sync_root()
            errors = [
                error if isinstance(want, RootListWanted) else had
                for want, had in zip(wants, errors, strict=True)
            ]
        return errors

    def _plan(self, txn: ReadTransaction, store_txn: ReadTransaction, want: Want) -> Change | None:
        # All reading and checking is done before the transaction that other writers wait for.
        if isinstance(want, DirectoryWanted):
            return self._plan_directory(txn, store_txn, want.number)
        if isinstance(want, RootNameWanted):
            return self._plan_root_name(txn, store_txn, want.name)
        return None

    def _plan_directory(
        self, txn: ReadTransaction, store_txn: ReadTransaction, number: int
    ) -> Change | None:
        digest = wanted_directory(self._index, txn, number)
        if digest is None:
            return None
        encoded = self._store.directory(store_txn, digest)
        if encoded is None:
            raise _broken(f"directory {digest} is not in the store")
        try:
            directory = Directory.from_bytes(encoded)
        except DirectoryError as exc:
            raise _broken(f"directory {digest}: {exc}") from exc
        ahead = dict(self._ahead(store_txn, directory))

        def change(write_txn: WriteTransaction) -> None:
            for entry in self._index.add_directory(write_txn, number, directory):
                if entry.name in ahead:
                    self._index.add_directory(write_txn, entry.number, ahead[entry.name])

        return change

    def _ahead(
        self, store_txn: ReadTransaction, directory: Directory
    ) -> Iterator[tuple[bytes, Directory]]:
        # What is wrong with one of them is told when that one is wanted.
        left = _AHEAD_BYTES_MAX
        for node in directory.directories[:_AHEAD_MAX]:
            encoded = self._store.directory(store_txn, node.digest)
            if encoded is None or len(encoded) > left:
                continue
            left -= len(encoded)
            with suppress(DirectoryError):
                yield node.name, Directory.from_bytes(encoded)

    def _plan_root_name(
        self, txn: ReadTransaction, store_txn: ReadTransaction, name: bytes
    ) -> Change | None:
        try:
            path = StorePath.parse(name)
        except StorePathError as exc:
            raise OSError(ENOENT, str(exc)) from exc
        if self._index.root_entry(txn, name) is not None:
            return None
        encoded = self._store.path_info(store_txn, path.digest)
        if encoded is None:
            raise OSError(ENOENT, f"{name!r} is not in the store")
        try:
            node = read_path_info(encoded).node
        except PathInfoError as exc:
            raise _broken(f"PathInfo of {name!r}: {exc}") from exc
        if node.name != name:
            raise OSError(ENOENT, f"the store has {node.name!r} by that digest")
        return lambda write_txn: self._index.add_root(write_txn, node)

    def _failing(self, changes: dict[int, Change]) -> list[int]:
        # One transaction for all; if it fails, one for each, so that the others get theirs.
        try:
            self._write(changes.values())
        except StoreError as exc:
            if len(changes) == 1:
                _LOG.error("node index: %s", exc)
                return list(changes)
            return [place for item in changes.items() for place in self._failing(dict([item]))]
        return []

    def _write(self, changes: Collection[Change]) -> None:
        def work(txn: WriteTransaction) -> None:
            for change in changes:
                change(txn)

        if changes:
            self._index.write(work)

    def _sync_root(self) -> int:
        try:
            while self._sync_root_chunk():
                pass
        except StoreError as exc:
            _LOG.error("listing the root: %s", exc)
            return EIO
        return 0

    def _sync_root_chunk(self) -> bool:
        # Returns whether there may be more.
        with self._index.read() as txn, self._store.read() as store_txn:
            reached = self._index.root_generation(txn)
            since = self._store.path_infos_since(store_txn, reached)
            chunk = list(islice(since, _ROOT_CHUNK))
            if len(chunk) < _ROOT_CHUNK:
                reached = self._store.generation(store_txn)
            else:
                reached = chunk[-1][0]
        nodes = [node for _generation, encoded in chunk if (node := _node_of(encoded)) is not None]

        def work(txn: WriteTransaction) -> None:
            for node in nodes:
                self._index.add_root(txn, node)
            self._index.set_root_generation(txn, reached)

        self._index.write(work)
        return len(chunk) == _ROOT_CHUNK


def wanted_directory(index: NodeIndex, txn: ReadTransaction, number: int) -> Digest | None:
    """Return the digest of the directory of content `number`; None if it has its image already.

    Raises:
        OSError: ESTALE, no such number; ENOTDIR, not a directory's.
    """
    content = index.record(txn, number) if number <= images.NUMBER_MASK else None
    if content is None:
        raise OSError(ESTALE, f"content number {number}")
    if images.kind_of(content) != Kind.DIRECTORY:
        raise OSError(ENOTDIR, f"content number {number}")
    return None if index.image(txn, number) is not None else Digest(images.digest_of(content))


def _node_of(encoded: bytes) -> Node | None:
    # One bad PathInfo must not keep all other paths from being listed.
    try:
        return read_path_info(encoded).node
    except PathInfoError as exc:
        _LOG.error("a path is left out of the root's listing: %s", exc)
        return None


def _broken(reason: str) -> OSError:
    _LOG.error("%s", reason)
    return OSError(EIO, reason)
