"""The C answers and the Python handler side by side, over one store and one session's grants."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from appliance.bounds import UPLINK_MESSAGE_MAX
from appliance.castore.directory import DirectoryNode, Node
from appliance.fs.files import RemoteParts
from appliance.fs.handler import Handler
from appliance.fuse_proto._fuse_wire import IN_HEADER_SIZE, EntryOut
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.protos import control_pb2 as pb
from appliance.session.first_reads import FirstRead, FirstReads, unpack_reads
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.session.grants_layout import Grant
from appliance.session.request_statistics import STATISTICS_BYTES, QueueStatistics
from appliance.store.batch import Batch
from appliance.store.store import Store
from appliance.store.store_reader import StoreReader
from appliance.worker.plain_answers import PlainAnswers
from tests.fakes import fuse_client
from tests.fakes.fuse_client import PlainSession
from tests.fs.guest import Model, basename, node_of

ROOM: Final = 16 + (1 << 20)


def filled_store(path: Path, models: Mapping[str, Model]) -> list[Node]:
    """Make a store with `models` and return their nodes; no LMDB is open afterwards."""
    store = Store.open(path, create=True, map_size_bytes=1 << 26)
    batch = Batch()
    nodes = [node_of(batch, path / "spare", basename(name), models[name]) for name in models]
    store.commit(batch)
    store.close()
    return nodes


def new_statistics() -> QueueStatistics:
    return QueueStatistics(memoryview(bytearray(STATISTICS_BYTES)))


def _remote(used: list[bytes], *, is_cache: bool) -> RemoteParts:
    return RemoteParts(
        has_blobs=is_cache, has_directories=is_cache, has_root=False, used=used.extend
    )


class Recorded:
    """What one of the two has told of first reads, in the order of their times."""

    def __init__(self) -> None:
        self._reads: list[FirstRead] = []

    def take(self, message: pb.FirstReads) -> None:
        assert message.ByteSize() < UPLINK_MESSAGE_MAX - 16
        self._reads += unpack_reads(message)

    @property
    def reads(self) -> list[FirstRead]:
        in_order = sorted(self._reads, key=lambda read: read.read_ns)
        return [read._replace(read_ns=0) for read in in_order]


class Twins:
    """Both answerers of one session; every node in `nodes` is granted. `store` is lent.

    With `has_root`, the first of them is the root directory, and the others are not granted.
    """

    def __init__(
        self,
        store: StoreReader,
        nodes: list[Node],
        *,
        is_by_content: bool = False,
        is_cache: bool = False,
        has_root: bool = False,
        is_recorded: bool = False,
    ) -> None:
        self.used_by_c: list[bytes] = []
        self.used: list[bytes] = []
        self.first_by_c, self.first = Recorded(), Recorded()
        self.table = GrantTable(is_by_content=is_by_content)
        if has_root:
            assert isinstance(nodes[0], DirectoryNode)
            self.table.grant_root(nodes[0])
        else:
            for node in nodes:
                self.table.grant(node)
        self.grants = Grants(self.table.fd)
        self.store = store
        self.session = memoryview(bytearray(b"\1"))
        self.statistics_of_c, self.statistics = new_statistics(), new_statistics()
        self.plain = PlainAnswers(
            self.store,
            self.table.fd,
            self.session,
            self.statistics_of_c,
            remote=_remote(self.used_by_c, is_cache=is_cache),
            first_reads=FirstReads(self.first_by_c.take) if is_recorded else None,
        )
        self.handler = Handler(
            self.grants,
            self.store,
            is_root_listable=True,
            remote=_remote(self.used, is_cache=is_cache),
            first_reads=FirstReads(self.first.take) if is_recorded else None,
        )
        self.dispatcher = Dispatcher(self.handler, PlainSession(), self.statistics.requests)
        self.python(fuse_client.init())

    def close(self) -> None:
        self.plain.close()
        self.handler.close()
        self.table.close()

    def python(
        self, request: bytes, room: int = ROOM, readable_len: int | None = None
    ) -> bytes | None:
        """Return what the handler answers; None if it has to wait."""
        size = len(request) if readable_len is None else readable_len
        try:
            with self.handler.batch():
                reply = self.dispatcher.handle_untrusted(memoryview(request), size, room)
                return b"" if reply is None else fuse_client.wire(reply)
        except NotReady:
            return None

    def check(self, request: bytes, room: int = ROOM, readable_len: int | None = None) -> bool:
        """Compare the two, which must agree if C answers at all; return whether it does."""
        size = len(request) if readable_len is None else readable_len
        opcode = int.from_bytes(request[4:8], "little")
        before = list(self.statistics_of_c.requests)
        answer = self.plain.answer(request, size, room)
        after = list(self.statistics_of_c.requests)
        if answer is None:
            assert after == before
            return False
        assert len(request) >= IN_HEADER_SIZE
        before[opcode] += 1
        assert after == before
        assert answer == self.python(request, room, size), request
        return True

    def both(self, request: bytes, room: int = ROOM) -> bytes:
        """Return the body of the answer to a plain request that succeeds."""
        assert self.check(request, room), request
        reply = self.python(request, room)
        assert reply is not None
        answer = fuse_client.parse_reply(reply)
        assert answer.error == 0
        return answer.body

    def grants_of_root(self) -> Grant:
        """Return the grant that has the root directory."""
        grant = self.grants.by_nodeid(fuse_client.ROOT)
        assert grant is not None
        return grant

    def lookup(self, nodeid: int, name: bytes) -> EntryOut:
        return fuse_client.parse_entry(self.both(fuse_client.lookup(nodeid, name)))
