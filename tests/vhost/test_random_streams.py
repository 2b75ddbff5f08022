"""Whatever a front-end sends, the session serves it, refuses it or ends; no descriptor leaks."""

import asyncio
import contextlib
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.errors import VhostError
from appliance.vhost._vhost_wire import (
    Header,
    Inflight,
    Log,
    MemReg,
    Region,
    RequestNumber,
    StateTransfer,
    VringAddr,
    pack_header,
    pack_inflight,
    pack_log,
    pack_mem_reg,
    pack_state_transfer,
    pack_vring_addr,
)
from appliance.vhost.fs_device import DeviceProperties
from appliance.vhost.session import Session, converse
from appliance.vhost.transport import Connection
from tests.vhost.session_rig import (
    REGION,
    RecordingBackend,
    Rig,
    mem_table,
    num_open_fds,
    ring_addr,
    state,
    word,
)

pytestmark = pytest.mark.slow

Step = tuple[int, bytes, int]

RINGS = st.sampled_from([0, 0, 1, 1, 2, 255, 2**32 - 1])
NUMS = st.sampled_from([0, 1, 1, 3, 128, 256, 65535, 65536])
U64 = st.integers(0, 2**64 - 1)


def steps(
    requests: list[RequestNumber], payloads: st.SearchStrategy[bytes]
) -> st.SearchStrategy[Step]:
    return st.tuples(st.sampled_from(requests), payloads, st.integers(0, 2))


REGIONS = st.one_of(
    st.sampled_from([REGION, REGION._replace(gpa=0, user_addr=0)]),
    st.builds(Region, U64, U64, U64, U64),
)
STEPS = st.one_of(
    steps(
        [
            RequestNumber.SET_VRING_NUM,
            RequestNumber.SET_VRING_BASE,
            RequestNumber.GET_VRING_BASE,
            RequestNumber.SET_VRING_ENABLE,
        ],
        st.builds(state, RINGS, NUMS),
    ),
    steps(
        [RequestNumber.SET_VRING_KICK, RequestNumber.SET_VRING_CALL, RequestNumber.SET_VRING_ERR],
        st.builds(word, st.sampled_from([0, 0, 0, 1, 1, 2, 0x100, 0x101, 0x200, 2**64 - 1])),
    ),
    steps(
        [RequestNumber.SET_VRING_ADDR],
        st.one_of(
            st.builds(ring_addr, st.sampled_from([0, 1, 2])),
            st.builds(
                lambda ring, flags, a, b, c: pack_vring_addr(VringAddr(ring, flags, a, b, c, a)),
                RINGS,
                st.integers(0, 1),
                U64,
                U64,
                U64,
            ),
        ),
    ),
    steps(
        [RequestNumber.ADD_MEM_REG, RequestNumber.REM_MEM_REG],
        st.builds(lambda region: pack_mem_reg(MemReg(region)), REGIONS),
    ),
    steps([RequestNumber.SET_MEM_TABLE], st.builds(mem_table, st.lists(REGIONS, max_size=3))),
    steps(
        [RequestNumber.GET_INFLIGHT_FD, RequestNumber.SET_INFLIGHT_FD],
        st.builds(
            lambda queues, num: pack_inflight(Inflight(1 << 20, 0, queues, num)),
            st.integers(0, 3),
            st.sampled_from([0, 64, 256, 1000]),
        ),
    ),
    steps(
        [RequestNumber.SET_FEATURES, RequestNumber.SET_PROTOCOL_FEATURES],
        st.builds(
            word,
            st.one_of(
                U64, st.sampled_from([0, 1 << 32, 0x1_7000_0000, 0x1_7400_0000, 0x8B20B, 0x8B00B])
            ),
        ),
    ),
    steps(
        [
            RequestNumber.RESET_DEVICE,
            RequestNumber.RESET_OWNER,
            RequestNumber.GET_FEATURES,
            RequestNumber.SET_LOG_FD,
            RequestNumber.CHECK_DEVICE_STATE,
        ],
        st.just(b""),
    ),
    steps(
        [RequestNumber.SET_LOG_BASE],
        st.builds(
            lambda size, offset: pack_log(Log(size, offset)),
            st.sampled_from([0x1000, 1, 0, 2**64 - 1]),
            st.sampled_from([0, 0x1000, 1, 2**64 - 1]),
        ),
    ),
    steps(
        [RequestNumber.SET_DEVICE_STATE_FD],
        st.builds(
            lambda direction, phase: pack_state_transfer(StateTransfer(direction, phase)),
            st.integers(0, 2),
            st.integers(0, 1),
        ),
    ),
    st.tuples(st.integers(0, 50), st.binary(max_size=80), st.integers(0, 3)),
)
REFUSALS = st.sets(
    st.sampled_from(
        [
            *("add_region", "set_regions", "set_inflight", "save_state", "load_state"),
            *("start_ring", "stop_ring", "set_call", "set_log", "finish_state"),
        ]
    )
)


def set_up(rig: Rig) -> None:
    rig.negotiate()
    rig.add_memory()
    rig.run_ring(0)
    rig.describe_ring(1)
    rig.kick_ring(1)


@settings(max_examples=300, deadline=None)
@given(st.booleans(), REFUSALS, st.lists(st.tuples(STEPS, st.booleans()), max_size=30))
def test_messages_are_served_or_refused_whatever_their_order(
    is_set_up: bool,  # noqa: FBT001 - hypothesis passes by position
    refusals: set[str],
    stream: list[tuple[Step, bool]],
) -> None:
    before = num_open_fds()
    with Rig() as rig:
        if is_set_up:
            set_up(rig)
        rig.backend.refuses = refusals
        for (request, payload, num_fds), need_reply in stream:
            # The session must survive further messages, although the connection would have ended.
            with contextlib.suppress(VhostError):
                rig.handle(request, payload, num_fds, need_reply=need_reply)
    assert num_open_fds() == before


async def converse_with(data: bytes, fds: list[int]) -> RecordingBackend:
    backend = RecordingBackend()
    session = Session(DeviceProperties(2, 1024, b"tag"), backend)
    ours, theirs = socket.socketpair()
    with theirs:
        if data:
            socket.send_fds(theirs, [data], fds)
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(VhostError):
            await converse(Connection(ours), session)
    return backend


HEADERS = st.builds(
    lambda request, flags, size: pack_header(Header(request, flags, size)),
    st.one_of(st.integers(0, 46), st.integers(0, 2**32 - 1)),
    st.one_of(st.sampled_from([1, 9]), st.integers(0, 2**32 - 1)),
    st.one_of(st.sampled_from([0, 8, 40]), st.integers(0, 2**32 - 1)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(HEADERS, st.binary(max_size=64)), max_size=8), st.integers(0, 5))
def test_bytes_are_messages_or_end_the_connection(pieces: list[bytes], num_fds: int) -> None:
    before = num_open_fds()
    backend = asyncio.run(converse_with(b"".join(pieces), [0] * num_fds))
    assert backend.is_closed
    assert num_open_fds() == before
