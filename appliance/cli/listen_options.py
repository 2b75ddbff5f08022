"""Options of servers: where they listen, the permissions of their sockets, and TLS."""

import argparse
import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from appliance.cli.setting_options import add_settings
from appliance.config.guest_settings import PASSED_METRICS
from appliance.config.resolution import ValueSource, label_of, source_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from appliance.rpc.daemon import SocketAccess
    from appliance.rpc.listen import ListenAddress
    from appliance.rpc.server_tls import TlsFiles
    from appliance.system.listening import ListeningSocket

# Sockets whose mode no option sets: for their owner and group.
_SOCKET_MODE: Final = 0o660
_LOOPBACK: Final = "127.0.0.1"


def add_socket_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of the daemon for sockets in the file system, and for TLS on TCP."""
    add_settings(
        parser,
        *("listen-mode", "listen-group", "tls-cert", "tls-key", "tls-client-ca"),
        section="daemon",
    )


def socket_access(options: argparse.Namespace) -> "SocketAccess":
    """Return what the options say about sockets in the file system."""
    from appliance.rpc.daemon import SocketAccess

    return SocketAccess(options.listen_mode, options.listen_group)


def tls_files(options: argparse.Namespace) -> "TlsFiles | None":
    """Return the files that the options name for TLS, or None without TLS.

    Raises:
        ConfigError: one of them lacks another.
    """
    from appliance.rpc.server_tls import TlsFiles

    if options.tls_cert is None and options.tls_key is None:
        if options.tls_client_ca is not None:
            raise ConfigError("--tls-client-ca: needs --tls-cert and --tls-key")
        return None
    if options.tls_cert is None or options.tls_key is None:
        raise ConfigError("--tls-cert and --tls-key need each other")
    return TlsFiles(options.tls_cert, options.tls_key, options.tls_client_ca)


def listening_socket(address: "ListenAddress") -> "ListeningSocket":
    """Listen at an address; the caller owns the socket and its file.

    Raises:
        ConfigError: that is not possible.
    """
    from appliance.rpc.listen import (
        AbstractListen,
        InheritedListen,
        TcpListen,
        UnixListen,
        inherited_socket,
    )
    from appliance.system.listening import ListeningSocket, claim_socket_path, socket_mode

    match address:
        case TcpListen(family, host, port):
            sock = _bound(family, (host, port), address.target())
            label = f"{address.target().rpartition(':')[0]}:{sock.getsockname()[1]}"
            return ListeningSocket(sock, label)
        case AbstractListen(name):
            return ListeningSocket(_bound(socket.AF_UNIX, f"\0{name}", f"@{name}"), f"@{name}")
        case UnixListen(path):
            claim_socket_path(path)
            with socket_mode(_SOCKET_MODE):
                sock = _bound(socket.AF_UNIX, os.fspath(path), str(path))
            return ListeningSocket(sock, str(path), path)
        case InheritedListen(fd):
            return ListeningSocket(inherited_socket(fd), f"inherited socket {fd}")


def _bound(family: int, address: "tuple[str, int] | str", where: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen()
    except OSError as exc:
        sock.close()
        raise ConfigError(f"cannot listen on {where}: {exc.strerror or exc}") from exc
    sock.setblocking(False)  # noqa: FBT003 - the method's only form
    return sock


# --- Metrics ---


def listen_addresses(options: argparse.Namespace) -> "list[ListenAddress]":
    """Return the addresses that the setting `listen-address` names.

    Raises:
        ConfigError: one of them is not valid; the text says where it came from.
    """
    from appliance.rpc.listen import parse_listen_address

    label = label_of(options, "listen_address")
    prefix = f"{label}: " if source_of(options, "listen_address") is ValueSource.FILE else ""
    try:
        return [
            address
            for text in options.listen_address
            for address in parse_listen_address(text, os.environ)
        ]
    except ConfigError as exc:
        raise ConfigError(f"{prefix}{exc}") from exc


@contextmanager
def metrics_socket(options: argparse.Namespace) -> "Iterator[ListeningSocket | None]":
    """Have the socket that the setting `metrics` asks for, or that systemd passes, for a block.

    Raises:
        ConfigError: the address is not valid, or stands for several; or it cannot be used.
    """
    text = options.metrics
    if text is None and not os.environ.get("LISTEN_FDNAMES"):
        yield None
        return
    from appliance.rpc.listen import parse_listen_address, passed_names

    if text is None and PASSED_METRICS in passed_names(os.environ):
        text = f"sd-listen:{PASSED_METRICS}"
    if text is None:
        yield None
        return
    try:
        addresses = parse_listen_address(
            f"{_LOOPBACK}{text}" if text.startswith(":") else text, os.environ
        )
    except ConfigError as exc:
        raise ConfigError(f"{label_of(options, 'metrics')}: {exc}") from exc
    if len(addresses) > 1:
        label = label_of(options, "metrics")
        raise ConfigError(f"{label} {text}: is {len(addresses)} sockets, expected one")
    listening = listening_socket(addresses[0])
    try:
        yield listening
    finally:
        listening.socket.close()
        listening.remove_file()
