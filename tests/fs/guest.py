"""A store filled from a model, and a guest in this process that sends the handler real requests."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.size_dialect import SizeDialect
from appliance.fs.handler import Handler
from appliance.fuse_proto._fuse_wire import EntryOut
from appliance.fuse_proto.dispatch import COUNTERS, Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.nix.path_info import encode_nar_addressed, read_path_info
from appliance.nix.store_path import StorePath, nar_path
from appliance.resolve.local import LocalResolver
from appliance.resolve.resolver import SessionGrants
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.session.wants import Want
from appliance.store.batch import Batch
from appliance.store.schema import INLINE_MAX
from appliance.store.store import Store
from tests.fakes import fuse_client
from tests.fakes.fuse_client import Answer, DirectoryRecord, PlainSession

ROOM = 16 + (1 << 20)


T = TypeVar("T")


class File(NamedTuple):
    content: bytes
    is_executable: bool = False


class Link(NamedTuple):
    target: bytes


Tree = Mapping[bytes, "File | Link | Tree"]
Model = File | Link | Tree


def store_path(name: str) -> StorePath:
    return nar_path(Digest.of(name.encode()), name)


def basename(name: str) -> bytes:
    return store_path(name).basename().encode()


def node_of(
    batch: Batch,
    spare: Path,
    name: bytes,
    model: Model,
    dialect: SizeDialect = SizeDialect.DOCUMENTED,
) -> Node:
    """Add the contents of `model` to `batch`; `spare` is a directory for big files."""
    if isinstance(model, File):
        digest = Digest.of(model.content)
        if len(model.content) <= INLINE_MAX:
            batch.add_blob(digest, model.content)
        else:
            spare.mkdir(exist_ok=True)
            path = spare / digest.hex()
            path.write_bytes(model.content)
            batch.add_file(digest, path, len(model.content))
        return FileNode(name, digest, len(model.content), model.is_executable)
    if isinstance(model, Link):
        return SymlinkNode(name, model.target)
    nodes = [node_of(batch, spare, child, model[child], dialect) for child in sorted(model)]
    directory = Directory(
        [node for node in nodes if isinstance(node, DirectoryNode)],
        [node for node in nodes if isinstance(node, FileNode)],
        [node for node in nodes if isinstance(node, SymlinkNode)],
    )
    batch.add_directory(directory.digest(), directory.to_bytes())
    return DirectoryNode(name, directory.digest(), directory.size(dialect))


def add_path(batch: Batch, name: str, node: Node) -> None:
    """Add the store path called `name`, with `node` as its root."""
    path = store_path(name)
    encoded = encode_nar_addressed(path, node, nar_size=0, nar_sha256=bytes(32))
    batch.add_path_info(path.digest, encoded)


def put(
    store: Store, name: str, model: Model, dialect: SizeDialect = SizeDialect.DOCUMENTED
) -> bytes:
    """Commit `model` as the store path called `name` and return its base name."""
    batch = Batch()
    add_path(batch, name, node_of(batch, store.path / "spare", b"", model, dialect))
    store.commit(batch)
    return basename(name)


class Guest:
    """Sends requests to one handler; when it is not ready, resolves the want and asks again."""

    def __init__(
        self,
        path: Path,
        *,
        is_root_listable: bool = True,
        is_by_content: bool = False,
        makes_images: bool = False,
        root: Tree | None = None,
    ) -> None:
        self.store = Store.open(path / "store", create=True, map_size_bytes=1 << 24)
        self.table = GrantTable(is_by_content=is_by_content)
        self.grants = Grants(self.table.fd)
        if root is not None:
            put(self.store, "root", root)
            node = self._node_in_store(basename("root"))
            assert isinstance(node, DirectoryNode)
            self.table.grant_root(node)
        self.handler = Handler(
            self.grants,
            self.store,
            is_root_listable=is_root_listable,
            makes_images=makes_images,
        )
        self.runner = asyncio.Runner()
        self.resolver = LocalResolver(self.store)
        self.session = SessionGrants(self.table)
        self.wants: list[Want] = []
        self.dispatcher = Dispatcher(
            self.handler, PlainSession(), memoryview(bytearray(8 * COUNTERS)).cast("Q")
        )
        assert self.ask(fuse_client.init()).error == 0

    def close(self) -> None:
        self.handler.close()
        self.runner.run(self.resolver.close())
        self.runner.close()
        self.table.close()
        self.store.close()

    def _node_in_store(self, name: bytes) -> Node:
        with self.store.snapshot() as snapshot:
            encoded = snapshot.path_info(StorePath.parse(name).digest)
        assert encoded is not None
        return read_path_info(encoded).node

    def ask(self, request: bytes, room: int = ROOM) -> Answer:
        while True:
            try:
                with self.handler.batch():
                    reply = self.dispatcher.handle_untrusted(
                        memoryview(request), len(request), room
                    )
                    assert reply is not None
                    return fuse_client.parse_reply(fuse_client.wire(reply))
            except NotReady as exc:
                error = self._resolve(exc.want)
            if error:
                return Answer(1, error, b"")

    def _resolve(self, want: object) -> int:
        assert isinstance(want, Want)
        self.wants.append(want)
        return self.runner.run(self.resolver.resolve(want, self.session))

    def body(self, request: bytes) -> bytes:
        answer = self.ask(request)
        assert answer.error == 0, answer
        return answer.body

    def lookup(self, nodeid: int, name: bytes) -> EntryOut:
        return fuse_client.parse_entry(self.body(fuse_client.lookup(nodeid, name)))

    def walk(self, *names: bytes) -> int:
        """Return the nodeid that the path `names` leads to from the root."""
        nodeid = fuse_client.ROOT
        for name in names:
            nodeid = self.lookup(nodeid, name).nodeid
            assert nodeid != 0, name
        return nodeid

    def listing_plus(self, nodeid: int, size: int = 4096) -> list[tuple[EntryOut, DirectoryRecord]]:
        return self._listing(
            lambda offset: fuse_client.parse_direntplus(
                self.body(fuse_client.readdirplus(nodeid, offset, size))
            ),
            lambda record: record[1].off,
        )

    def listing(self, nodeid: int, size: int = 4096) -> list[DirectoryRecord]:
        return self._listing(
            lambda offset: fuse_client.parse_dirents(
                self.body(fuse_client.readdir(nodeid, offset, size))
            ),
            lambda record: record.off,
        )

    def _listing(self, read: Callable[[int], list[T]], off: Callable[[T], int]) -> list[T]:
        records: list[T] = []
        while piece := read(off(records[-1]) if records else 0):
            records += piece
        return records
