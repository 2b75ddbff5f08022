"""Addresses of services, as text and parsed."""

import os
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, quote, unquote_to_bytes, urlsplit

from appliance.errors import ConfigError

_UNIX_SCHEME: Final = "unix:"


class MemoryAddress(NamedTuple):
    """Kept in this process, and gone with it: `memory:`."""


class LmdbAddress(NamedTuple):
    """A store in LMDB: `lmdb:///absolute/path`."""

    path: Path


class GrpcAddress(NamedTuple):
    """A remote service.

    `grpc+unix:/absolute/path` (as Tvix and Snix write it; or with three slashes),
    `grpc+http://host[:port]` or `grpc+https://host[:port]`; `target` is what gRPC calls it.
    """

    target: str
    is_tls: bool

    def is_unix(self) -> bool:
        """Whether it is a socket in the file system."""
        return self.target.startswith(_UNIX_SCHEME)


ServiceAddress = MemoryAddress | LmdbAddress | GrpcAddress


class ServiceAddresses(NamedTuple):
    """Where the services are; several may be in one store, or behind one peer."""

    blobs: ServiceAddress
    directories: ServiceAddress
    path_infos: ServiceAddress

    def one_store(self) -> Path | None:
        """Return the path of the store in LMDB that all services are in, if there is one."""
        paths = {
            address.path.resolve() if isinstance(address, LmdbAddress) else None for address in self
        }
        return paths.pop() if len(paths) == 1 else None


_DEFAULT_PORTS: Final = {"grpc+http": 80, "grpc+https": 443}


def parse_service_uri(uri: str) -> ServiceAddress:
    """Read the address of a service.

    Raises:
        ConfigError: a rule is broken; the text names it.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as exc:
        raise ConfigError(f"service address {uri}: {exc}") from exc
    if parts.query or parts.fragment:
        raise _refusal(uri, "takes no query and no fragment")
    match parts.scheme:
        case "memory":
            return _memory(uri, parts)
        case "lmdb":
            return LmdbAddress(_path(uri, parts))
        case "grpc+unix":
            return GrpcAddress(unix_target(_path(uri, parts)), is_tls=False)
        case "grpc+http" | "grpc+https":
            return _grpc_host(uri, parts)
    raise _refusal(
        uri,
        f"unknown scheme {parts.scheme!r}; "
        "memory, lmdb, grpc+unix, grpc+http and grpc+https are known",
    )


def unix_target(path: Path) -> str:
    """Return what gRPC calls the socket at `path`: a URI too."""
    return f"{_UNIX_SCHEME}{quote(os.fsencode(path))}"


def _memory(uri: str, parts: SplitResult) -> MemoryAddress:
    if parts.netloc:
        raise _refusal(uri, "memory takes no host")
    if parts.path:
        raise _refusal(uri, "memory takes no path")
    return MemoryAddress()


def _path(uri: str, parts: SplitResult) -> Path:
    if parts.netloc:
        raise _refusal(uri, f"has a host; write {parts.scheme}:/path, or with three slashes")
    path = os.fsdecode(unquote_to_bytes(os.fsencode(parts.path)))
    if not path.startswith("/"):
        raise _refusal(uri, "the path must be absolute")
    if not path.strip("/"):
        raise _refusal(uri, "the path must not be / itself")
    if "\0" in path:
        raise _refusal(uri, "the path contains NUL")
    return Path(path)


def _grpc_host(uri: str, parts: SplitResult) -> GrpcAddress:
    if parts.path:
        raise _refusal(uri, "takes no path, not even a trailing slash")
    if not parts.hostname:
        raise _refusal(uri, "the host is missing")
    if parts.username is not None or parts.password is not None:
        raise _refusal(uri, "takes no user name")
    try:
        port = _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
    except ValueError as exc:
        raise _refusal(uri, str(exc)) from exc
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return GrpcAddress(f"dns:///{host}:{port}", is_tls=parts.scheme == "grpc+https")


def _refusal(uri: str, rule: str) -> ConfigError:
    return ConfigError(f"service address {uri}: {rule}")
