"""`appliance http`: a binary cache for Nix."""

import argparse
import os
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.key_options import (
    add_sign_option,
    add_signature_options,
    required_keys,
    secret_keys,
)
from appliance.cli.listen_options import listening_socket
from appliance.cli.options import add_log_options, add_service_options, service_addresses
from appliance.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_DEFAULT_LISTEN: Final = "[::1]:9000"
_DEFAULT_PRIORITY: Final = 39
_DEFAULT_LEVEL: Final = 3
_LEVEL_MAX: Final = 19


def add_http(commands: "Subparsers") -> None:
    """Add `appliance http`."""
    command = commands.add_parser(
        "http",
        usage="%(prog)s [OPTION]...",
        help="serve the store as a binary cache for Nix over HTTP",
        description="Serve the store as a binary cache for Nix over HTTP, until a signal ends it.",
    )
    _add_serving(command.add_argument_group("serving"))
    uploads = command.add_argument_group("uploads")
    uploads.add_argument(
        "--allow-put",
        action="store_true",
        help="accept uploads, as `nix copy --to` sends them, from every client that can connect",
    )
    add_signature_options(uploads)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_http)


def _add_serving(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "-l",
        "--listen-address",
        action="append",
        default=[],
        metavar="ADDR",
        help="listen on ADDR: HOST:PORT, the path of a Unix socket, @NAME for an abstract one, or "
        "sd-listen[:NAME] for those that systemd passes; may be given several times (default: "
        f"{_DEFAULT_LISTEN})",
    )
    add_sign_option(group, "sign each narinfo with the secret key in FILE")
    group.add_argument(
        "--priority",
        type=int,
        default=_DEFAULT_PRIORITY,
        metavar="N",
        help="of several caches, Nix asks the one with the lowest N first (default: "
        f"{_DEFAULT_PRIORITY})",
    )
    group.add_argument(
        "--zstd-level",
        type=int,
        default=_DEFAULT_LEVEL,
        metavar="N",
        help="compress NARs at this level, from 1 to "
        f"{_LEVEL_MAX}, for clients that accept zstd; 0 for never (default: {_DEFAULT_LEVEL})",
    )


def _run_http(options: argparse.Namespace) -> None:
    from appliance.http_cache.cache_server import CacheConfig, serve_cache
    from appliance.rpc.listen import parse_listen_address

    if options.priority < 0:
        raise ConfigError(f"--priority {options.priority}: is below 0")
    if not 0 <= options.zstd_level <= _LEVEL_MAX:
        raise ConfigError(f"--zstd-level {options.zstd_level}: is not 0 to {_LEVEL_MAX}")
    if options.require_signatures and not options.allow_put:
        raise ConfigError("--require-signatures: goes with --allow-put only")
    services = service_addresses(options)
    trusted_keys = required_keys(options)
    addresses = [
        address
        for text in options.listen_address or [_DEFAULT_LISTEN]
        for address in parse_listen_address(text, os.environ)
    ]
    serve_cache(
        CacheConfig(
            services,
            [listening_socket(address) for address in addresses],
            secret_keys=secret_keys(options),
            priority=options.priority,
            allows_put=options.allow_put,
            trusted_keys=trusted_keys,
            zstd_level=options.zstd_level,
        )
    )
