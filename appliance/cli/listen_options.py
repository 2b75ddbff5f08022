"""Options of servers: the permissions of the sockets that they create, and TLS."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.cli.exported_options import socket_group, socket_mode_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.rpc.daemon import SocketAccess
    from appliance.rpc.server_tls import TlsFiles

_DEFAULT_MODE: Final = "0660"


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
