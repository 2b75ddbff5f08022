"""Addresses of services: parsing them, and the one canonical text of each.

The canonical text identifies services for as long as the product exists: directories are named
after its digest (see `cli.options.default_state_dir`), so changing it orphans caches.
"""

import os
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, quote, unquote_to_bytes, urlencode, urlsplit

from appliance.errors import ConfigError

# What gRPC writes before the path of a socket, and before a host and port.
_UNIX_SCHEME: Final = "unix:"
_DNS_SCHEME: Final = "dns:///"
_DEFAULT_PORTS: Final = {"grpc+http": 80, "grpc+https": 443}
# Parameters of an address, as Snix has them; `_with_parameters` reads them.
_WAIT_CONNECT: Final = "wait-connect"
_TLS_PARAMETERS: Final = ("tls-ca-cert-path", "tls-client-cert-path", "tls-client-key-path")
_OBJECT_STORE: Final = "objectstore+"
# Options of an object store, without the prefix of its vendor, that say to what it connects.
_IDENTIFYING: Final = {
    "endpoint": "endpoint",
    "endpoint_url": "endpoint",
    "account_name": "account_name",
}
_VENDOR_PREFIXES: Final = ("aws_", "azure_storage_", "azure_", "google_")


class ObjectScheme(StrEnum):
    """The kinds of object stores, by what stands behind `objectstore+` in their addresses."""

    FILE = "file"
    MEMORY = "memory"
    HTTP = "http"
    HTTPS = "https"
    S3 = "s3"
    GS = "gs"
    AZ = "az"


class MemoryAddress(NamedTuple):
    """A service in the memory of this process: `memory:`."""

    def label(self) -> str:
        """Return the address as messages have it."""
        return "memory:"

    def canonical(self) -> str:
        """See `ServiceAddresses.canonical`."""
        return "memory:"

    def directory(self) -> Path | None:
        """Return the directory of this machine that has the content, if there is one."""
        return None


class LmdbAddress(NamedTuple):
    """A store in LMDB: `lmdb:///absolute/path`."""

    path: Path

    def label(self) -> str:
        """Return the address as messages have it."""
        return self.canonical()

    def canonical(self) -> str:
        """See `ServiceAddresses.canonical`."""
        return f"lmdb://{_quoted(self.path.resolve())}"

    def directory(self) -> Path | None:
        """Return the directory of this machine that has the content."""
        return self.path


class GrpcAddress(NamedTuple):
    """A remote service.

    `grpc+unix:/absolute/path` (as Tvix and Snix write it; or with three slashes),
    `grpc+http://host[:port]` or `grpc+https://host[:port]`, and parameters behind a question mark,
    which say how to connect and not to what: they are no part of the canonical text.

    Args:
        target: the address as gRPC writes it.
        is_tls: whether the connection is encrypted.
        waits: connect when the service is opened (`wait-connect=1`), and not at the first call.
        ca_cert: file of the certificate authorities that are trusted (`tls-ca-cert-path`); by
            default those of the system.
        client_cert: file of the certificate that is shown to the server (`tls-client-cert-path`).
        client_key: file of its private key (`tls-client-key-path`).
    """

    target: str
    is_tls: bool
    waits: bool = False
    ca_cert: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None

    def is_unix(self) -> bool:
        """Return whether it is a socket in the file system."""
        return self.target.startswith(_UNIX_SCHEME)

    def label(self) -> str:
        """Return the address as messages have it."""
        return self.target

    def canonical(self) -> str:
        """See `ServiceAddresses.canonical`."""
        if self.is_unix():
            path = os.fsdecode(unquote_to_bytes(self.target.removeprefix(_UNIX_SCHEME)))
            return f"grpc+unix://{_quoted(Path(path).resolve())}"
        scheme = "grpc+https" if self.is_tls else "grpc+http"
        return f"{scheme}://{self.target.removeprefix(_DNS_SCHEME).lower()}"

    def directory(self) -> Path | None:
        """Return the directory of this machine that has the content, if there is one."""
        return None


class ObjectStoreAddress(NamedTuple):
    """Objects in a bucket, below a directory, or behind an HTTP server.

    `objectstore+s3://bucket/prefix`, `objectstore+gs://bucket/prefix` and
    `objectstore+az://container/prefix`; `objectstore+file:///directory`; `objectstore+memory:`;
    `objectstore+https://host[:port]/prefix`, which can only be read. Parameters behind a question
    mark are options of the store, by the names that the crate object_store gives them. Those may
    hold secrets, so messages have none of them.

    Args:
        scheme: the kind of store.
        place: the bucket or container, or host and port; empty for a directory and memory.
        prefix: what the names of all objects begin with, without a slash at either end; for a
            directory, its absolute path.
        options: the options, by name.
    """

    scheme: ObjectScheme
    place: str = ""
    prefix: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def is_readonly(self) -> bool:
        """Return whether nothing can be put there."""
        return self.scheme in {ObjectScheme.HTTP, ObjectScheme.HTTPS}

    def label(self) -> str:
        """Return the address as messages have it."""
        return self._without_options()

    def canonical(self) -> str:
        """See `ServiceAddresses.canonical`."""
        if self.scheme is ObjectScheme.FILE:
            return f"{_OBJECT_STORE}file://{_quoted(Path(self.prefix).resolve())}"
        identity = {
            _IDENTIFYING[known]: value
            for name, value in self.options
            if (known := _without_vendor(name)) in _IDENTIFYING
        }
        query = urlencode(sorted(identity.items()))
        return f"{self._without_options()}{'?' if query else ''}{query}"

    def directory(self) -> Path | None:
        """Return the directory of this machine that has the content, if there is one."""
        return Path(self.prefix) if self.scheme is ObjectScheme.FILE else None

    def _without_options(self) -> str:
        match self.scheme:
            case ObjectScheme.MEMORY:
                return f"{_OBJECT_STORE}memory:"
            case ObjectScheme.FILE:
                return f"{_OBJECT_STORE}file://{_quoted(Path(self.prefix))}"
        prefix = f"/{_quoted(Path(self.prefix))}" if self.prefix else ""
        return f"{_OBJECT_STORE}{self.scheme}://{self.place}{prefix}"


ServiceAddress = MemoryAddress | LmdbAddress | GrpcAddress | ObjectStoreAddress


def is_peer(address: ServiceAddress) -> bool:
    """Return whether what comes from a service has passed through other hands than ours."""
    return isinstance(address, GrpcAddress | ObjectStoreAddress)


class ServiceAddresses(NamedTuple):
    """The addresses of the three services; several may be in one store, or behind one peer."""

    blobs: ServiceAddress
    directories: ServiceAddress
    path_infos: ServiceAddress

    def one_store(self) -> Path | None:
        """Return the resolved path of the store in LMDB that all services are in, if any."""
        paths = {
            address.path.resolve() if isinstance(address, LmdbAddress) else None for address in self
        }
        return paths.pop() if len(paths) == 1 else None

    def views_beside(self, state_dir: Path) -> Path:
        """Return the directory that has the views of these services (see `store.views`).

        It is the store if they are all in one, else the state directory.
        """
        return self.one_store() or state_dir

    def canonical(self) -> str:
        """Return the text that identifies these services, the same for all ways to write them.

        It has three lines, each ended by a newline, in this order: `blobs=`, `directories=` and
        `path-infos=`, followed by the address as a URI:

        - `memory:`
        - `lmdb:///path` and `grpc+unix:///path`: the path is resolved (absolute, without symbolic
          links as of now), and percent-encoded except for letters, digits and `_.-~/`;
        - `grpc+http://host:port` and `grpc+https://host:port`: the host is in lower case, an IPv6
          address is in brackets, and the port is written out even if it is the default;
        - `objectstore+SCHEME://bucket/prefix`: as above; of the options, `endpoint=` and
          `account_name=` if the address has them.

        The text does not depend on the names of classes or fields, and never changes.
        """
        return (
            f"blobs={self.blobs.canonical()}\n"
            f"directories={self.directories.canonical()}\n"
            f"path-infos={self.path_infos.canonical()}\n"
        )


def parse_service_uri(uri: str) -> ServiceAddress:
    """Parse the address of a service.

    Raises:
        ConfigError: the address breaks a rule, which the text names.
    """
    try:
        parts = urlsplit(uri)
    except ValueError as exc:
        raise ConfigError(f"service address {uri}: {exc}") from exc
    if parts.fragment:
        raise _refusal(uri, "takes no fragment")
    if parts.scheme.startswith(_OBJECT_STORE):
        return _object_store(uri, parts)
    if parts.query and not parts.scheme.startswith("grpc+"):
        raise _refusal(uri, "takes no query")
    match parts.scheme:
        case "memory":
            return _memory(uri, parts)
        case "lmdb":
            return LmdbAddress(_path(uri, parts))
        case "grpc+unix":
            target = unix_target(_path(uri, parts))
            return _with_parameters(uri, parts, GrpcAddress(target, is_tls=False))
        case "grpc+http" | "grpc+https":
            return _with_parameters(uri, parts, _grpc_host(uri, parts))
    raise _refusal(
        uri,
        f"unknown scheme {parts.scheme!r}; "
        "memory, lmdb, grpc+unix, grpc+http, grpc+https and objectstore+... are known",
    )


def unix_target(path: Path) -> str:
    """Return the address of the socket at `path` as gRPC writes it."""
    return f"{_UNIX_SCHEME}{_quoted(path)}"


def _quoted(path: Path) -> str:
    return quote(os.fsencode(path))


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


def _object_store(uri: str, parts: SplitResult) -> ObjectStoreAddress:
    try:
        scheme = ObjectScheme(parts.scheme.removeprefix(_OBJECT_STORE))
    except ValueError as exc:
        known = ", ".join(ObjectScheme)
        raise _refusal(uri, f"unknown kind of object store; known are {known}") from exc
    if parts.username is not None or parts.password is not None:
        raise _refusal(uri, "takes no user name")
    if scheme in {ObjectScheme.FILE, ObjectScheme.MEMORY}:
        if parts.query:
            raise _refusal(uri, "takes no query")
        if scheme is ObjectScheme.MEMORY:
            _memory(uri, parts)
            return ObjectStoreAddress(scheme)
        return ObjectStoreAddress(scheme, prefix=str(_path(uri, parts)))
    if not parts.hostname:
        what = "host" if scheme in {ObjectScheme.HTTP, ObjectScheme.HTTPS} else "bucket"
        raise _refusal(uri, f"the {what} is missing")
    options: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name.lower() in options:
            raise _refusal(uri, f"{name} is given twice")
        options[name.lower()] = value
    prefix = os.fsdecode(unquote_to_bytes(parts.path)).strip("/")
    if not {"", ".", ".."}.isdisjoint(prefix.split("/")) and prefix:
        raise _refusal(uri, "the path has an empty part, or one that is . or ..")
    return ObjectStoreAddress(scheme, parts.netloc, prefix, tuple(options.items()))


def _without_vendor(name: str) -> str:
    for prefix in _VENDOR_PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


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
    return GrpcAddress(f"{_DNS_SCHEME}{host}:{port}", is_tls=parts.scheme == "grpc+https")


def _with_parameters(uri: str, parts: SplitResult, address: GrpcAddress) -> GrpcAddress:
    known = (_WAIT_CONNECT, *_TLS_PARAMETERS) if address.is_tls else (_WAIT_CONNECT,)
    values: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True, errors="surrogateescape"):
        if name in _TLS_PARAMETERS and not address.is_tls:
            raise _refusal(uri, f"{name} is for grpc+https only")
        if name not in known:
            raise _refusal(uri, f"unknown parameter {name!r}; known: {', '.join(known)}")
        if name in values:
            raise _refusal(uri, f"{name} is given twice")
        if not value:
            raise _refusal(uri, f"{name} has no value")
        values[name] = value
    waits = values.pop(_WAIT_CONNECT, "0")
    if waits not in {"0", "1"}:
        raise _refusal(uri, f"{_WAIT_CONNECT} is {waits}, expected 0 or 1")
    ca_cert, client_cert, client_key = (
        Path(values[name]) if name in values else None for name in _TLS_PARAMETERS
    )
    if (client_cert is None) != (client_key is None):
        raise _refusal(uri, "tls-client-cert-path and tls-client-key-path need each other")
    return address._replace(
        waits=waits == "1", ca_cert=ca_cert, client_cert=client_cert, client_key=client_key
    )


def _refusal(uri: str, rule: str) -> ConfigError:
    return ConfigError(f"service address {uri}: {rule}")
