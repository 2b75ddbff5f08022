"""TLS for the daemon's TCP sockets: its certificate, and which clients may connect."""

import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

from appliance.errors import ConfigError


class TlsFiles(NamedTuple):
    """Files in PEM format, as the options of the daemon name them.

    Args:
        cert: the certificate of the server, followed by those that lead to its authority.
        key: its private key, without a pass phrase.
        client_ca: the authorities whose clients are served; None for all clients.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Return the credentials to listen with.

    gRPC reports nothing about a file that it cannot use, so OpenSSL reads all of them first.

    Raises:
        ConfigError: a file cannot be read or is not what it should be.
    """
    cert = _read("--tls-cert", files.cert)
    key = _read("--tls-key", files.key)
    client_ca = None if files.client_ca is None else _read("--tls-client-ca", files.client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.cert, files.key, password=_no_password)
    except (ssl.SSLError, ValueError) as exc:
        raise ConfigError(
            f"--tls-cert {files.cert}, --tls-key {files.key}: "
            f"not a certificate and its key in PEM format ({_reason(exc)})"
        ) from exc
    if client_ca is not None:
        try:
            context.load_verify_locations(files.client_ca)
        except (ssl.SSLError, ValueError) as exc:
            raise ConfigError(
                f"--tls-client-ca {files.client_ca}: no certificates in PEM format ({_reason(exc)})"
            ) from exc
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{option} {path}: {exc.strerror}") from exc


def _no_password() -> str:
    raise ValueError("the key has a pass phrase")


def _reason(exc: Exception) -> str:
    return getattr(exc, "reason", None) or str(exc)
