"""Which services a command uses, from its options and the environment."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError
from appliance.services.addresses import (
    LmdbAddress,
    ServiceAddress,
    ServiceAddresses,
    parse_service_uri,
)

_KINDS: Final = ("blob", "directory", "path-info")


def add_store_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names one store for all services."""
    parser.add_argument(
        "--store",
        metavar="URI",
        help="the store, as lmdb:///absolute/path (or APPLIANCE_STORE)",
    )


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name one service each."""
    for kind in _KINDS:
        parser.add_argument(
            f"--{kind}-service-addr",
            metavar="URI",
            help=f"the {kind} service, if not --store: memory:, lmdb:///path, grpc+unix:/path, "
            f"grpc+http://host:port, grpc+https://host:port (or {_variable(kind)})",
        )


def service_addresses(
    options: argparse.Namespace, environ: Mapping[str, str] = os.environ
) -> ServiceAddresses:
    """Return where the services are.

    Raises:
        ConfigError: an address breaks a rule; the text names the option or variable too.
    """
    return ServiceAddresses(*(_address(kind, options, environ) for kind in _KINDS))


def environments(options: argparse.Namespace) -> list[Path]:
    """Return where LMDB environments are, or may be, that a command with `options` opens.

    Raises:
        ConfigError: as `service_addresses` and `state_dir`.
    """
    if not hasattr(options, "blob_service_addr"):
        return []
    addresses = service_addresses(options)
    found = {address.path for address in addresses if isinstance(address, LmdbAddress)}
    if hasattr(options, "state_dir"):
        found.update(state_dir(options, addresses).glob("cache/v*"))
    return sorted(found)


def state_dir(
    options: argparse.Namespace, services: ServiceAddresses, environ: Mapping[str, str] = os.environ
) -> Path:
    """Return where the cache and the control sockets are.

    Raises:
        ConfigError: that is no directory, and cannot become one; the text names option or variable.
    """
    given = {
        "--state-dir": options.state_dir,
        "APPLIANCE_STATE_DIR": environ.get("APPLIANCE_STATE_DIR"),
    }
    for source, value in given.items():
        if value == "" and _is_option(source):
            raise ConfigError(f"{source}: the path is empty")
        if value:
            return _checked_directory(f"{source} {value}", Path(value))
    return default_state_dir(services)


def default_state_dir(services: ServiceAddresses, environ: Mapping[str, str] = os.environ) -> Path:
    """Return where they are when nobody says: beside the store, if all is in one.

    Else, or if this process may not write there, they are beside the default store, under a name
    made from the addresses.
    """
    store = services.one_store()
    if store is not None:
        beside = store.with_name(store.name + ".state")
        if _is_writable(beside):
            return beside
    import hashlib

    name = hashlib.sha256(services.canonical().encode()).hexdigest()[:16]
    return default_store(environ).with_name(f"remote-{name}.state")


def _is_writable(path: Path) -> bool:
    # Or, where there is nothing yet, whether it can be made.
    there = next(above for above in (path, *path.parents) if os.path.lexists(above))
    return os.access(there, os.W_OK)


def default_store(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the store is when nobody says."""
    if os.geteuid() == 0:
        return Path("/var/lib/appliance/store")
    state_home = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state_home) / "appliance" / "store"


def _address(kind: str, options: argparse.Namespace, environ: Mapping[str, str]) -> ServiceAddress:
    given = {
        f"--{kind}-service-addr": getattr(options, f"{kind.replace('-', '_')}_service_addr"),
        _variable(kind): environ.get(_variable(kind)),
        "--store": options.store,
        "APPLIANCE_STORE": environ.get("APPLIANCE_STORE"),
    }
    for source, uri in given.items():
        if uri or (uri == "" and _is_option(source)):
            try:
                address = parse_service_uri(uri)
            except ConfigError as exc:
                raise ConfigError(f"{source}: {exc}") from exc
            if isinstance(address, LmdbAddress):
                _checked_directory(f"{source} {uri}", address.path)
            return address
    return LmdbAddress(default_store(environ))


def _is_option(source: str) -> bool:
    # An empty variable counts as none, as everywhere; an empty option is a mistake.
    return source.startswith("--")


def _checked_directory(given: str, path: Path) -> Path:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as exc:  # py-lmdb takes no other
        raise ConfigError(f"{given}: the path is not UTF-8") from exc
    # What is missing can be made, if what is there is a directory.
    for there in (path, *path.absolute().parents):
        if os.path.lexists(there):
            if not there.is_dir():
                raise ConfigError(f"{given}: {there} is not a directory")
            break
    return path


def _variable(kind: str) -> str:
    return f"{kind.replace('-', '_').upper()}_SERVICE_ADDR"
