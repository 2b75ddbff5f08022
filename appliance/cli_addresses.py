"""Which services a command uses, from its options and the environment."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.store.service_uri import LmdbAddress, ServiceAddress, parse_service_uri

if TYPE_CHECKING:
    from appliance.rpc.open_services import ServiceAddresses

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
            help=f"the {kind} service, if not --store: memory:, lmdb:///path, grpc+unix:///path, "
            f"grpc+http://host:port, grpc+https://host:port (or {_variable(kind)})",
        )


def service_addresses(
    options: argparse.Namespace, environ: Mapping[str, str] = os.environ
) -> "ServiceAddresses":
    """Return where the services are.

    Raises:
        ConfigError: an address breaks a rule.
    """
    from appliance.rpc.open_services import ServiceAddresses

    store = options.store or environ.get("APPLIANCE_STORE")
    fallback = parse_service_uri(store) if store else LmdbAddress(default_store(environ))

    def address(kind: str) -> ServiceAddress:
        option = getattr(options, f"{kind.replace('-', '_')}_service_addr")
        uri = option or environ.get(_variable(kind))
        return parse_service_uri(uri) if uri else fallback

    return ServiceAddresses(*map(address, _KINDS))


def default_store(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where the store is when nobody says."""
    if os.geteuid() == 0:
        return Path("/var/lib/appliance/store")
    state_home = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state_home) / "appliance" / "store"


def _variable(kind: str) -> str:
    return f"{kind.replace('-', '_').upper()}_SERVICE_ADDR"
