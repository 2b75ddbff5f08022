"""The node index: what every content number stands for, and the wire images made from it.

It is derived from the store and not durable, so what a host crash left of it cannot be trusted, and
must not even be opened. Hence one environment per boot, in a directory of its own:

    PATH / v1-BOOT-ID /     v1 is the schema, BOOT-ID is /proc/sys/kernel/random/boot_id

A writer removes those of other boots: the guests that held their numbers are gone. One of another
schema is left alone, as a supervisor of another release may be using it.

Databases (numbers little-endian unless they are keys in order, then big-endian):

    meta         "next" -> first unused content number (8)
                 "root_generation" -> generation of the store that the root has reached (8)
                 "store" -> identity of the store that the root is of
    numbers      identity (see children) -> content number (4)
    contents     content number (4, big-endian) -> content record (see images)
    directories  content number (4, big-endian) -> directory image (see images)
    root_names   base name -> root entry (see images)
    root_order   ordinal (8, big-endian) -> root record (see images); 0 and 1 are "." and ".."

A worker reads; the resolver of each supervisor writes. Several supervisors of one store may share
an index: all that is assigned is looked up again in the transaction that assigns it. Numbers are
never reused; nor are ordinals, until the root is emptied.
"""

import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, TypeVar

from appliance.castore.nodes import Directory, Node
from appliance.errors import StoreError
from appliance.fuse_proto._wire import ENTRY_OUT_SIZE
from appliance.index import images
from appliance.index.children import Child, Kind, child_of, identity
from appliance.index.images import Entry
from appliance.store.lmdb_env import Environment, ReadTransaction, WriteTransaction

T = TypeVar("T")

_SCHEMA: Final = 1
_BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_ENVIRONMENT_NAME: Final = re.compile(r"v\d+-(?P<boot_id>[0-9a-f-]{36})")
_DATABASES: Final = (
    b"meta",
    b"numbers",
    b"contents",
    b"directories",
    b"root_names",
    b"root_order",
)
_NUMBER_MAX: Final = images.PARENT_INO - 1
_NUMBER: Final = struct.Struct("<I")
_KEY: Final = struct.Struct(">I")
_ORDINAL_KEY: Final = struct.Struct(">Q")


class NodeIndex:
    """An open node index; one thread, one transaction at a time (see `Environment`)."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._meta = environment.database(b"meta")
        self._numbers = environment.database(b"numbers")
        self._contents = environment.database(b"contents")
        self._directories = environment.database(b"directories")
        self._root_names = environment.database(b"root_names")
        self._root_order = environment.database(b"root_order")

    @classmethod
    def open(cls, path: Path, *, is_readonly: bool, boot_id: str | None = None) -> "NodeIndex":
        """Open the index of this boot below `path`.

        A writer creates it, and removes those of other boots.

        Raises:
            SchemaVersionError: read-only, and no writer has made the index yet.
            StoreError: it cannot be opened.
        """
        boot_id = boot_id or _BOOT_ID_FILE.read_text().strip()
        if not is_readonly:
            _remove_other_boots(path, boot_id)
        environment = Environment(
            path / f"v{_SCHEMA}-{boot_id}",
            databases=_DATABASES,
            is_readonly=is_readonly,
            is_durable=False,
        )
        index = cls(environment)
        if not is_readonly:
            environment.write(index._initialise)
        return index

    def read(self) -> AbstractContextManager[ReadTransaction]:
        """Open a snapshot for the reading methods; their views die with it."""
        return self._environment.read()

    def write(self, work: Callable[[WriteTransaction], T]) -> T:
        """Run `work`, which may run more than once, in a transaction for the writing methods."""
        return self._environment.write(work)

    def reap_readers(self) -> int:
        """Free the reader slots of dead processes and return how many there were."""
        return self._environment.reap_readers()

    def close(self) -> None:
        """Close; every transaction must have ended."""
        self._environment.close()

    # --- Reading ---

    def record(self, txn: ReadTransaction, number: int) -> memoryview | None:
        """Return the content record of `number`."""
        return txn.get(_KEY.pack(number), None, self._contents)

    def image(self, txn: ReadTransaction, number: int) -> memoryview | None:
        """Return the directory image of `number`."""
        return txn.get(_KEY.pack(number), None, self._directories)

    def root_entry(self, txn: ReadTransaction, name: bytes) -> memoryview | None:
        """Return entry_out of `name` in the root; the name is 1..255 bytes."""
        found = txn.get(name, None, self._root_names)
        return None if found is None else found[:ENTRY_OUT_SIZE]

    def root_listing(self, txn: ReadTransaction, from_ordinal: int) -> Iterator[memoryview]:
        """Yield the root records from an ordinal (any u64) on."""
        cursor = txn.cursor(self._root_order)
        if cursor.set_range(_ORDINAL_KEY.pack(from_ordinal)):
            yield from cursor.iternext(keys=False, values=True)

    def root_generation(self, txn: ReadTransaction) -> int:
        """Return the generation of the store that the root's listing has reached."""
        return self._load(txn, b"root_generation")

    # --- Writing ---

    def add_directory(
        self, txn: WriteTransaction, number: int, directory: Directory
    ) -> list[Entry]:
        """Number the children of `directory`, whose number is `number`, and store its image.

        Returns its entries; none, and nothing is done, if it has an image already.

        Raises:
            StoreError: no numbers are left, or the directory is too big.
        """
        key = _KEY.pack(number)
        if txn.cursor(self._directories).set_key(key):
            return []
        entries = self._assign(txn, map(child_of, directory.nodes()))
        txn.put(key, images.directory_image(number, entries), db=self._directories)
        return entries

    def add_root(self, txn: WriteTransaction, node: Node) -> None:
        """Number `node` and put it in the root by its name.

        Nothing happens if the name is there already: a store path never changes.

        Raises:
            StoreError: no numbers are left.
        """
        if txn.get(node.name, None, self._root_names) is not None:
            return
        (entry,) = self._assign(txn, [child_of(node)])
        position = 0
        if entry.kind == Kind.DIRECTORY:
            position = images.position(entry.name, images.ROOT_NODEID)
        ordinal = txn.stat(self._root_order)["entries"]
        record = images.record(entry, ordinal + 1, position << 32 | entry.number)
        txn.put(_ORDINAL_KEY.pack(ordinal), record, db=self._root_order, append=True)
        txn.put(entry.name, images.root_entry(record, ordinal), db=self._root_names)

    def claim_root(self, txn: WriteTransaction, store_identity: bytes, generation: int) -> None:
        """Empty the root if it was filled from another store, or from more than there is now.

        Numbers stay: they stand for content, whichever store it came from.

        Args:
            txn: a write transaction.
            store_identity: any bytes that no other store has.
            generation: of that store.
        """
        if (
            txn.get(b"store", None, self._meta) == store_identity
            and self._load(txn, b"root_generation") <= generation
        ):
            return
        txn.put(b"store", store_identity, db=self._meta)
        txn.drop(self._root_names, delete=False)
        txn.drop(self._root_order, delete=False)
        self._begin_root(txn)

    def set_root_generation(self, txn: WriteTransaction, generation: int) -> None:
        """Note that the root holds all that the store had at `generation`; never goes back."""
        if generation > self._load(txn, b"root_generation"):
            self._save(txn, b"root_generation", generation)

    def _initialise(self, txn: WriteTransaction) -> None:
        if txn.get(b"next", None, self._meta) is not None:
            return
        self._save(txn, b"next", images.ROOT_NUMBER + 1)
        self._begin_root(txn)

    def _begin_root(self, txn: WriteTransaction) -> None:
        self._save(txn, b"root_generation", 0)
        for ordinal, name in enumerate((b".", b"..")):
            record = images.dot_record(name, images.ROOT_NUMBER, ordinal + 1)
            txn.put(_ORDINAL_KEY.pack(ordinal), record, db=self._root_order)

    def _assign(self, txn: WriteTransaction, children: Iterable[Child]) -> list[Entry]:
        # The hot loop of indexing: one put per child that is known, two per one that is new.
        entries: list[Entry] = []
        records: list[tuple[bytes, bytes]] = []
        unused = self._load(txn, b"next")
        for child in children:
            key = identity(child)
            if txn.put(key, _NUMBER.pack(unused), overwrite=False, db=self._numbers):
                number = unused
                if number > _NUMBER_MAX:
                    raise StoreError(f"the node index has used all {_NUMBER_MAX} content numbers")
                unused += 1
                records.append((_KEY.pack(number), images.content_record(number, child)))
            else:
                number = int.from_bytes(txn.get(key, b"", self._numbers), "little")
            entries.append(Entry(child.name, child.kind, number, child.size))
        if records:
            txn.cursor(self._contents).putmulti(records, append=True)
            self._save(txn, b"next", unused)
        return entries

    def _load(self, txn: "ReadTransaction | WriteTransaction", name: bytes) -> int:
        return int.from_bytes(txn.get(name, b"", self._meta), "little")

    def _save(self, txn: WriteTransaction, name: bytes, value: int) -> None:
        txn.put(name, value.to_bytes(8, "little"), db=self._meta)


def _remove_other_boots(path: Path, boot_id: str) -> None:
    # Another supervisor may be doing the same: what is gone already is fine.
    for child in path.glob("v*"):
        match = _ENVIRONMENT_NAME.fullmatch(child.name)
        if match and match["boot_id"] != boot_id:
            shutil.rmtree(child, ignore_errors=True)
