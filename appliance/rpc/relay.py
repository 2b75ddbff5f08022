"""Connections to inherited sockets, handed on to the server.

gRPC for Python cannot serve a socket that it did not open; so it also listens on a socket in a
directory that nobody else may enter, and each connection accepted here is joined to one made there.
"""

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
from typing import Final

from appliance.errors import ConfigError

_LOG = logging.getLogger(__name__)

_BUFFER_SIZE: Final = 1 << 18


def inherited_socket(fd: int) -> socket.socket:
    """Return the listening socket `fd`, which is owned from now on.

    Raises:
        ConfigError: it is not a listening stream socket.
    """
    try:
        sock = socket.socket(fileno=fd)
        is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as exc:
        raise ConfigError(f"inherited socket {fd}: {exc.strerror}") from exc
    if sock.type != socket.SOCK_STREAM or not is_listening:
        raise ConfigError(f"inherited socket {fd}: not a listening stream socket")
    os.set_inheritable(fd, False)  # noqa: FBT003 - the function's only form
    sock.setblocking(False)  # noqa: FBT003 - the method's only form
    return sock


class Relay:
    """Joins what connects to the sockets to the server's own `target`."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="appliance-daemon-")
        self._path = f"{self._directory.name}/relay.sock"
        self._sockets = sockets
        self._acceptors: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()

    def target(self) -> str:
        """Return where the server has to listen, as gRPC writes it."""
        return f"unix:{self._path}"

    def start(self) -> None:
        """Begin to accept; the server listens already."""
        self._acceptors = [asyncio.create_task(self._accept(sock)) for sock in self._sockets]

    async def stop_accepting(self) -> None:
        """Let no more connections in; those there are go on."""
        await _cancel(self._acceptors)
        for sock in self._sockets:
            sock.close()

    async def close(self) -> None:
        """End all connections."""
        await _cancel(list(self._connections))
        self._directory.cleanup()

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _address = await loop.sock_accept(sock)
            except OSError as exc:
                # Out of descriptors, or the peer gave up meanwhile: others shall still get in.
                _LOG.warning("accepting a connection: %s", exc.strerror)
                await asyncio.sleep(0.1)
                continue
            task = asyncio.create_task(self._join(accepted))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _join(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            with accepted, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
                inner.setblocking(False)  # noqa: FBT003 - the method's only form
                await loop.sock_connect(inner, self._path)
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(accepted, inner))
                    group.create_task(_pump(inner, accepted))
        except* OSError:
            pass  # one end is gone, and both are closed


async def _pump(source: socket.socket, target: socket.socket) -> None:
    # A source that fails ends both directions: its peer is gone. A target that does leaves what it
    # sent to the other direction, which meets its end.
    loop = asyncio.get_running_loop()
    buffer = bytearray(_BUFFER_SIZE)
    view = memoryview(buffer)
    while size := await loop.sock_recv_into(source, buffer):
        try:
            await loop.sock_sendall(target, view[:size])
        except OSError:
            return
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
