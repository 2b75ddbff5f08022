"""Any bytes from a guest result in a reply that fits, or in none, and never in an exception."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.fuse_proto._fuse_wire import IN_HEADER_SIZE, Opcode
from appliance.fuse_proto.dispatch import COUNTERS, Dispatcher
from appliance.fuse_proto.encode import body_size
from appliance.fuse_proto.format import format_request_untrusted
from appliance.fuse_proto.operations import Body, FileSlice, Operations, Request
from tests.fakes import fuse_client
from tests.fakes.fuse_client import PlainSession

pytestmark = pytest.mark.slow


class Obliging(Operations):
    """Replies as the arguments ask, so that arguments that were not checked cause errors."""

    def lookup(self, request: Request) -> Body:
        assert 1 <= len(request.names[0]) <= 255
        assert not set(b"/\0") & set(request.names[0])
        return bytes(128)

    def getattr(self, request: Request) -> Body:
        return bytes(104 + 0 * request.args.getattr_flags)

    def read(self, request: Request) -> Body:
        return FileSlice(0, request.args.offset, request.args.size)

    def readdirplus(self, request: Request) -> Body:
        assert request.args.size <= 1 << 20
        return memoryview(bytes(request.args.size))

    def getxattr(self, request: Request) -> Body:
        assert len(request.names) == 1
        return bytes(min(request.args.size, 10) or 8)


opcodes = st.one_of(st.sampled_from(list(Opcode)), st.integers(0, 2**32 - 1))
framed = st.builds(
    fuse_client.request,
    opcodes,
    st.integers(0, 2**64 - 1),
    st.binary(max_size=300),
    unique=st.integers(0, 2**64 - 1),
)


def check(data: bytes, unseen: int, writable_len: int) -> None:
    session = PlainSession()
    session.is_initialised = bool(unseen % 2)
    counters = memoryview(bytearray(8 * COUNTERS)).cast("Q")
    dispatcher = Dispatcher(Obliging(), session, counters)
    reply = dispatcher.handle_untrusted(memoryview(data), len(data) + unseen, writable_len)
    assert sum(counters) == 1
    line = format_request_untrusted(memoryview(data))
    assert line.isprintable()
    if reply is None:
        return
    assert 16 + body_size(reply.body) <= writable_len
    assert 0 <= reply.error < 512
    assert not reply.error or reply.body == b""
    if len(data) >= IN_HEADER_SIZE:
        assert reply.unique == int.from_bytes(data[8:16], "little")


@settings(max_examples=400)
@given(st.binary(max_size=200), st.integers(0, 9000), st.integers(0, 1 << 20))
def test_random_bytes(data: bytes, unseen: int, writable_len: int) -> None:
    check(data, unseen, writable_len)


@settings(max_examples=1000)
@given(framed, st.integers(0, 1), st.integers(0, 400))
def test_well_framed_requests_with_random_bodies(
    data: bytes, unseen: int, writable_len: int
) -> None:
    check(data, unseen, writable_len)
