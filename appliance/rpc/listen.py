"""Where the daemon listens: addresses, and a relay for sockets that it inherited.

gRPC opens the sockets of all other addresses itself. gRPC for Python cannot serve a socket that it
did not open, so `Relay` accepts connections to inherited ones and joins each to a connection to a
socket of the server, in a directory that nobody else may enter.
"""

import asyncio
import contextlib
import logging
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError

_LOG = logging.getLogger(__name__)

# The first descriptor that a service manager passes: SD_LISTEN_FDS_START in sd_listen_fds(3).
_FIRST_FD: Final = 3
_SD_LISTEN: Final = re.compile(r"sd[-_]listen(?:-unix)?(?::(?P<name>.*))?", re.IGNORECASE)
_TCP: Final = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})")
_PORT_MAX: Final = 65535
# Bytes copied at a time, in each direction of a relayed connection.
_BUFFER_SIZE: Final = 1 << 18
# How long to wait after accept(2) failed.
_ACCEPT_RETRY_S: Final = 0.1


# --- Addresses ---


@dataclass(frozen=True)
class TcpListen:
    """A numeric TCP address; `family` is AF_INET or AF_INET6."""

    family: int
    host: str
    port: int

    def target(self) -> str:
        """Return the address as gRPC writes it."""
        host = f"[{self.host}]" if self.family == socket.AF_INET6 else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class UnixListen:
    """The path of a socket to create."""

    path: Path


@dataclass(frozen=True)
class AbstractListen:
    """The name of a socket in the abstract namespace, without the leading NUL."""

    name: str


@dataclass(frozen=True)
class InheritedListen:
    """The descriptor of a listening socket that the service manager passed."""

    fd: int


ListenAddress = TcpListen | UnixListen | AbstractListen | InheritedListen


def parse_listen_address(text: str, environ: Mapping[str, str]) -> list[ListenAddress]:
    """Parse an address to listen on; one that names several sockets results in several.

    The forms are `host:port`, `[v6]:port`, a path that contains a slash, `@abstract`, `sd-listen`
    (the first inherited socket), `sd-listen:NAME` (those of that name) and `sd-listen:*` (all).

    Raises:
        ConfigError: `text` has none of these forms, or names no inherited socket or host.
    """
    if match := _SD_LISTEN.fullmatch(text):
        return [InheritedListen(fd) for fd in _inherited(text, match["name"], environ)]
    if text.startswith("@"):
        if len(text) == 1:
            raise ConfigError(f"listen address {text}: the name is missing")
        return [AbstractListen(text[1:])]
    if "/" in text:
        return [UnixListen(Path(text))]
    if match := _TCP.fullmatch(text):
        return _tcp(text, match["v6"] or match["host"], int(match["port"]))
    raise ConfigError(
        f"listen address {text}: expected host:port, /path, @abstract or sd-listen[:NAME]"
    )


def _tcp(text: str, host: str, port: int) -> list[ListenAddress]:
    if port > _PORT_MAX:
        raise ConfigError(f"listen address {text}: the port is above {_PORT_MAX}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise ConfigError(f"listen address {text}: {exc.strerror}") from exc
    except UnicodeError as exc:
        raise ConfigError(f"listen address {text}: {host} is not a host name") from exc
    return [
        TcpListen(family, str(address[0]), port)
        for family, _type, _protocol, _name, address in found
    ]


def _inherited(text: str, name: str | None, environ: Mapping[str, str]) -> list[int]:
    if environ.get("LISTEN_PID") != str(os.getpid()):
        raise ConfigError(f"listen address {text}: no sockets were passed (LISTEN_PID)")
    count = environ.get("LISTEN_FDS", "")
    if not count.isdecimal() or int(count) == 0:
        raise ConfigError(f"listen address {text}: no sockets were passed (LISTEN_FDS)")
    fds = list(range(_FIRST_FD, _FIRST_FD + int(count)))
    if name is None:
        return fds[:1]
    if name == "*":
        return fds
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    named = [fd for fd, its_name in zip(fds, names, strict=False) if its_name == name]
    if not named:
        raise ConfigError(f"listen address {text}: no socket of that name was passed")
    return named


def passed_names(environ: Mapping[str, str]) -> list[str]:
    """Return the names of the sockets that a service manager has passed to this process."""
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    return environ.get("LISTEN_FDNAMES", "").split(":")


# --- Connections to inherited sockets ---


def inherited_socket(fd: int) -> socket.socket:
    """Return the listening socket `fd`, which it takes ownership of, as a non-blocking one.

    Raises:
        ConfigError: `fd` is not a listening stream socket.
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
    """Accepts connections to `sockets` (owned) and joins each to one to the server.

    Args:
        sockets: listening and non-blocking.
    """

    def __init__(self, sockets: list[socket.socket]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="appliance-daemon-")
        self._path = f"{self._directory.name}/relay.sock"
        self._sockets = sockets
        self._acceptors: list[asyncio.Task[None]] = []
        self._connections: set[asyncio.Task[None]] = set()

    def target(self) -> str:
        """Return the address that the server has to listen on, as gRPC writes it."""
        return f"unix:{self._path}"

    def start(self) -> None:
        """Begin to accept connections; the server must listen already."""
        self._acceptors = [asyncio.create_task(self._accept(sock)) for sock in self._sockets]

    async def stop_accepting(self) -> None:
        """Close the listening sockets; connections go on."""
        await _cancel(self._acceptors)
        for sock in self._sockets:
            sock.close()

    async def close(self) -> None:
        """End all connections and remove the socket of the server."""
        await _cancel(list(self._connections))
        self._directory.cleanup()

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _address = await loop.sock_accept(sock)
            except OSError as exc:
                # No descriptor is left, or the peer has given up: keep accepting others.
                _LOG.warning("accepting a connection: %s", exc.strerror)
                await asyncio.sleep(_ACCEPT_RETRY_S)
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
            pass  # one end is gone; both are closed


async def _pump(source: socket.socket, target: socket.socket) -> None:
    # If the source fails, its peer is gone: the error ends both directions. If the target fails,
    # what it sent before may still be on its way: the other direction goes on until its end.
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
