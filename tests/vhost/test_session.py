"""Negotiation, configuration, inflight buffers, device state, and refusals of requests."""

import logging

import pytest

from appliance.engine import inflight_size
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    Config,
    Inflight,
    Log,
    ProtocolFeature,
    RequestNumber,
    StateTransfer,
    VirtioFeature,
    pack_config,
    pack_inflight,
    pack_log,
    pack_state_transfer,
    unpack_inflight,
    unpack_word,
)
from appliance.vhost.requests import REQUESTS, RequestRow
from tests.vhost.session_rig import (
    GUEST_FEATURES,
    NO_FD,
    REGION,
    Rig,
    mem_table,
    memory_region,
    ring_addr,
    run_now,
    state,
    word,
)


def config(offset: int, size: int, flags: int = 0) -> bytes:
    return pack_config(Config(offset, size, flags)) + bytes(size)


# --- Negotiation ---


def test_what_is_offered_is_what_the_device_serves() -> None:
    with Rig(num_queues=5) as rig:
        for request, value in (
            (RequestNumber.GET_FEATURES, rig.device.virtio_features),
            (RequestNumber.GET_PROTOCOL_FEATURES, rig.device.protocol_features),
            (RequestNumber.GET_QUEUE_NUM, 5),
            (RequestNumber.GET_MAX_MEM_SLOTS, 509),
        ):
            reply = rig.handle(request)
            assert reply == (request, word(value), ())


@pytest.mark.parametrize("bit", [24, 27, 31, 33, 34, 35, 63])
def test_virtio_features_that_were_not_offered_are_refused(bit: int) -> None:
    with Rig() as rig:
        assert not rig.is_acked(RequestNumber.SET_FEATURES, word(GUEST_FEATURES | 1 << bit))
        assert rig.is_acked(RequestNumber.SET_FEATURES, word(GUEST_FEATURES))


@pytest.mark.parametrize("bit", [2, 8, 10, 14, 16, 20, 63])
def test_protocol_features_that_were_not_offered_are_refused(bit: int) -> None:
    with Rig() as rig:
        assert not rig.is_acked(RequestNumber.SET_PROTOCOL_FEATURES, word(1 | 1 << bit))


def test_a_need_reply_is_honoured_before_and_with_the_negotiation_of_acks() -> None:
    with Rig() as rig:
        assert rig.is_acked(RequestNumber.SET_OWNER)
        assert rig.is_acked(RequestNumber.SET_PROTOCOL_FEATURES, word(ProtocolFeature.REPLY_ACK))
        assert rig.is_acked(RequestNumber.SET_OWNER)


def test_requests_with_an_own_reply_are_answered_once_by_that() -> None:
    with Rig() as rig:
        for request in (RequestNumber.GET_FEATURES, RequestNumber.GET_PROTOCOL_FEATURES):
            assert rig.handle(request, need_reply=True) == rig.handle(request)


FEATURE_REQUESTS = {
    "MQ": [(RequestNumber.GET_QUEUE_NUM, b"", 0)],
    "CONFIG": [
        (RequestNumber.SET_CONFIG, config(0, 4), 0),
        (RequestNumber.GET_CONFIG, config(0, 4), 0),
    ],
    "CONFIGURE_MEM_SLOTS": [
        (RequestNumber.GET_MAX_MEM_SLOTS, b"", 0),
        (RequestNumber.ADD_MEM_REG, memory_region(REGION), 1),
        (RequestNumber.REM_MEM_REG, memory_region(REGION), 1),
    ],
    "RESET_DEVICE": [(RequestNumber.RESET_DEVICE, b"", 0)],
    "INFLIGHT_SHMFD": [
        (RequestNumber.GET_INFLIGHT_FD, pack_inflight(Inflight(0, 0, 2, 64)), 0),
        (RequestNumber.SET_INFLIGHT_FD, pack_inflight(Inflight(0x1000, 0, 2, 64)), 1),
    ],
    "LOG_SHMFD": [(RequestNumber.SET_LOG_BASE, pack_log(Log(0x1000, 0)), 1)],
    "DEVICE_STATE": [
        (RequestNumber.SET_DEVICE_STATE_FD, pack_state_transfer(StateTransfer(0, 0)), 1),
        (RequestNumber.CHECK_DEVICE_STATE, b"", 0),
    ],
}


@pytest.mark.parametrize("feature", FEATURE_REQUESTS)
def test_requests_of_a_feature_that_was_not_negotiated_fail(feature: str) -> None:
    for request, payload, num_fds in FEATURE_REQUESTS[feature]:
        row = next(row for row in REQUESTS if row.number == request)
        assert row.needs == feature
        with Rig() as rig:
            others = rig.device.protocol_features & ~ProtocolFeature[feature]
            rig.do(RequestNumber.SET_PROTOCOL_FEATURES, word(others))
            if row.failure is not None:
                assert rig.handle(request, payload, num_fds) == (request, row.failure, ())
            else:
                with pytest.raises(VhostError, match=feature):
                    rig.handle(request, payload, num_fds)
                if row.reply == "ack":
                    assert not rig.is_acked(request, payload, num_fds)
            assert rig.backend.calls == []


def test_without_negotiation_on_this_connection_offered_features_may_be_used() -> None:
    with Rig() as rig:
        assert rig.is_acked(RequestNumber.ADD_MEM_REG, memory_region(REGION), 1)


def test_without_a_tag_config_fails_even_so() -> None:
    with Rig(tag=None) as rig:
        assert rig.handle(RequestNumber.GET_CONFIG, config(0, 4)) == (
            RequestNumber.GET_CONFIG,
            b"",
            (),
        )


# --- Requests that cannot be served ---


@pytest.mark.parametrize("request_", [0, 46, 1002, 2**32 - 1])
def test_unknown_requests_fail_if_asked_and_are_ignored_otherwise(request_: int) -> None:
    with Rig() as rig:
        assert rig.handle(request_, b"junk", 2) is None
        assert not rig.is_acked(request_, b"junk", 2)


@pytest.mark.parametrize(
    "row", [row for row in REQUESTS if row.refused is not None], ids=lambda row: row.name
)
def test_requests_of_other_devices_are_refused_and_their_descriptors_closed(
    row: RequestRow,
) -> None:
    with Rig() as rig:
        if row.reply == "ack":
            assert rig.handle(row.number, bytes(16), 2) is None
            assert not rig.is_acked(row.number, bytes(16), 2)
        else:
            with pytest.raises(VhostError, match=row.name):
                rig.handle(row.number, bytes(16), 2, need_reply=True)


@pytest.mark.parametrize(
    ("request_", "payload", "num_fds"),
    [
        (RequestNumber.SET_FEATURES, word(GUEST_FEATURES), 1),
        (RequestNumber.SET_OWNER, b"", 1),
        (RequestNumber.RESET_OWNER, b"", 2),
        (RequestNumber.SET_MEM_TABLE, mem_table([REGION]), 0),
        (RequestNumber.SET_MEM_TABLE, mem_table([REGION]), 2),
        (RequestNumber.SET_MEM_TABLE, mem_table([]), 1),
        (RequestNumber.SET_VRING_NUM, state(0, 256), 1),
        (RequestNumber.SET_VRING_ADDR, ring_addr(0), 1),
        (RequestNumber.SET_VRING_BASE, state(0, 0), 1),
        (RequestNumber.SET_VRING_KICK, word(0), 0),
        (RequestNumber.SET_VRING_KICK, word(0), 2),
        (RequestNumber.SET_VRING_KICK, word(NO_FD), 0),
        (RequestNumber.SET_VRING_KICK, word(NO_FD), 1),
        (RequestNumber.SET_VRING_CALL, word(0), 0),
        (RequestNumber.SET_VRING_CALL, word(NO_FD), 1),
        (RequestNumber.SET_VRING_ERR, word(0), 0),
        (RequestNumber.SET_VRING_ERR, word(0x200), 1),
        (RequestNumber.SET_PROTOCOL_FEATURES, word(1), 1),
        (RequestNumber.SET_VRING_ENABLE, state(0, 1), 1),
        (RequestNumber.SET_CONFIG, config(0, 4), 0),
        (RequestNumber.SET_CONFIG, config(0, 4, 1), 0),
        (RequestNumber.SET_INFLIGHT_FD, pack_inflight(Inflight(0x2000, 0, 2, 64)), 0),
        (RequestNumber.SET_INFLIGHT_FD, pack_inflight(Inflight(0x2000, 0, 2, 64)), 2),
        (RequestNumber.RESET_DEVICE, b"", 1),
        (RequestNumber.ADD_MEM_REG, memory_region(REGION), 0),
        (RequestNumber.ADD_MEM_REG, memory_region(REGION), 2),
        (RequestNumber.REM_MEM_REG, memory_region(REGION), 2),
    ],
)
def test_a_failure_is_acked_if_asked_and_ends_the_connection_otherwise(
    request_: RequestNumber, payload: bytes, num_fds: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Rig() as rig, caplog.at_level(logging.WARNING):
        assert not rig.is_acked(request_, payload, num_fds)
        assert [record.getMessage().split(":")[:2] for record in caplog.records] == [
            ["refused", f" {request_.name}"]
        ]
        with pytest.raises(VhostError, match=f"^{request_.name}: "):
            rig.handle(request_, payload, num_fds)
        assert rig.backend.calls == []


def test_getters_with_descriptors_end_the_connection() -> None:
    with Rig() as rig, pytest.raises(VhostError, match="GET_FEATURES"):
        rig.handle(RequestNumber.GET_FEATURES, num_fds=1)


def test_what_the_backend_refuses_is_refused() -> None:
    with Rig() as rig:
        rig.backend.refuses = {"add_region", "set_regions", "reset", "inflight", "set_inflight"}
        inflight = pack_inflight(Inflight(0x2000, 0, 2, 64))
        assert not rig.is_acked(RequestNumber.ADD_MEM_REG, memory_region(REGION), 1)
        assert not rig.is_acked(RequestNumber.SET_MEM_TABLE, mem_table([REGION]), 1)
        assert not rig.is_acked(RequestNumber.RESET_DEVICE)
        assert not rig.is_acked(RequestNumber.SET_INFLIGHT_FD, inflight, 1)
        assert rig.handle(RequestNumber.GET_INFLIGHT_FD, inflight) == (31, bytes(24), ())
        rig.backend.refuses.clear()
        # Nothing of the refused request was kept, so the same region does not overlap itself.
        assert rig.is_acked(RequestNumber.ADD_MEM_REG, memory_region(REGION), 1)


# --- Configuration space ---


def test_config_is_read_in_the_size_and_with_the_header_that_was_asked() -> None:
    with Rig() as rig:
        for size in (*range(1, 41), 256):
            asked = config(0, size, flags=1)
            reply = rig.handle(RequestNumber.GET_CONFIG, asked)
            assert reply is not None
            assert reply.payload == asked[:12] + rig.device.read_config(0, size)


# --- Inflight buffer, reset ---


def test_an_inflight_buffer_is_the_backends_and_is_lent_to_the_reply() -> None:
    with Rig() as rig:
        asked = pack_inflight(Inflight(99, 99, 2, 128))
        reply = rig.handle(RequestNumber.GET_INFLIGHT_FD, asked, need_reply=True)
        assert reply is not None
        size = 2 * inflight_size(128)
        assert unpack_inflight(reply.payload) == Inflight(size, 0, 2, 128)
        assert reply.fds == (rig.backend.buffer_fd,)


def test_an_inflight_area_has_a_header_and_an_entry_per_descriptor() -> None:
    assert [inflight_size(num) for num in (1, 2, 3, 4, 128)] == [64, 64, 64, 128, 2112]


@pytest.mark.parametrize(
    "inflight",
    [
        Inflight(1 << 20, 0, 0, 128),
        Inflight(1 << 20, 0, 3, 128),
        Inflight(1 << 20, 0, 2, 0),
        Inflight(1 << 20, 0, 2, 100),
        Inflight(1 << 20, 0, 2, 2048),
    ],
)
def test_an_inflight_buffer_for_impossible_queues_is_refused(inflight: Inflight) -> None:
    with Rig() as rig:
        payload = pack_inflight(inflight)
        assert rig.handle(RequestNumber.GET_INFLIGHT_FD, payload) == (31, bytes(24), ())
        assert not rig.is_acked(RequestNumber.SET_INFLIGHT_FD, payload, 1)
        assert rig.backend.calls == []


def test_an_inflight_buffer_must_hold_an_area_for_each_queue() -> None:
    with Rig() as rig:
        size = 2 * inflight_size(128)
        small = pack_inflight(Inflight(size - 1, 0, 2, 128))
        assert not rig.is_acked(RequestNumber.SET_INFLIGHT_FD, small, 1)
        rig.do(RequestNumber.SET_INFLIGHT_FD, pack_inflight(Inflight(size, 4096, 2, 128)), 1)
        assert rig.backend.calls == [("set_inflight", size, 4096, 2, 128)]


# --- Device state ---


def transfer(direction: int, phase: int = 0) -> bytes:
    return pack_state_transfer(StateTransfer(direction, phase))


def test_a_state_is_saved_or_loaded_and_its_end_asked_for() -> None:
    with Rig() as rig:
        request = RequestNumber.SET_DEVICE_STATE_FD
        assert rig.handle(request, transfer(0), 1) == (request, word(0x100), ())
        assert rig.handle(RequestNumber.CHECK_DEVICE_STATE) == (43, word(0), ())
        assert rig.handle(request, transfer(1), 1, need_reply=True) == (request, word(0x100), ())
        assert rig.handle(RequestNumber.CHECK_DEVICE_STATE) == (43, word(0), ())
        end = ("finish_state",)
        assert rig.backend.calls == [("save_state",), end, ("load_state",), end]


@pytest.mark.parametrize("payload", [transfer(2), transfer(0, 1), transfer(1, 2**32 - 1)])
def test_transfers_that_are_not_defined_fail(payload: bytes) -> None:
    with Rig() as rig:
        request = RequestNumber.SET_DEVICE_STATE_FD
        assert rig.handle(request, payload, 1) == (request, word(0x101), ())
        assert rig.backend.calls == []


def test_a_state_is_transferred_only_while_no_ring_runs() -> None:
    with Rig() as rig:
        rig.negotiate()
        rig.add_memory()
        rig.run_ring(1)
        rig.backend.calls.clear()
        request = RequestNumber.SET_DEVICE_STATE_FD
        for direction in (0, 1):
            assert rig.handle(request, transfer(direction), 1) == (request, word(0x101), ())
        assert rig.handle(RequestNumber.CHECK_DEVICE_STATE) == (43, word(1), ())
        assert rig.backend.calls == []
        rig.enable_ring(1, 0)  # stopped, though the front-end does not ask for its base
        assert rig.handle(request, transfer(0), 1) == (request, word(0x100), ())


def test_what_the_backend_says_of_a_state_is_passed_on() -> None:
    with Rig() as rig:
        request = RequestNumber.SET_DEVICE_STATE_FD
        rig.backend.refuses = {"save_state", "finish_state"}
        assert rig.handle(request, transfer(0), 1) == (request, word(0x101), ())
        assert rig.handle(RequestNumber.CHECK_DEVICE_STATE) == (43, word(1), ())
        assert rig.handle(RequestNumber.SET_LOG_FD, b"", 1) is None  # closed, and not used


def test_close_ends_the_backend_and_closes_every_descriptor() -> None:
    with Rig() as rig:
        rig.negotiate()
        rig.add_memory()
        rig.run_ring(0)
        rig.do(RequestNumber.SET_VRING_ERR, word(1), 1)
    assert rig.backend.is_closed
    assert rig.backend.regions == {}


def test_descriptors_are_closed_even_if_the_backend_cannot_close() -> None:
    class BrokenError(Exception):
        pass

    rig = Rig()
    rig.do(RequestNumber.SET_VRING_CALL, word(0), 1)

    async def close() -> None:
        raise BrokenError

    rig.backend.close = close  # type: ignore[method-assign]
    with pytest.raises(BrokenError):
        run_now(rig.session.close())


def test_features_are_shown_without_the_bit_that_guests_never_see() -> None:
    with Rig() as rig:
        rig.negotiate()
        rig.add_memory()
        running = rig.run_ring(1)
        assert running.features == GUEST_FEATURES & ~int(VirtioFeature.PROTOCOL_FEATURES)


def test_every_message_is_one_debug_line(caplog: pytest.LogCaptureFixture) -> None:
    with Rig() as rig, caplog.at_level(logging.DEBUG):
        reply = rig.handle(RequestNumber.GET_FEATURES, need_reply=True)
        assert reply is not None
        assert unpack_word(reply.payload).value == rig.device.virtio_features
    assert [record.getMessage() for record in caplog.records] == [
        "received GET_FEATURES need_reply"
    ]
