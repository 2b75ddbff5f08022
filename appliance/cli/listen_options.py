"""Options of servers: where they listen, the permissions of their sockets, and TLS."""

import argparse
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.cli.exported_options import socket_group, socket_mode_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from appliance.rpc.daemon import SocketAccess
    from appliance.rpc.listen import ListenAddress
    from appliance.rpc.server_tls import TlsFiles
    from appliance.system.listening import ListeningSocket

_DEFAULT_MODE: Final = "0660"
# Sockets whose mode no option sets: for their owner and group.
_SOCKET_MODE: Final = 0o660
_LOOPBACK: Final = "127.0.0.1"
# The name (FileDescriptorName=) of a socket for metrics that systemd passes.
_PASSED_METRICS: Final = "metrics"


def add_socket_options(parser: argparse._ActionsContainer) -> None:
    """Add the options for sockets in the file system, and for TLS on TCP."""
    parser.add_argument(
        "--listen-mode",
        default=_DEFAULT_MODE,
        metavar="MODE",
        help="give the Unix sockets created here these permissions, in octal (default: "
        f"{_DEFAULT_MODE})",
    )
    parser.add_argument(
        "--listen-group",
        metavar="GROUP",
        help="give the Unix sockets created here to GROUP (a name or number)",
    )
    parser.add_argument(
        "--tls-cert",
        type=Path,
        metavar="FILE",
        help="on TCP, speak TLS with the certificate, or chain of them, in FILE (PEM)",
    )
    parser.add_argument(
        "--tls-key", type=Path, metavar="FILE", help="the private key of that certificate (PEM)"
    )
    parser.add_argument(
        "--tls-client-ca",
        type=Path,
        metavar="FILE",
        help="serve only clients with a certificate of an authority in FILE (PEM)",
    )


def socket_access(options: argparse.Namespace) -> "SocketAccess":
    """Return what the options say about sockets in the file system.

    Raises:
        ConfigError: a mode or group is not valid.
    """
    from appliance.rpc.daemon import SocketAccess

    mode = socket_mode_of(options.listen_mode, "--listen-mode")
    gid = None
    if options.listen_group is not None:
        gid = socket_group(options.listen_group, "--listen-group")
    return SocketAccess(mode, gid)


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


def add_metrics_option(
    parser: argparse._ActionsContainer, default: str = "`appliance metrics` alone shows them"
) -> None:
    """Add the option that serves metrics; `default` says what happens without it."""
    parser.add_argument(
        "--metrics",
        metavar="ADDR",
        help="serve metrics in the format of OpenMetrics under /metrics on ADDR: the path of a "
        "Unix socket, :PORT of 127.0.0.1, HOST:PORT, or sd-listen[:NAME] for a socket that "
        f"systemd passes (default: one that it passes under the name of {_PASSED_METRICS}; else "
        f"{default})",
    )


@contextmanager
def metrics_socket(options: argparse.Namespace) -> "Iterator[ListeningSocket | None]":
    """Have the socket that `--metrics` asks for, or that systemd passes for it, for a block.

    Raises:
        ConfigError: the address is not valid, or stands for several; or it cannot be used.
    """
    text = options.metrics
    if text is None and not os.environ.get("LISTEN_FDNAMES"):
        yield None
        return
    from appliance.rpc.listen import parse_listen_address, passed_names

    if text is None and _PASSED_METRICS in passed_names(os.environ):
        text = f"sd-listen:{_PASSED_METRICS}"
    if text is None:
        yield None
        return
    try:
        addresses = parse_listen_address(
            f"{_LOOPBACK}{text}" if text.startswith(":") else text, os.environ
        )
    except ConfigError as exc:
        raise ConfigError(f"--metrics: {exc}") from exc
    if len(addresses) > 1:
        raise ConfigError(f"--metrics {text}: is {len(addresses)} sockets, expected one")
    listening = listening_socket(addresses[0])
    try:
        yield listening
    finally:
        listening.socket.close()
        listening.remove_file()
