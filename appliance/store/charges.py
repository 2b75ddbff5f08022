"""What each entry of a store takes up on the disk.

LMDB keeps an entry in a leaf page: 8 bytes of header, the key and the value, padded to an even
size, and 2 bytes that point to it. A value that would leave no room for a second entry has pages of
its own, and the entry has their number instead (mdb.c: mdb_node_add, me_nodemax). The leaf and
branch pages of a table are never full, so they are spread over the entries in proportion to their
sizes.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from appliance.castore.digest import DIGEST_SIZE
from appliance.db.environment import ReadTransaction
from appliance.store import schema
from appliance.store.store import Store

if TYPE_CHECKING:
    import lmdb

_PAGE: Final = 4096
_PAGE_HEADER: Final = 16
_NODE_HEADER: Final = 8
_POINTER: Final = 2
_PAGE_NUMBER: Final = 8
_NODE_MAX: Final = ((_PAGE - _PAGE_HEADER) // 2 & -2) - _POINTER
_BLOCK: Final = 512
_FILE_RECORD_SIZE: Final = len(schema.pack_file_record(0))

# Tables with one entry or so for each store path.
_OF_PATHS: Final = (schema.PATH_INFOS, schema.PATH_INFO_LOG, schema.PATH_TIMES, schema.NAR_INFOS)
_OF_CHUNKS: Final = (schema.CHUNKS, schema.CHUNK_PLACES)


class Charges:
    """What the entries of a store take up, as a transaction sees it (lent)."""

    def __init__(self, store: Store, txn: ReadTransaction) -> None:
        self._store = store
        self._txn = txn

    def of_table(self, table: bytes) -> list[float]:
        """Return what each entry of a table takes up, in the order of the keys, in bytes.

        The file of a blob is added to its record.
        """
        database = self._store.env.newer_database(table)
        if database is None:
            return []
        nodes: list[int] = []
        apart: list[int] = []
        for key, value in self._txn.cursor(db=database).iternext():
            node, pages = _node_of(len(key), len(value))
            if table == schema.BLOBS and len(value) == _FILE_RECORD_SIZE:
                pages += self._file_bytes(bytes(key), value)
            nodes.append(node)
            apart.append(pages)
        stat = self._txn.stat(database)
        shared = (stat["branch_pages"] + stat["leaf_pages"]) * stat["psize"]
        factor = shared / max(1, sum(nodes))
        return [node * factor + pages for node, pages in zip(nodes, apart, strict=True)]

    def of_images(self) -> Iterator[tuple[bytes, float]]:
        """Yield the digest of a Directory with what each piece of its image takes up."""
        yield from zip(
            (key[:DIGEST_SIZE] for key in self._keys(schema.IMAGES)),
            self.of_table(schema.IMAGES),
            strict=True,
        )

    def of_chunks(self) -> Iterator[tuple[bytes, float]]:
        """Yield the digest of each blob that has a list of chunks with what its chunks take up."""
        places = self._pages_of([schema.CHUNK_PLACES])
        lists = dict(zip(self._keys(schema.CHUNKS), self.of_table(schema.CHUNKS), strict=True))
        total = sum(lists.values())
        for digest, charge in lists.items():
            yield digest, charge * (1 + places / total)

    def path_bytes(self) -> int:
        """Return what the tables of store paths take up."""
        return self._pages_of(_OF_PATHS)

    def other_bytes(self) -> int:
        """Return what all other tables take up, except for those of objects."""
        of_objects = {schema.BLOBS, schema.DIRECTORIES, schema.IMAGES, *_OF_PATHS, *_OF_CHUNKS}
        tables = {*schema.DATABASES, *schema.NEWER_DATABASES} - of_objects
        return self._pages_of(tables)

    def _pages_of(self, tables: Iterable[bytes]) -> int:
        found = [self._store.env.newer_database(table) for table in tables]
        stats = [self._txn.stat(database) for database in found if database is not None]
        return sum(_num_pages(stat) * _PAGE for stat in stats)

    def _keys(self, table: bytes) -> Iterator[bytes]:
        database = self._store.env.newer_database(table)
        if database is not None:
            for key in self._txn.cursor(db=database).iternext(keys=True, values=False):
                yield bytes(key)

    def _file_bytes(self, digest: bytes, record: memoryview) -> int:
        if record[0] != schema.IN_FILE:
            return 0
        try:
            return self._store.files.status(digest).st_blocks * _BLOCK
        except OSError:  # it is damaged: `verify` says so
            return 0


def _num_pages(stat: "lmdb._StatDict") -> int:
    return stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]


def _node_of(key_size: int, value_size: int) -> tuple[int, int]:
    """Return the bytes of an entry in a leaf page, and of the pages that its value has apart."""
    if _NODE_HEADER + key_size + value_size > _NODE_MAX:
        pages = -(-(_PAGE_HEADER + value_size) // _PAGE)
        return _padded(_NODE_HEADER + key_size + _PAGE_NUMBER), pages * _PAGE
    return _padded(_NODE_HEADER + key_size + value_size), 0


def _padded(size: int) -> int:
    return (size + 1 & -2) + _POINTER
