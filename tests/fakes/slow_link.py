"""A link that is slow, loses packets, and can be cut: a TCP relay in front of a server.

`python -m tests.fakes.slow_link LISTEN TARGET DELAY_S BYTES_PER_S LOSS` relays each connection to
LISTEN (`host:port`) to TARGET. Each direction of the whole link has `BYTES_PER_S`; what is sent
arrives `DELAY_S` later; and of every segment of 1,448 bytes, `LOSS` are lost, which holds up their
connection for the time of two delays, as a repetition would. For each line on its standard input it
does something, and answers with a line:

    freeze      nothing more comes through the connections that exist, and none of them ends
    bytes       answers with the bytes from the server to each client so far, as JSON by address;
                under "", those to the server
"""

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

_SEGMENT: Final = 1448
_PIECE: Final = 16 << 10
# Of what is under way in one direction of one connection.
_UNDER_WAY: Final = 1 << 20


class _Direction:
    """One direction of the link, which all connections share."""

    def __init__(self, delay_s: float, bytes_per_s: float, loss: float) -> None:
        self.delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._loss = loss
        self._free_at_s = 0.0
        self._chance = random.Random(1)

    def arrival_s(self, size: int) -> float:
        """Return when a piece that is sent now has arrived."""
        sent_s = max(time.monotonic(), self._free_at_s) + size / self._bytes_per_s
        self._free_at_s = sent_s
        segments = -(-size // _SEGMENT)
        lost = sum(self._chance.random() < self._loss for _ in range(segments))
        return sent_s + self.delay_s * (1 + 2 * lost)


class _Relay:
    def __init__(self, target: tuple[str, int], ways: tuple[_Direction, _Direction]) -> None:
        self._target = target
        self._ways = ways
        self._tasks: set[asyncio.Task[None]] = set()
        self._frozen: list[asyncio.StreamWriter] = []
        self._writers: list[asyncio.StreamWriter] = []
        self.received: Counter[str] = Counter()

    def freeze(self) -> None:
        self._frozen += self._writers
        for task in self._tasks:
            task.cancel()

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # at the end, where asyncio would log it
            await self._join(reader, writer)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = writer.get_extra_info("peername")[0]
        try:
            inner_reader, inner_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        writers = (writer, inner_writer)
        self._writers += writers
        up = self._pump(reader, inner_writer, self._ways[0], "")
        down = self._pump(inner_reader, writer, self._ways[1], client)
        tasks = {asyncio.create_task(up), asyncio.create_task(down)}
        self._tasks |= tasks
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if writer in self._frozen:
            return
        for task in tasks:
            task.cancel()
        self._tasks -= tasks
        for end in writers:
            self._writers.remove(end)
            end.transport.abort()

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        way: _Direction,
        client: str,
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY // _PIECE)
        delivering = asyncio.create_task(self._deliver(queue, writer))
        try:
            while data := await reader.read(_PIECE):
                self.received[client] += len(data)
                await queue.put((way.arrival_s(len(data)), data))
            await queue.put((0.0, b""))
            await delivering
        except OSError:
            pass
        finally:
            delivering.cancel()

    async def _deliver(
        self, queue: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter
    ) -> None:
        while True:
            arrival_s, data = await queue.get()
            if not data:
                return
            await asyncio.sleep(arrival_s - time.monotonic())
            writer.write(data)
            await writer.drain()


async def _serve(listen: str, target: str, delay_s: float, bytes_per_s: float, loss: float) -> None:
    host, _, port = target.rpartition(":")
    ways = (_Direction(delay_s, bytes_per_s, loss), _Direction(delay_s, bytes_per_s, loss))
    relay = _Relay((host.strip("[]"), int(port)), ways)
    own_host, _, own_port = listen.rpartition(":")
    server = await asyncio.start_server(relay.join, own_host, int(own_port), limit=_PIECE)
    for connection in server.sockets:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    orders = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    print("listening", flush=True)
    while order := (await orders.readline()).decode().strip():
        if order == "freeze":
            relay.freeze()
            print("frozen", flush=True)
        else:
            print(json.dumps(relay.received), flush=True)


class SlowLink:
    """A relay in a process of its own, up when the constructor returns.

    Args:
        listen: `host:port` that clients connect to.
        target: `host:port` of the server.
        delay_s: in each direction.
        bytes_per_s: in each direction.
        loss: the part of all segments that is lost.
        prefix: of the command, for example to run it in another network namespace.
    """

    def __init__(
        self,
        listen: str,
        target: str,
        *,
        delay_s: float,
        bytes_per_s: float,
        loss: float,
        prefix: Sequence[str] = (),
    ) -> None:
        figures = map(str, (delay_s, bytes_per_s, loss))
        command = [*prefix, sys.executable, "-m", "tests.fakes.slow_link", listen, target, *figures]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "listening"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=30)

    def freeze(self) -> None:
        """Let nothing more through the connections that exist, and end none of them."""
        self._order("freeze")

    def bytes_to(self, host: str) -> int:
        """Return how many bytes have come from the server to a host."""
        return int(json.loads(self._order("bytes")).get(host, 0))

    def bytes_from(self) -> int:
        """Return how many bytes all hosts have sent to the server."""
        return self.bytes_to("")

    def _order(self, text: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:])))
