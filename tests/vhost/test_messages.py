"""Headers and payload sizes."""

import os

import pytest

from appliance.bounds import MESSAGE_FDS_MAX, PAYLOAD_MAX
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    CODECS,
    Config,
    Header,
    Inflight,
    ProtocolFeature,
    Region,
    RequestNumber,
    pack_config,
    pack_header,
    pack_inflight,
    unpack_header,
)
from appliance.vhost.messages import (
    ROWS,
    MessageReply,
    decode_header_untrusted,
    encode_reply,
)
from appliance.vhost.requests import REQUESTS, RequestRow, Tail
from appliance.vhost.session import Session
from tests.vhost.session_rig import mem_table, message, state, word

SERVED = [row for row in REQUESTS if row.refused is None]


def fixed_size(row: RequestRow) -> int:
    if row.payload is None:
        return 0
    return CODECS[row.payload].size


@pytest.mark.parametrize("flags", [0, 2, 3, 4, 5, 0xD, 0x11, 0x80000001, 8])
def test_header_flags_of_anything_but_a_request_end_the_connection(flags: int) -> None:
    with pytest.raises(VhostError, match="GET_FEATURES"):
        decode_header_untrusted(pack_header(Header(1, flags, 0)))


def test_payloads_are_capped() -> None:
    assert decode_header_untrusted(pack_header(Header(24, 1, PAYLOAD_MAX))).size == PAYLOAD_MAX
    with pytest.raises(VhostError, match="4097"):
        decode_header_untrusted(pack_header(Header(24, 1, PAYLOAD_MAX + 1)))


def test_replies_have_exactly_version_and_reply_set() -> None:
    data = encode_reply(MessageReply(RequestNumber.GET_FEATURES, word(7)))
    assert unpack_header(data) == Header(1, 0x5, 8)
    assert data[12:] == word(7)


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_size_ends_the_connection(row: RequestRow, change: int) -> None:
    size = fixed_size(row) + change
    if size < 0 or (row.tail is Tail.REGIONS and change > 0):
        size = fixed_size(row) + 1 if row.tail is Tail.NONE else 0
    with pytest.raises(VhostError, match=row.name):
        message(row.number, bytes(size), num_fds=2)


def test_a_memory_table_may_have_slots_to_spare_but_none_too_few() -> None:
    region = Region(0, 4096, 0, 0)
    assert len(mem_table([region], junk=bytes(32))) == 72
    message(RequestNumber.SET_MEM_TABLE, mem_table([region], junk=bytes(32))).close()
    message(RequestNumber.SET_MEM_TABLE, mem_table([region])).close()
    for length in range(len(mem_table([region]))):
        with pytest.raises(VhostError, match="SET_MEM_TABLE"):
            message(RequestNumber.SET_MEM_TABLE, mem_table([region])[:length])


@pytest.mark.parametrize("request_", [RequestNumber.GET_CONFIG, RequestNumber.SET_CONFIG])
def test_config_messages_carry_as_many_bytes_as_they_say(request_: RequestNumber) -> None:
    message(request_, pack_config(Config(0, 36, 0)) + bytes(36)).close()
    for length in (0, 35, 37):
        with pytest.raises(VhostError, match="CONFIG"):
            message(request_, pack_config(Config(0, 36, 0)) + bytes(length))


def test_unknown_and_refused_requests_may_carry_anything() -> None:
    for request in (0, 46, 2**32 - 1, RequestNumber.SEND_RARP, RequestNumber.GPU_SET_SOCKET):
        message(request, bytes(100), num_fds=3).close()


def test_messages_are_shown_with_name_values_and_descriptors() -> None:
    with message(RequestNumber.SET_VRING_NUM, state(1, 256), num_fds=1, flags=0x9) as shown:
        assert str(shown) == "SET_VRING_NUM VringState(ring=1, num=256) 1 fds need_reply"
    with message(77, b"abc") as shown:
        assert str(shown) == "request 77 3 bytes"


def test_a_taken_descriptor_is_not_taken_or_closed_again() -> None:
    with message(RequestNumber.SET_VRING_CALL, word(0), num_fds=1) as received:
        fd = received.take_fd(0)
        for index in (0, 1):
            with pytest.raises(LookupError):
                received.take_fd(index)
    os.close(fd)


def test_every_served_request_has_a_handler_and_no_other_has() -> None:
    assert {row.number for row in SERVED} == set(Session._HANDLERS)


def test_the_table_is_consistent() -> None:
    assert len(ROWS) == len(REQUESTS)
    for row in REQUESTS:
        assert row.needs is None or row.needs in ProtocolFeature.__members__
        assert row.fds[0] <= row.fds[1] <= MESSAGE_FDS_MAX
        assert row.failure is None or row.reply != "ack"
    inflight = ROWS[RequestNumber.GET_INFLIGHT_FD]
    assert inflight.failure == pack_inflight(Inflight(0, 0, 0, 0))
