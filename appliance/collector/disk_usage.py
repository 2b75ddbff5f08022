"""Where the space of a store goes: what each store path or view takes up, alone and with others.

Every object is charged what it takes up on the disk. The file of a blob counts with its blocks. In
LMDB, a large value has pages of its own (mdb.c: OVPAGES); smaller ones share pages, and the pages
of a table are spread over its entries in proportion to their bytes. So the charges of all objects
add up to the size of the store, except for what belongs to no object, which is reported beside.

An object is exclusive to a path if no other path refers to it, directly or through Directories,
else shared. To find out, each path in turn walks its tree and writes its number to each object that
has none; where it meets the number of another path, the object and all below it is shared, and no
later path needs to go further down there. So no object is visited more than three times, whatever
the number of paths.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from appliance.castore.digest import DIGEST_SIZE
from appliance.castore.directory import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.references import sized_contents_in
from appliance.collector.digest_index import DigestIndex
from appliance.collector.path_graph import KnownPath, PathGraph
from appliance.db.environment import ReadTransaction
from appliance.db.resident_pages import read_ahead
from appliance.store import removal, schema
from appliance.store.charges import Charges
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

_SHARED: Final = -1


class GroupUsage(NamedTuple):
    """What a group of store paths takes up, in bytes.

    Args:
        label: the store path or view.
        apparent_bytes: the contents of its files and symlinks, each as often as it occurs.
        shared_bytes: what it has in common with paths outside of the group.
        exclusive_bytes: what no path outside of the group refers to.
    """

    label: str
    apparent_bytes: int
    shared_bytes: int
    exclusive_bytes: int


class StoreUsage(NamedTuple):
    """What a store takes up, in bytes.

    Args:
        rows: one for each group that was asked for.
        shared_bytes: what more than one group refers to, counted once.
        exclusive_bytes: the sum of what is exclusive to each group.
        unreferenced_bytes: what no store path refers to; garbage collection frees it.
        other_bytes: tables that belong to no object.
        unused_bytes: pages of `data.mdb` that later commits use before it grows.
    """

    rows: list[GroupUsage]
    shared_bytes: int
    exclusive_bytes: int
    unreferenced_bytes: int
    other_bytes: int
    unused_bytes: int


def disk_usage(
    store: Store, shown: Sequence[tuple[str, Sequence[bytes]]] | None = None
) -> StoreUsage:
    """Measure a store.

    Args:
        store: the store (lent).
        shown: groups of store paths to return a row for: a label, and the digests of the paths.
            Every other path is a group of its own. None asks for a row for each path.

    Raises:
        StoreError: LMDB failed.
    """
    unused_bytes = store.env.unused_bytes()
    read_ahead(store.path)
    with store.env.read() as txn:
        view = store.view_in(txn)
        graph = PathGraph(store)
        graph.load(txn, view)
        measure = _Measure(store, txn, view)
        known = sorted(graph.paths.values(), key=lambda one: one.path.basename())
        own_bytes = measure.path_bytes / max(1, len(known))
        if shown is None:
            groups = [(one.path.absolute(), [one]) for one in known]
            num_rows = len(groups)
        else:
            named = {digest for _, digests in shown for digest in digests}
            groups = [
                (label, [graph.paths[digest] for digest in digests if digest in graph.paths])
                for label, digests in shown
            ]
            num_rows = len(groups)
            groups += [("", [one]) for one in known if one.path.digest not in named]
        for number, (_, members) in enumerate(groups, 1):
            measure.own(members, number)
        rows = [
            measure.usage(label, members, number, own_bytes)
            for number, (label, members) in enumerate(groups[:num_rows], 1)
        ]
        shared, exclusive, unreferenced = measure.totals()
        return StoreUsage(
            rows=rows,
            shared_bytes=round(shared),
            exclusive_bytes=round(exclusive + (measure.path_bytes if known else 0)),
            unreferenced_bytes=round(unreferenced),
            other_bytes=round(measure.other_bytes + (0 if known else measure.path_bytes)),
            unused_bytes=unused_bytes,
        )


class _Measure:
    # The charges of all objects, and whose each object is.

    def __init__(self, store: Store, txn: ReadTransaction, view: Snapshot) -> None:
        self._view = view
        self.blobs = DigestIndex(removal.sizes(store, txn, schema.BLOBS))
        self.directories = DigestIndex(removal.sizes(store, txn, schema.DIRECTORIES))
        charges = Charges(store, txn)
        self._blob_charges = array("d", charges.of_table(schema.BLOBS))
        self._directory_charges = array("d", charges.of_table(schema.DIRECTORIES))
        _add(self._directory_charges, self.directories, charges.of_images())
        _add(self._blob_charges, self.blobs, charges.of_chunks())
        self.path_bytes = charges.path_bytes()
        self.other_bytes = charges.other_bytes()
        self._blob_owners = array("l", bytes(array("l").itemsize * len(self.blobs)))
        self._directory_owners = array("l", bytes(array("l").itemsize * len(self.directories)))
        # Apparent sizes of the Directories that were measured, by number.
        self._apparent: dict[int, int] = {}

    def own(self, members: Iterable[KnownPath], owner: int) -> None:
        """Write the number of a group to all that it refers to."""
        owners = self._directory_owners
        for known in members:
            if isinstance(known.node, FileNode):
                _take(self._blob_owners, self.blobs.number_of(known.node.digest), owner)
            stack = _root_of(known.node)
            while stack:
                digest = stack.pop()
                number = self.directories.number_of(digest)
                if number < 0 or owners[number] in {owner, _SHARED}:
                    continue
                _take(owners, number, owner)
                directories, blobs = self._contents(digest)
                for blob, _size in blobs:
                    _take(self._blob_owners, self.blobs.number_of(blob), owner)
                stack += directories

    def usage(
        self, label: str, members: Sequence[KnownPath], owner: int, own_bytes: float
    ) -> GroupUsage:
        """Add up what a group refers to."""
        seen_blobs, seen_directories = bytearray(len(self.blobs)), bytearray(len(self.directories))
        shared, exclusive = 0.0, own_bytes * len(members)

        def count(owners: "array[int]", charges: "array[float]", number: int) -> None:
            nonlocal shared, exclusive
            if owners[number] == owner:
                exclusive += charges[number]
            else:
                shared += charges[number]

        for blobs, directory in self._walk(members, seen_directories):
            if directory >= 0:
                count(self._directory_owners, self._directory_charges, directory)
            for blob in blobs:
                number = self.blobs.number_of(blob)
                if number >= 0 and not seen_blobs[number]:
                    seen_blobs[number] = 1
                    count(self._blob_owners, self._blob_charges, number)
        apparent = sum(self._apparent_of(known.node) for known in members)
        return GroupUsage(label, apparent, round(shared), round(exclusive))

    def totals(self) -> tuple[float, float, float]:
        """Return what is shared, exclusive to some group, and unreferenced."""
        sums = [0.0, 0.0, 0.0]
        for owners, charges in (
            (self._blob_owners, self._blob_charges),
            (self._directory_owners, self._directory_charges),
        ):
            for owner, charge in zip(owners, charges, strict=True):
                sums[0 if owner == _SHARED else 1 if owner else 2] += charge
        return sums[0], sums[1], sums[2]

    def _walk(
        self, members: Iterable[KnownPath], seen: bytearray
    ) -> Iterator[tuple[list[bytes], int]]:
        # Yields the blobs of each Directory with its number; a root that is a file has none.
        for known in members:
            if isinstance(known.node, FileNode):
                yield [known.node.digest], -1
            stack = _root_of(known.node)
            while stack:
                digest = stack.pop()
                number = self.directories.number_of(digest)
                if number < 0 or seen[number]:
                    continue
                seen[number] = 1
                directories, blobs = self._contents(digest)
                yield [blob for blob, _size in blobs], number
                stack += directories

    def _apparent_of(self, node: Node) -> int:
        if isinstance(node, FileNode):
            return node.size
        if isinstance(node, SymlinkNode):
            return len(node.target)
        # Each directory is met twice: before what is in it, and when all of that is measured.
        stack = [(bytes(node.digest), False)]
        while stack:
            digest, is_measured = stack.pop()
            number = self.directories.number_of(digest)
            if number < 0 or (number in self._apparent and not is_measured):
                continue
            directories, blobs = self._contents(digest)
            if is_measured:
                self._apparent[number] = sum(size for _, size in blobs) + sum(
                    self._apparent.get(self.directories.number_of(child), 0)
                    for child in directories
                )
            else:
                self._apparent[number] = 0  # a directory in itself would have no end
                stack.append((digest, True))
                stack += [(child, False) for child in directories]
        return self._apparent.get(self.directories.number_of(node.digest), 0)

    def _contents(self, digest: bytes) -> tuple[list[bytes], list[tuple[bytes, int]]]:
        directories, blobs = sized_contents_in(self._view.directory(digest) or b"")
        return [child for child in directories if len(child) == DIGEST_SIZE], blobs


def _root_of(node: Node) -> list[bytes]:
    return [node.digest] if isinstance(node, DirectoryNode) else []


def _take(owners: "array[int]", number: int, owner: int) -> None:
    if number >= 0 and owners[number] != owner:
        owners[number] = _SHARED if owners[number] else owner


def _add(charges: "array[float]", index: DigestIndex, more: Iterable[tuple[bytes, float]]) -> None:
    for digest, charge in more:
        number = index.number_of(digest)
        if number >= 0:
            charges[number] += charge
