"""Messages over a real socket, on both event loops."""

import asyncio
import fcntl
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest
import uvloop

from appliance.bounds import MESSAGE_FDS_MAX, PAYLOAD_MAX
from appliance.errors import VhostError
from appliance.vhost._vhost_wire import Header, RequestNumber, pack_header
from appliance.vhost.messages import Message, MessageReply, encode_reply
from appliance.vhost.transport import Connection
from tests.vhost.session_rig import mem_table, num_open_fds, state, word

T = TypeVar("T")
Run = Callable[[Callable[[], Awaitable[T]]], T]

DEADLINE_S = 10
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
NUM = pack_header(Header(RequestNumber.SET_VRING_NUM, 1, 8)) + state(1, 256)
CALL = pack_header(Header(RequestNumber.SET_VRING_CALL, 1, 8)) + word(0)


@pytest.fixture(name="run", params=LOOPS)
def _run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[object]]], object]:
    def run(function: Callable[[], Awaitable[object]]) -> object:
        async def bounded() -> object:
            async with asyncio.timeout(DEADLINE_S):
                return await function()

        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            return runner.run(bounded())

    return run


@pytest.fixture(name="pair")
def _pair() -> Iterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Connection(ours), theirs


Pair = tuple[Connection, socket.socket]


def test_a_message_arrives_whole(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def receive() -> None:
        peer.sendall(NUM + CALL)
        first = await connection.receive()
        second = await connection.receive()
        assert first is not None
        assert second is not None
        assert (first.number, first.payload) == (RequestNumber.SET_VRING_NUM, state(1, 256))
        assert (second.number, second.payload) == (RequestNumber.SET_VRING_CALL, word(0))

    run(receive)


def test_a_message_may_arrive_byte_by_byte_with_descriptors_on_each(
    run: Run[None], pair: Pair
) -> None:
    connection, peer = pair

    async def receive() -> None:
        receiving = asyncio.create_task(connection.receive())
        for byte in NUM:
            socket.send_fds(peer, [bytes([byte])], [peer.fileno()])
            await asyncio.sleep(0)
        message = await receiving
        assert message is not None
        assert message.payload == state(1, 256)
        # Descriptors that come with the header belong to the message; those that come with the
        # payload are dropped.
        assert len(message.fds) == 12
        message.close()

    run(receive)


def test_received_descriptors_are_the_senders_and_close_on_exec(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def receive() -> None:
        sent = [os.memfd_create(f"sent-{i}") for i in range(MESSAGE_FDS_MAX)]
        header = pack_header(Header(RequestNumber.SET_MEM_TABLE, 1, 8))
        socket.send_fds(peer, [header + mem_table([])], sent)
        message = await connection.receive()
        assert message is not None
        assert len(message.fds) == MESSAGE_FDS_MAX
        for index, original in enumerate(sent):
            fd = message.take_fd(index)
            assert os.fstat(fd).st_ino == os.fstat(original).st_ino
            assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            os.close(fd)
            os.close(original)

    run(receive)


def test_more_descriptors_than_a_message_may_carry_end_the_connection(
    run: Run[None], pair: Pair
) -> None:
    connection, peer = pair

    async def receive() -> None:
        socket.send_fds(peer, [NUM], [peer.fileno()] * (MESSAGE_FDS_MAX + 1))
        with pytest.raises(VhostError, match="descriptors"):
            await connection.receive()

    run(receive)


def test_descriptors_that_find_no_room_in_the_process_end_the_connection(
    run: Run[None], pair: Pair
) -> None:
    connection, peer = pair

    async def receive() -> None:
        socket.send_fds(peer, [NUM], [peer.fileno()] * 8)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(peer.fileno())
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 3, hard))
        try:
            with pytest.raises(VhostError, match="descriptors"):
                await connection.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    run(receive)


def test_the_end_between_messages_is_none_and_within_one_an_error(run: Run[None]) -> None:
    async def receive() -> None:
        for length in range(len(CALL)):
            ours, theirs = socket.socketpair()
            connection = Connection(ours)
            if length:
                socket.send_fds(theirs, [CALL[:length]], [0])
            theirs.close()
            if length:
                with pytest.raises(VhostError, match="within a message"):
                    await connection.receive()
            else:
                assert await connection.receive() is None
            connection.close()

    run(receive)


def test_a_reset_by_the_peer_is_an_end(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def receive() -> None:
        # Closing with unread data resets the connection.
        await connection.send(MessageReply(RequestNumber.GET_FEATURES, word(1)))
        peer.close()
        assert await connection.receive() is None

    run(receive)


@pytest.mark.parametrize(
    "data",
    [
        pack_header(Header(1, 2, 0)),
        pack_header(Header(1, 5, 0)),
        pack_header(Header(1, 1, PAYLOAD_MAX + 1)),
        pack_header(Header(1, 1, 1)) + b"x",
    ],
)
def test_what_cannot_be_a_message_leaks_no_descriptor(
    run: Run[None], pair: Pair, data: bytes
) -> None:
    connection, peer = pair

    async def receive() -> None:
        before = num_open_fds()
        socket.send_fds(peer, [data], [peer.fileno()] * 3)
        with pytest.raises(VhostError, match="GET_FEATURES"):
            await connection.receive()
        assert num_open_fds() == before

    run(receive)


def test_a_cancelled_receive_leaks_no_descriptor(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def receive() -> None:
        before = num_open_fds()
        socket.send_fds(peer, [CALL[:5]], [peer.fileno()])
        receiving = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        assert num_open_fds() == before + 1
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        assert num_open_fds() == before

    run(receive)


def test_close_ends_a_receive_that_waits(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def receive() -> None:
        receiving: asyncio.Task[Message | None] = asyncio.create_task(connection.receive())
        await asyncio.sleep(0)
        connection.close()
        assert await receiving is None
        assert peer.recv(1) == b""

    run(receive)


def test_a_reply_carries_descriptors_and_keeps_them_open(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def send() -> None:
        fd = os.memfd_create("lent")
        reply = MessageReply(RequestNumber.GET_INFLIGHT_FD, bytes(24), (fd,))
        await connection.send(reply)
        data, (received,), _flags, _address = socket.recv_fds(peer, 100, 4)
        assert data == encode_reply(reply)
        assert os.fstat(received).st_ino == os.fstat(fd).st_ino
        os.close(received)
        os.close(fd)

    run(send)


def test_a_reply_waits_for_room_and_arrives_whole(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def send() -> None:
        reply = MessageReply(RequestNumber.GET_CONFIG, bytes(range(256)) * 16)
        expected = encode_reply(reply) * 200
        sending = asyncio.create_task(_send_often(connection, reply, 200))
        received = b""
        loop = asyncio.get_running_loop()
        peer.settimeout(0)
        while len(received) < len(expected):
            received += await loop.sock_recv(peer, 10_000)
        await sending
        assert received == expected

    run(send)


async def _send_often(connection: Connection, reply: MessageReply, times: int) -> None:
    for _ in range(times):
        await connection.send(reply)


def test_a_reply_to_nobody_is_an_error(run: Run[None], pair: Pair) -> None:
    connection, peer = pair

    async def send() -> None:
        peer.close()
        with pytest.raises(VhostError, match="gone"):
            await connection.send(MessageReply(RequestNumber.GET_FEATURES, word(1)))

    run(send)
