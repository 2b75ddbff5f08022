"""Store paths and how they refer to each other, as the collector sees them."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Final, NamedTuple

from appliance.castore.directory import Node
from appliance.db.environment import ReadTransaction, WriteTransaction
from appliance.errors import PathInfoError
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

_AT_A_TIME: Final = 256


class KnownPath(NamedTuple):
    """A store path: its root node, what it refers to, and when it was put (0: not known)."""

    path: StorePath
    node: Node
    references: tuple[bytes, ...]
    put_ns: int


class PathGraph:
    """The store paths of a store, by digest, which follows later commits.

    Attributes:
        paths: the paths.
        generation: the generation of the store up to which they go.
        damage: a line for each PathInfo that breaks a rule; such a path is left out.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.paths: dict[bytes, KnownPath] = {}
        self.generation = 0
        self.damage: list[str] = []

    def load(self, txn: ReadTransaction, view: Snapshot) -> None:
        """Read all paths that the transaction sees."""
        self.generation = view.generation
        for path_digest, encoded in view.path_infos():
            self._add(txn, path_digest, encoded)
        self._store.env.limit_pages()

    def follow(self, txn: WriteTransaction, view: Snapshot) -> list[KnownPath]:
        """Add what was put since the last call or `load`, and return it."""
        added: list[KnownPath] = []
        for generation, encoded in view.path_infos_since(self.generation):
            self.generation = generation
            try:
                path_digest = read_path_info(encoded).path.digest
            except PathInfoError:
                continue
            self._add(txn, path_digest, encoded)
            added.append(self.paths[path_digest])
        self.generation = view.generation
        return added

    def closure(self, roots: Mapping[bytes, str]) -> dict[bytes, str]:
        """Return every path that is reachable from `roots`, with the root that it was reached from.

        Args:
            roots: why each path is a root, by digest. Those that are not in the store are ignored.
        """
        live: dict[bytes, str] = {}
        for root, reason in roots.items():
            stack = [root]
            while stack:
                digest = stack.pop()
                known = self.paths.get(digest)
                if known is not None and digest not in live:
                    live[digest] = reason
                    stack += known.references
        return live

    def referrers_first(self, digests: Collection[bytes]) -> list[bytes]:
        """Return `digests` so that each path comes before those that it refers to.

        Removed in this order, no path ever refers to one that is gone. Among paths of which none
        refers to the other, older ones come first.
        """
        wanted = set(digests)
        order: list[bytes] = []
        done: set[bytes] = set()
        newest_first = sorted(wanted, key=lambda digest: (-self.paths[digest].put_ns, digest))
        for start in newest_first:
            stack: list[tuple[bytes, Iterator[bytes]]] = []
            self._enter(start, wanted, done, stack)
            while stack:
                digest, left = stack[-1]
                child = next(left, None)
                if child is None:
                    stack.pop()
                    order.append(digest)
                else:
                    self._enter(child, wanted, done, stack)
        order.reverse()
        return order

    def referrer_of(self, digest: bytes, among: Iterable[bytes]) -> KnownPath | None:
        """Return one of the paths `among` that refers to a path, other than that path itself."""
        return next(
            (
                self.paths[other]
                for other in among
                if other != digest and digest in self.paths[other].references
            ),
            None,
        )

    def _enter(
        self,
        digest: bytes,
        wanted: set[bytes],
        done: set[bytes],
        stack: list[tuple[bytes, Iterator[bytes]]],
    ) -> None:
        if digest in wanted and digest not in done:
            done.add(digest)
            stack.append((digest, iter(self.paths[digest].references)))

    def _add(
        self, txn: "ReadTransaction | WriteTransaction", path_digest: bytes, encoded: bytes
    ) -> None:
        try:
            info = read_path_info(encoded)
        except PathInfoError as exc:
            self.damage.append(f"PathInfo {path_digest.hex()}: {exc}")
            return
        put_ns = self._store.recent_puts.time_of_path(txn, path_digest)
        self.paths[path_digest] = KnownPath(info.path, info.node, info.references, put_ns)


def in_parts(digests: Iterable[bytes], size: int = _AT_A_TIME) -> Iterator[list[bytes]]:
    """Yield `digests` in lists of up to `size`."""
    iterator = iter(digests)
    while part := list(islice(iterator, size)):
        yield part
