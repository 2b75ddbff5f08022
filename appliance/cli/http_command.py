"""`appliance http`: a binary cache for Nix."""

import argparse
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.key_options import add_signature_options, required_keys, secret_keys
from appliance.cli.listen_options import listen_addresses, listening_socket
from appliance.cli.options import add_log_options, add_service_options, service_addresses
from appliance.cli.setting_options import add_settings
from appliance.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_SECTION: Final = "http"


def add_http(commands: "Subparsers") -> None:
    """Add `appliance http`."""
    command = commands.add_parser(
        "http",
        usage="%(prog)s [OPTION]...",
        help="serve the store as a binary cache for Nix over HTTP",
        description="Serve the store as a binary cache for Nix over HTTP, until a signal ends it.",
    )
    serving = command.add_argument_group("serving")
    add_settings(serving, "listen-address", "sign", "priority", "zstd-level", section=_SECTION)
    uploads = command.add_argument_group("uploads")
    add_settings(uploads, "allow-put", section=_SECTION)
    add_signature_options(uploads, _SECTION)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_http)


def _run_http(options: argparse.Namespace) -> None:
    from appliance.http_cache.cache_server import CacheConfig, serve_cache

    if options.require_signatures and not options.allow_put:
        raise ConfigError("--require-signatures: goes with --allow-put only")
    services = service_addresses(options)
    trusted_keys = required_keys(options)
    serve_cache(
        CacheConfig(
            services,
            [listening_socket(address) for address in listen_addresses(options)],
            secret_keys=secret_keys(options),
            priority=options.priority,
            allows_put=options.allow_put,
            trusted_keys=trusted_keys,
            zstd_level=options.zstd_level,
        )
    )
