"""Where the daemon listens, as text and parsed."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError

# sd_listen_fds(3).
_FIRST_FD: Final = 3
_SD_LISTEN: Final = re.compile(r"sd[-_]listen(?:-unix)?(?::(?P<name>.*))?", re.IGNORECASE)
_TCP: Final = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})")
_PORT_MAX: Final = 65535


@dataclass(frozen=True)
class TcpListen:
    """A TCP address, numeric."""

    family: int
    host: str
    port: int

    def target(self) -> str:
        """Return it as gRPC writes it."""
        host = f"[{self.host}]" if self.family == socket.AF_INET6 else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class UnixListen:
    """The path of a socket to make."""

    path: Path


@dataclass(frozen=True)
class AbstractListen:
    """The name of a socket that is not in the file system."""

    name: str


@dataclass(frozen=True)
class InheritedListen:
    """A listening socket that the service manager passed."""

    fd: int


ListenAddress = TcpListen | UnixListen | AbstractListen | InheritedListen


def parse_listen_address(text: str, environ: Mapping[str, str]) -> list[ListenAddress]:
    """Read an address to listen on; one that names several sockets gives several.

    `host:port`, `[v6]:port`, a path that contains a slash, `@abstract`, `sd-listen` (the first
    inherited socket), `sd-listen:NAME` (those of that name) or `sd-listen:*` (all).

    Raises:
        ConfigError: it is none of these; or there is no such inherited socket or host.
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
