"""A dispatcher with a small file system, and one valid request of each kind."""

from errno import ENODATA, ERANGE
from typing import Final

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import IN_HEADER_SIZE
from appliance.fuse_proto.dispatch import COUNTERS, Dispatcher
from appliance.fuse_proto.encode import NO_ENTRY, Reply, negative_entry
from appliance.fuse_proto.operations import Body, Operations, Request
from tests.fakes import fuse_client
from tests.fakes.fuse_client import PlainSession

CONTENT: Final = bytes(range(256)) * 64
VALUE: Final = b"attribute value"
ENTRY: Final = _fuse_wire.pack_entry_out(NO_ENTRY._replace(nodeid=2))
ROOM: Final = 1 << 16

# One valid request for each opcode that a method of Operations answers.
HANDLED: Final = {
    "LOOKUP": fuse_client.lookup(1, b"file", unique=99),
    "GETATTR": fuse_client.getattr_(2, unique=99),
    "READLINK": fuse_client.readlink(2, unique=99),
    "OPEN": fuse_client.open_(2, unique=99),
    "READ": fuse_client.read(2, 10, 100, unique=99),
    "RELEASE": fuse_client.release(2, unique=99),
    "STATFS": fuse_client.statfs(unique=99),
    "GETXATTR": fuse_client.getxattr(2, b"user.a", 100, unique=99),
    "LISTXATTR": fuse_client.listxattr(2, 100, unique=99),
    "OPENDIR": fuse_client.opendir(1, unique=99),
    "READDIR": fuse_client.readdir(1, 0, unique=99),
    "ACCESS": fuse_client.access(2, unique=99),
    "READDIRPLUS": fuse_client.readdirplus(1, 0, unique=99),
    "LSEEK": fuse_client.lseek(2, 0, 3, unique=99),
    "STATX": fuse_client.statx(2, unique=99),
}


class OneFile(Operations):
    """A root with one file; `seen` has the requests that reached the operations."""

    def __init__(self) -> None:
        self.seen: list[Request] = []

    def lookup(self, request: Request) -> Body:
        self.seen.append(request)
        return ENTRY if request.names == (b"file",) else negative_entry(9)

    def getattr(self, request: Request) -> Body:
        self.seen.append(request)
        return bytes(_fuse_wire.ATTR_OUT_SIZE)

    def read(self, request: Request) -> Body:
        self.seen.append(request)
        return memoryview(CONTENT)[request.args.offset :][: request.args.size]

    def getxattr(self, request: Request) -> Body:
        self.seen.append(request)
        size = request.args.size
        if size == 0:
            return _fuse_wire.pack_getxattr_out(_fuse_wire.GetxattrOut(len(VALUE)))
        if request.names != (b"user.a",):
            raise OSError(ENODATA, "no such attribute")
        if size < len(VALUE):
            raise OSError(ERANGE, "longer than asked for")
        return VALUE

    def readdirplus(self, request: Request) -> Body:
        self.seen.append(request)
        return bytes(request.args.size)


class Rig:
    """A dispatcher with `operations`, and by default with a session that has begun."""

    def __init__(self, operations: Operations, *, is_initialised: bool = True) -> None:
        self.session = PlainSession()
        self.session.is_initialised = is_initialised
        self.counters = memoryview(bytearray(8 * COUNTERS)).cast("Q")
        self.dispatcher = Dispatcher(operations, self.session, self.counters)

    def handle(
        self, data: bytes, *, readable_len: int | None = None, writable_len: int = ROOM
    ) -> Reply | None:
        size = len(data) if readable_len is None else readable_len
        return self.dispatcher.handle_untrusted(memoryview(data), size, writable_len)

    def answer(self, data: bytes, *, writable_len: int = ROOM) -> fuse_client.Answer:
        reply = self.handle(data, writable_len=writable_len)
        assert reply is not None
        return fuse_client.parse_reply(fuse_client.wire(reply))

    def counted(self) -> dict[int, int]:
        return {slot: num for slot, num in enumerate(self.counters) if num}


def with_len(data: bytes, length: int) -> bytes:
    header = _fuse_wire.unpack_in_header(data)._replace(len=length)
    return _fuse_wire.pack_in_header(header) + data[IN_HEADER_SIZE:]
