"""Counted connections, on a loop of this process."""

import asyncio
import socket

import pytest

from appliance.system import http_connections
from appliance.system.http_connections import ConnectionCount, CountedConnection

DEADLINE_S = 10.0


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Listening:
    """A listening socket whose connections are counted."""

    def __init__(self, maximum: int) -> None:
        self.count = ConnectionCount(maximum)
        self.made: list[CountedConnection] = []
        self.socket = socket.create_server(("127.0.0.1", 0))

    async def start(self) -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(self._connection, sock=self.socket)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(*self.socket.getsockname())

    def _connection(self) -> CountedConnection:
        self.made.append(CountedConnection(self.count, Echo))
        return self.made[-1]


def test_connections_beyond_the_maximum_are_refused_until_one_ends() -> None:
    async def work() -> None:
        listening = Listening(maximum=1)
        server = await listening.start()
        reader, writer = await listening.connect()
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        refused, refused_writer = await listening.connect()
        assert (await refused.read()).endswith(b"\r\n\r\ntoo many connections\n")
        for open_writer in (refused_writer, writer):
            open_writer.close()
            await open_writer.wait_closed()
        for _ in range(1000):
            if not listening.count.num_open:
                break
            await asyncio.sleep(0.001)
        reader, writer = await listening.connect()
        writer.write(b"y")
        assert await reader.readexactly(1) == b"y"
        writer.close()
        server.close()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


@pytest.mark.slow
def test_an_idle_connection_is_ended_and_a_working_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_connections, "IDLE_S", 0.5)

    async def work() -> None:
        listening = Listening(maximum=2)
        server = await listening.start()
        idle, idle_writer = await listening.connect()
        working, working_writer = await listening.connect()
        working_writer.write(b"w")
        assert await working.readexactly(1) == b"w"
        listening.made[1].num_requests = 1
        assert await idle.read() == b""
        working_writer.write(b"x")
        assert await working.readexactly(1) == b"x"
        listening.made[1].num_requests = 0
        listening.made[1].restart_timer()
        assert await working.read() == b""
        idle_writer.close()
        working_writer.close()
        server.close()

    asyncio.run(asyncio.wait_for(work(), DEADLINE_S))
