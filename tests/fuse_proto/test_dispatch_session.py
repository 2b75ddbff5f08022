from errno import EIO, EPROTO

import pytest

from appliance.fuse_proto import _fuse_wire
from appliance.fuse_proto._fuse_wire import InitIn, Opcode
from appliance.fuse_proto.opcodes import OPS
from tests.fakes import fuse_client
from tests.fuse_proto.rig import HANDLED, OneFile, Rig


@pytest.fixture
def rig() -> Rig:
    return Rig(OneFile())


def test_before_init_everything_else_is_eio() -> None:
    rig = Rig(OneFile(), is_initialised=False)
    for op in OPS:
        if not op.is_early:
            assert rig.answer(fuse_client.request(op.number, 1, bytes(64))).error == EIO
    assert rig.answer(fuse_client.request(4096)).error == EIO
    assert rig.answer(fuse_client.init()).error == 0
    assert rig.answer(HANDLED["LOOKUP"]).error == 0


@pytest.mark.parametrize("size", [16, 64, 72])
def test_init_of_any_known_size_starts_the_session(size: int) -> None:
    rig = Rig(OneFile(), is_initialised=False)
    body = _fuse_wire.pack_init_in(fuse_client.INIT_6_1).ljust(72, b"\0")[:size]
    answer = rig.answer(fuse_client.request(Opcode.INIT, 0, body))
    reply = fuse_client.parse_init(answer.body)
    assert (reply.major, reply.minor, reply.max_pages) == (7, 38, 256)
    assert rig.session.is_initialised
    flags = reply.flags | reply.flags2 << 32
    assert rig.session.started == [(38, flags, reply.max_readahead)]


def test_second_init_restarts_the_session() -> None:
    rig = Rig(OneFile(), is_initialised=False)
    first = rig.answer(fuse_client.init())
    older = InitIn(7, 31, 131072, 0x0BFFFFFB, 0)
    second = rig.answer(fuse_client.init(older))
    assert [fuse_client.parse_init(one.body).minor for one in (first, second)] == [38, 31]
    assert [minor for minor, _, _ in rig.session.started] == [38, 31]
    assert rig.session.is_initialised


def test_newer_major_waits_for_a_second_init() -> None:
    rig = Rig(OneFile(), is_initialised=False)
    reply = fuse_client.parse_init(rig.answer(fuse_client.init(InitIn(8, 3, 0, 0, 0))).body)
    assert reply[0] == 7
    assert not rig.session.is_initialised
    assert rig.answer(HANDLED["LOOKUP"]).error == EIO
    assert rig.answer(fuse_client.init()).error == 0
    assert rig.session.is_initialised


def test_too_old_a_guest_is_eproto_and_has_no_session(rig: Rig) -> None:
    assert rig.answer(fuse_client.init(InitIn(7, 27, 0, 0, 0))).error == EPROTO
    assert not rig.session.is_initialised
    assert rig.session.started == []


def test_init_whose_reply_has_no_room_starts_nothing() -> None:
    rig = Rig(OneFile(), is_initialised=False)
    for room in range(16, 16 + 64):
        assert rig.answer(fuse_client.init(), writable_len=room).error == EIO
    assert rig.session.started == []


def test_init_of_the_other_byte_order_is_eio(rig: Rig) -> None:
    assert rig.answer(fuse_client.request(436207616, 0, bytes(64))).error == EIO
    assert rig.session.started == []
    assert rig.counted() == {0: 1}


def test_destroy_ends_the_session(rig: Rig) -> None:
    assert rig.answer(fuse_client.destroy()) == (1, 0, b"")
    assert not rig.session.is_initialised
    assert rig.answer(HANDLED["LOOKUP"]).error == EIO
    assert rig.answer(fuse_client.destroy()).error == 0
