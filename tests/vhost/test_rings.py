"""The ring state machine."""

import itertools
import os

import pytest

from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    Inflight,
    Log,
    RequestNumber,
    VirtioFeature,
    VringAddr,
    VringFlag,
    pack_inflight,
    pack_log,
    pack_vring_addr,
    unpack_vring_addr,
)
from tests.vhost.session_rig import (
    FILE_BYTES,
    GUEST_FEATURES,
    NO_FD,
    REGION,
    Rig,
    ring_addr,
    state,
    word,
)

PROTOCOL_FEATURES = int(VirtioFeature.PROTOCOL_FEATURES)


@pytest.fixture(name="rig")
def _rig() -> Rig:
    rig = Rig(num_queues=3)
    rig.negotiate()
    rig.add_memory()
    rig.backend.calls.clear()
    return rig


def base_of(rig: Rig, ring: int) -> int:
    reply = rig.handle(RequestNumber.GET_VRING_BASE, state(ring, 0))
    assert reply is not None
    assert reply.payload[:4] == ring.to_bytes(4, "little")
    return int.from_bytes(reply.payload[4:], "little")


def test_a_ring_runs_with_what_it_was_given(rig: Rig) -> None:
    with rig:
        rig.do(RequestNumber.SET_VRING_CALL, word(1), 1)
        rig.do(RequestNumber.SET_VRING_ERR, word(1), 1)
        running = rig.run_ring(1, num=128, base=0xFFFF)
        start = REGION.user_addr + 0x8000
        assert running[:6] == (
            128,
            start,
            start + 0x4000,
            start + 0x6000,
            0xFFFF,
            GUEST_FEATURES & ~PROTOCOL_FEATURES,
        )
        assert running.fresh
        assert len({running.kick_fd, running.call_fd, running.err_fd}) == 3
        assert list(rig.backend.running) == [1]


def test_an_err_descriptor_for_a_running_ring_restarts_it_where_it_was(rig: Rig) -> None:
    with rig:
        rig.run_ring(1, base=7)
        rig.do(RequestNumber.SET_VRING_ERR, word(1), 1)
        running = rig.backend.running[1]
        assert running.base == 7 + rig.backend.reached
        assert running.err_fd is not None
        os.fstat(running.err_fd)
        rig.do(RequestNumber.SET_VRING_ERR, word(1 | NO_FD))
        assert rig.backend.running[1].err_fd is None
        rig.enable_ring(1, 0)
        rig.do(RequestNumber.SET_VRING_ERR, word(1), 1)
        assert not rig.backend.running


@pytest.mark.parametrize("order", list(itertools.permutations("nbake")))
def test_the_order_of_messages_does_not_matter(rig: Rig, order: tuple[str, ...]) -> None:
    sends = {
        "n": (RequestNumber.SET_VRING_NUM, state(1, 256), 0),
        "b": (RequestNumber.SET_VRING_BASE, state(1, 7), 0),
        "a": (RequestNumber.SET_VRING_ADDR, ring_addr(1), 0),
        "k": (RequestNumber.SET_VRING_KICK, word(1), 1),
        "e": (RequestNumber.SET_VRING_ENABLE, state(1, 1), 0),
    }
    # A ring that is kicked and enabled before it has a size and addresses cannot start.
    is_complete = max(order.index("n"), order.index("a")) < max(order.index("k"), order.index("e"))
    # A base that comes after the start is refused.
    is_based = order.index("b") < max(order.index("k"), order.index("e"))
    with rig:
        acks = [rig.is_acked(*sends[step]) for step in order]
        assert all(acks) == (is_complete and is_based)
        if is_complete and is_based:
            assert rig.backend.running[1].base == 7


def test_a_ring_runs_only_when_started_and_enabled(rig: Rig) -> None:
    with rig:
        rig.describe_ring(0)
        rig.enable_ring(0)
        assert rig.backend.running == {}
        rig.kick_ring(0)
        assert list(rig.backend.running) == [0]
        rig.enable_ring(0, 0)
        assert rig.backend.running == {}
        rig.enable_ring(0, 1)
        assert list(rig.backend.running) == [0]


def test_enabling_or_disabling_twice_changes_nothing(rig: Rig) -> None:
    with rig:
        rig.run_ring(0)
        rig.enable_ring(0)
        assert rig.backend.calls == [("start_ring", 0)]
        rig.enable_ring(0, 0)
        rig.enable_ring(0, 0)
        assert rig.backend.calls == [("start_ring", 0), ("stop_ring", 0)]


def test_a_pause_goes_on_where_the_ring_was(rig: Rig) -> None:
    with rig:
        rig.run_ring(0, base=0xFFFE)
        rig.enable_ring(0, 0)
        rig.enable_ring(0, 1)
        assert rig.backend.running[0].base == 1
        assert base_of(rig, 0) == 4


def test_get_vring_base_stops_the_ring_and_drops_its_descriptors(rig: Rig) -> None:
    with rig:
        rig.do(RequestNumber.SET_VRING_CALL, word(0), 1)
        rig.run_ring(0, base=10)
        assert base_of(rig, 0) == 13
        assert rig.backend.running == {}
        # The ring is still enabled, but stopped, so only a new kick descriptor makes it run.
        rig.enable_ring(0)
        assert rig.backend.running == {}
        rig.kick_ring(0)
        assert rig.backend.running[0].base == 13
        assert rig.backend.running[0].call_fd is None


def test_get_vring_base_of_a_ring_that_never_ran_is_the_base_it_was_given(rig: Rig) -> None:
    with rig:
        assert base_of(rig, 2) == 0
        rig.do(RequestNumber.SET_VRING_BASE, state(2, 99))
        assert base_of(rig, 2) == 99
        assert rig.backend.calls == []


def test_the_front_end_may_start_a_stopped_ring_from_another_base(rig: Rig) -> None:
    with rig:
        rig.run_ring(0, base=10)
        base_of(rig, 0)
        assert rig.run_ring(0, base=0).base == 0


def test_a_kick_on_a_running_ring_restarts_it_with_the_new_descriptor(rig: Rig) -> None:
    with rig:
        rig.run_ring(0, base=1)
        rig.backend.calls.clear()
        rig.kick_ring(0)
        assert rig.backend.calls == [("stop_ring", 0), ("start_ring", 0)]
        assert rig.backend.running[0].base == 4


def test_addresses_restart_a_running_ring_only_if_they_change(rig: Rig) -> None:
    with rig:
        rig.run_ring(0)
        rig.backend.calls.clear()
        rig.do(RequestNumber.SET_VRING_ADDR, ring_addr(0, flags=1))
        assert rig.backend.calls == []
        rig.do(RequestNumber.SET_VRING_ADDR, ring_addr(0, shift=0x1000))
        assert rig.backend.calls == [("stop_ring", 0), ("start_ring", 0)]
        assert rig.backend.running[0].desc == REGION.user_addr + 0x1000


def test_size_and_base_of_a_running_ring_do_not_change(rig: Rig) -> None:
    with rig:
        rig.run_ring(0, num=256)
        assert rig.is_acked(RequestNumber.SET_VRING_NUM, state(0, 256))
        assert not rig.is_acked(RequestNumber.SET_VRING_NUM, state(0, 128))
        assert not rig.is_acked(RequestNumber.SET_VRING_BASE, state(0, 0))
        rig.enable_ring(0, 0)
        assert rig.is_acked(RequestNumber.SET_VRING_NUM, state(0, 128))
        assert rig.is_acked(RequestNumber.SET_VRING_BASE, state(0, 0))


def test_the_call_descriptor_changes_at_any_time(rig: Rig) -> None:
    with rig:
        for _ in range(3):
            rig.do(RequestNumber.SET_VRING_CALL, word(0), 1)
        assert rig.backend.calls == []
        before = rig.run_ring(0).call_fd
        rig.do(RequestNumber.SET_VRING_CALL, word(0), 1)
        after = rig.backend.running[0].call_fd
        assert after not in {None, before}
        rig.do(RequestNumber.SET_VRING_CALL, word(NO_FD))
        assert rig.backend.running[0].call_fd is None
        assert rig.backend.calls == [("start_ring", 0), ("set_call", 0), ("set_call", 0)]


def test_a_call_descriptor_that_the_backend_refuses_is_no_leak(rig: Rig) -> None:
    with rig:
        rig.run_ring(0)
        rig.backend.refuses = {"set_call"}
        assert not rig.is_acked(RequestNumber.SET_VRING_CALL, word(0), 1)


def test_a_ring_that_does_not_start_is_tried_again(rig: Rig) -> None:
    with rig:
        rig.describe_ring(0)
        rig.kick_ring(0)
        rig.backend.refuses = {"start_ring"}
        assert not rig.is_acked(RequestNumber.SET_VRING_ENABLE, state(0, 1))
        rig.backend.refuses.clear()
        assert rig.is_acked(RequestNumber.SET_VRING_ENABLE, state(0, 1))
        assert list(rig.backend.running) == [0]


def test_without_protocol_features_every_ring_is_enabled() -> None:
    with Rig() as rig:
        rig.add_memory()
        rig.describe_ring(0)
        rig.describe_ring(1)
        rig.kick_ring(1)
        assert rig.backend.running == {}
        rig.negotiate(GUEST_FEATURES & ~PROTOCOL_FEATURES)
        rig.kick_ring(0)
        assert sorted(rig.backend.running) == [0, 1]
        assert not rig.is_acked(RequestNumber.SET_VRING_ENABLE, state(0, 0))


def test_a_blank_session_bears_the_stop_of_a_vmm_that_reconnected() -> None:
    with Rig() as rig:
        rig.enable_ring(0, 0)
        assert base_of(rig, 0) == 0
        rig.do(RequestNumber.SET_VRING_CALL, word(0), 1)


def test_features_that_change_restart_running_rings(rig: Rig) -> None:
    with rig:
        rig.run_ring(0)
        rig.backend.calls.clear()
        rig.negotiate()
        assert rig.backend.calls == []
        rig.negotiate(GUEST_FEATURES & ~int(VirtioFeature.EVENT_IDX))
        assert rig.backend.calls == [("stop_ring", 0), ("start_ring", 0)]
        assert not rig.backend.running[0].features & VirtioFeature.EVENT_IDX


def set_log(rig: Rig, size: int = 0x1000, offset: int = 0) -> None:
    payload = pack_log(Log(size, offset))
    reply = rig.handle(RequestNumber.SET_LOG_BASE, payload, 1)
    assert reply == (RequestNumber.SET_LOG_BASE, payload, ())


def addr_with_log(ring: int, log_guest_addr: int, flags: int = VringFlag.LOG) -> bytes:
    addr = unpack_vring_addr(ring_addr(ring))
    return pack_vring_addr(addr._replace(flags=flags, log_guest_addr=log_guest_addr))


def test_running_rings_get_and_lose_a_log_without_a_restart(rig: Rig) -> None:
    with rig:
        rig.run_ring(0)
        rig.run_ring(2)
        rig.backend.calls.clear()
        set_log(rig)
        assert rig.backend.calls == []
        rig.negotiate(GUEST_FEATURES | VirtioFeature.LOG_ALL)
        rig.do(RequestNumber.SET_VRING_ADDR, addr_with_log(2, 0x8000))
        set_log(rig, 0x100, 0x1000)
        rig.do(RequestNumber.SET_VRING_ADDR, addr_with_log(2, 0x8000, flags=0))
        rig.negotiate(GUEST_FEATURES)
        assert rig.backend.calls == [
            ("set_log", 0, (0x1000, 0, None)),
            ("set_log", 2, (0x1000, 0, None)),
            ("set_log", 2, (0x1000, 0, 0x8000)),
            ("set_log", 0, (0x100, 0x1000, None)),
            ("set_log", 2, (0x100, 0x1000, 0x8000)),
            ("set_log", 2, (0x100, 0x1000, None)),
            ("set_log", 0, None),
            ("set_log", 2, None),
        ]


def test_a_ring_starts_with_its_log(rig: Rig) -> None:
    with rig:
        set_log(rig)
        rig.negotiate(GUEST_FEATURES | VirtioFeature.LOG_ALL)
        rig.describe_ring(1)
        rig.do(RequestNumber.SET_VRING_ADDR, addr_with_log(1, 0x9000))
        rig.kick_ring(1)
        rig.enable_ring(1)
        running = rig.backend.running[1]
        assert running.log is not None
        assert running.log[1:] == (0x1000, 0, 0x9000)
        assert not running.features & VirtioFeature.LOG_ALL


@pytest.mark.parametrize(
    "log", [Log(0, 0), Log(FILE_BYTES + 1, 0), Log(8, FILE_BYTES), Log(8, 1), Log(2**64 - 1, 4096)]
)
def test_a_log_that_its_file_does_not_hold_ends_the_connection(rig: Rig, log: Log) -> None:
    with rig, pytest.raises(VhostError, match="SET_LOG_BASE: dirty log: "):
        rig.handle(RequestNumber.SET_LOG_BASE, pack_log(log), 1)


def test_a_used_ring_is_not_logged_beyond_the_address_space(rig: Rig) -> None:
    with rig:
        assert not rig.is_acked(RequestNumber.SET_VRING_ADDR, addr_with_log(0, 2**64 - 8))
        assert rig.is_acked(RequestNumber.SET_VRING_ADDR, addr_with_log(0, 2**64 - 8, flags=0))


@pytest.mark.parametrize("request_", [RequestNumber.RESET_DEVICE, RequestNumber.RESET_OWNER])
def test_resets_disable_every_ring_and_keep_the_rest(rig: Rig, request_: RequestNumber) -> None:
    with rig:
        rig.run_ring(0)
        rig.run_ring(2)
        rig.backend.calls.clear()
        rig.do(request_)
        stops = [("stop_ring", 0), ("stop_ring", 2)]
        is_device = request_ is RequestNumber.RESET_DEVICE
        assert rig.backend.calls == ([*stops, ("reset",)] if is_device else stops)
        assert list(rig.backend.regions) == [REGION]
        rig.enable_ring(0)
        assert list(rig.backend.running) == [0]


@pytest.mark.parametrize(
    ("part", "last_offset", "step"),
    [("desc", 16 * 256, 16), ("avail", 6 + 2 * 256, 2), ("used", 8 + 8 * 256, 4)],
)
def test_each_part_of_a_ring_lies_in_memory_with_its_event_field(
    rig: Rig, part: str, last_offset: int, step: int
) -> None:
    start = REGION.user_addr
    addr = VringAddr(0, 0, desc=start, used=start, avail=start, log_guest_addr=0)
    last = start + REGION.size - last_offset
    with rig:
        rig.describe_ring(0, num=256)
        rig.kick_ring(0)
        for user_addr in (last + step, start - step, 2**64 - step):
            rig.do(
                RequestNumber.SET_VRING_ADDR, pack_vring_addr(addr._replace(**{part: user_addr}))
            )
            assert not rig.is_acked(RequestNumber.SET_VRING_ENABLE, state(0, 1))
            rig.enable_ring(0, 0)
        rig.do(RequestNumber.SET_VRING_ADDR, pack_vring_addr(addr._replace(**{part: last})))
        rig.enable_ring(0)
        assert list(rig.backend.running) == [0]


def test_rings_survive_a_new_memory_table(rig: Rig) -> None:
    with rig:
        rig.run_ring(0)
        rig.backend.calls.clear()
        moved = REGION._replace(mmap_offset=0x2000)
        rig.do(RequestNumber.REM_MEM_REG, bytes(8) + _region_bytes())
        rig.add_memory(moved)
        assert [call[0] for call in rig.backend.calls] == ["remove_region", "add_region"]
        assert list(rig.backend.running) == [0]


def _region_bytes() -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in REGION)


def test_a_given_inflight_buffer_counts_for_the_next_start_only(rig: Rig) -> None:
    with rig:
        payload = pack_inflight(Inflight(1 << 20, 0, 2, 256))
        rig.do(RequestNumber.SET_INFLIGHT_FD, payload, 1)
        assert not rig.run_ring(0).fresh
        assert not rig.run_ring(1).fresh
        assert rig.run_ring(2).fresh  # the buffer has no area for ring 2
        base_of(rig, 0)
        rig.kick_ring(0)
        assert rig.backend.running[0].fresh
        base_of(rig, 0)
        rig.do(RequestNumber.SET_INFLIGHT_FD, payload, 1)
        rig.kick_ring(0)
        assert not rig.backend.running[0].fresh


def test_a_ring_larger_than_its_inflight_area_does_not_start(rig: Rig) -> None:
    with rig:
        rig.do(RequestNumber.SET_INFLIGHT_FD, pack_inflight(Inflight(1 << 20, 0, 2, 128)), 1)
        rig.describe_ring(0, num=256)
        rig.kick_ring(0)
        assert not rig.is_acked(RequestNumber.SET_VRING_ENABLE, state(0, 1))


@pytest.mark.parametrize(
    ("request_", "payload", "num_fds"),
    [
        (RequestNumber.SET_VRING_NUM, state(3, 256), 0),
        (RequestNumber.SET_VRING_ADDR, ring_addr(3), 0),
        (RequestNumber.SET_VRING_BASE, state(2**32 - 1, 0), 0),
        (RequestNumber.SET_VRING_ENABLE, state(3, 0), 0),
        (RequestNumber.SET_VRING_KICK, word(3), 1),
        (RequestNumber.SET_VRING_KICK, word(255), 1),
        (RequestNumber.SET_VRING_CALL, word(3), 1),
        (RequestNumber.SET_VRING_CALL, word(3 | NO_FD), 0),
        (RequestNumber.SET_VRING_ERR, word(3), 1),
        (RequestNumber.SET_VRING_NUM, state(0, 0), 0),
        (RequestNumber.SET_VRING_NUM, state(0, 100), 0),
        (RequestNumber.SET_VRING_NUM, state(0, 2048), 0),
        (RequestNumber.SET_VRING_BASE, state(0, 65536), 0),
        (RequestNumber.SET_VRING_ENABLE, state(0, 2), 0),
        (RequestNumber.SET_VRING_ADDR, ring_addr(0, shift=8), 0),
        (RequestNumber.SET_VRING_ADDR, ring_addr(0, shift=1), 0),
    ],
)
def test_values_out_of_range_are_refused(
    rig: Rig, request_: RequestNumber, payload: bytes, num_fds: int
) -> None:
    with rig:
        assert not rig.is_acked(request_, payload, num_fds)
        with pytest.raises(VhostError, match="ring"):
            rig.handle(request_, payload, num_fds)
        assert rig.backend.calls == []


def test_the_base_of_a_ring_that_is_not_there_ends_the_connection(rig: Rig) -> None:
    # A failed ack has the size of this request's own reply, and would be read as ring 1's state.
    with rig, pytest.raises(VhostError, match="ring 3, expected 0 to 2"):
        rig.handle(RequestNumber.GET_VRING_BASE, state(3, 0), need_reply=True)
